"""``vllm-ahn cost MODEL``: compute and cache of long sequences, as the paper counts and as vLLM allocates."""

from __future__ import annotations

import argparse
import json
import pathlib

from vllm_ahn.config import DEFAULT_SINKS, DEFAULT_WINDOW, NO_MEMORY, check_sinks, check_window
from vllm_ahn.errors import AHNError
from vllm_ahn.memory.spec import SHORT_NAMES
from vllm_ahn.tools.quiet import quiet_vllm

DEFAULT_LENGTH = 128_000
"""Tokens: the paper's "128k"."""

DTYPES = ("auto", "bfloat16", "float16", "float32")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds what `run` reads to `parser`."""
    parser.add_argument("model", help="folder, config.json or hub repository (REPOSITORY@REVISION for a revision)")
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--ahn", metavar="CKPT", help=f"an AHN checkpoint, or {NO_MEMORY!r} for sinks and window alone")
    which.add_argument("--memory", choices=list(SHORT_NAMES), help="one memory, instead of all three")
    # The second names are those of vllm serve, which messages about bad values use.
    parser.add_argument(
        "--window", "--ahn-window", type=_length, default=DEFAULT_WINDOW, metavar="N", help="W (default: %(default)s)"
    )
    parser.add_argument(
        "--sinks", "--ahn-sinks", type=_length, default=DEFAULT_SINKS, metavar="N", help="S (default: %(default)s)"
    )
    parser.add_argument(
        "--length",
        type=_length,
        nargs="+",
        default=[DEFAULT_LENGTH],
        metavar="N",
        help="tokens of a sequence; 128k is 128,000 and 128K is 131,072, as in vLLM (default: %(default)s)",
    )
    engine = parser.add_argument_group("engine", "as in vllm serve, where defaults may depend on the GPU")
    engine.add_argument("--dtype", choices=DTYPES, default="auto", help="of model and cache (default: the model's)")
    engine.add_argument("--block-size", type=int, default=16, metavar="N", help="(default: %(default)s)")
    engine.add_argument(
        "-tp", "--tensor-parallel-size", type=int, default=1, metavar="N", help="(default: %(default)s)"
    )
    engine.add_argument(
        "--max-num-batched-tokens",
        type=_length,
        default=8192,
        metavar="N",
        help="tokens of a step (default: %(default)s)",
    )
    engine.add_argument(
        "--async-scheduling",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="two steps in flight instead of one (default: yes)",
    )
    parser.add_argument(
        "--sequences-in", type=float, default=40, metavar="GIB", help="cache memory of a GPU (default: %(default)s)"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--plot", metavar="FILE", help="draw cache and FLOPs over length (.png, .svg or .pdf)")


def run(args: argparse.Namespace) -> int:
    """Prints the report. Raises `AHNError` for bad input."""
    check_window(args.window)
    check_sinks(args.sinks)
    for flag in ("tensor_parallel_size", "max_num_batched_tokens", "sequences_in"):
        if not getattr(args, flag) > 0:
            raise AHNError(f"--{flag.replace('_', '-')} is {getattr(args, flag)}, expected a number above 0")
    if args.plot is not None:
        _check_plot(args.plot)
    quiet_vllm()
    from vllm_ahn.tools.cost.allocation import EngineSettings
    from vllm_ahn.tools.cost.report import Question, configs, report
    from vllm_ahn.tools.cost.shape import find_model
    from vllm_ahn.tools.cost.text import text

    model = find_model(args.model)
    settings = EngineSettings(
        dtype=model.shape.dtype if args.dtype == "auto" else args.dtype,
        block_size=args.block_size,
        tensor_parallel_size=args.tensor_parallel_size,
        max_num_batched_tokens=args.max_num_batched_tokens,
        async_scheduling=args.async_scheduling,
    )
    if args.memory is not None:
        rows = configs(args.window, args.sinks, None, [SHORT_NAMES[args.memory].name])
    else:
        rows = configs(args.window, args.sinks, model.ahn(args.ahn, args.window, args.sinks))
    question = Question(model, rows, settings, args.length, args.sequences_in)
    answer = report(question)
    print(json.dumps(answer, indent=2) if args.json else text(answer))
    if args.plot is not None:
        from vllm_ahn.tools.cost.plot import plot

        plot(question, pathlib.Path(args.plot))
    return 0


def _check_plot(name: str) -> None:
    path = pathlib.Path(name)
    if path.suffix not in (".png", ".svg", ".pdf"):
        raise AHNError(f"--plot is {name}, expected a file name that ends in .png, .svg or .pdf")
    if not path.parent.is_dir():
        raise AHNError(f"--plot is {name}, expected a file in a folder that exists")
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise AHNError('--plot needs matplotlib, which is not installed: pip install "vllm-ahn[plot]"') from None


def _length(value: str) -> int:
    """Tokens, as vLLM reads them: 128000, 128,000 and 128k are one, 128K is 131,072."""
    quiet_vllm()
    from vllm.utils.argparse_utils import human_readable_int

    return int(human_readable_int(value.replace(",", "")))
