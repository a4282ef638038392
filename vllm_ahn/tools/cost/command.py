"""``vllm-ahn cost MODEL``: compute and cache of long sequences, as the paper counts and as vLLM allocates."""

from __future__ import annotations

import argparse
import json
import pathlib
from typing import Any

from vllm_ahn.config import DEFAULT_SINKS, DEFAULT_WINDOW, NO_MEMORY, AHNConfig, check_sinks, check_window
from vllm_ahn.errors import AHNError
from vllm_ahn.memory.spec import SHORT_NAMES
from vllm_ahn.plugin.limits import MAX_SPEC_TOKENS
from vllm_ahn.tools.arguments import add_state_dtype
from vllm_ahn.tools.cost.curves import check_plot
from vllm_ahn.tools.quiet import quiet_vllm

DEFAULT_LENGTH = 128_000
"""Tokens: the paper's "128k"."""

DTYPES = ("auto", "bfloat16", "float16", "float32")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what `run` reads to `parser`."""
    parser.add_argument(
        "model",
        help="folder, config.json or hub repository (REPOSITORY@REVISION for a revision); published bases need no "
        "network: Qwen2.5-3B, -7B, -14B",
    )
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--ahn", metavar="CKPT", help=f"an AHN checkpoint, or {NO_MEMORY!r} for sinks and window alone")
    which.add_argument("--memory", choices=list(SHORT_NAMES), help="one memory, instead of all of them")
    # The second names are those of vllm serve, which messages about bad values use.
    _add(parser, "--window", "--ahn-window", type=_length, default=DEFAULT_WINDOW, help="W, tokens")
    _add(parser, "--sinks", "--ahn-sinks", type=_length, default=DEFAULT_SINKS, help="S, tokens")
    _add(
        parser, "--length", type=_length, nargs="+", default=[DEFAULT_LENGTH],
        help="tokens of a sequence; 128k is 128,000 and 128K is 131,072, as in vLLM",
    )  # fmt: skip
    engine = parser.add_argument_group("engine", "as in vllm serve, where defaults may depend on the GPU")
    engine.add_argument("--dtype", choices=DTYPES, default="auto", help="of model and cache (default: the model's)")
    add_state_dtype(engine)
    _add(engine, "--block-size", type=int, default=16, help="tokens in a block")
    _add(engine, "-tp", "--tensor-parallel-size", type=int, default=1, help="GPUs that share the model")
    _add(engine, "--max-num-batched-tokens", type=_length, default=8192, help="tokens of a step")
    engine.add_argument(
        "--async-scheduling", action=argparse.BooleanOptionalAction, default=True,
        help="two steps in flight instead of one (default: yes)",
    )  # fmt: skip
    engine.add_argument(
        "--enable-prefix-caching", action=argparse.BooleanOptionalAction, default=True,
        help="keep states for the prefix cache (default: yes)",
    )  # fmt: skip
    _add(engine, "--spec-tokens", type=int, default=0, help="drafts of a step")
    parser.add_argument(
        "--sequences-in", type=float, default=40, metavar="GIB", help="cache memory of a GPU (default: %(default)s)"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--plot", metavar="FILE", help="draw cache and FLOPs over length (.png, .svg or .pdf)")


def run(args: argparse.Namespace) -> int:
    """Print the report, draw the plot if there is to be one, and return 0. Raises `AHNError` for bad input."""
    check_window(args.window)
    check_sinks(args.sinks)
    for flag in ("tensor_parallel_size", "max_num_batched_tokens", "sequences_in"):
        if not getattr(args, flag) > 0:
            raise AHNError(f"--{flag.replace('_', '-')} is {getattr(args, flag)}, expected a number above 0")
    if args.plot is not None:
        check_plot(args.plot)
    if not 0 <= args.spec_tokens <= MAX_SPEC_TOKENS:
        raise AHNError(f"--spec-tokens is {args.spec_tokens}, expected a number from 0 to {MAX_SPEC_TOKENS}")
    quiet_vllm()
    from vllm_ahn.tools.cost.allocation import EngineSettings
    from vllm_ahn.tools.cost.report import Question, build_report, compared_configs
    from vllm_ahn.tools.cost.shape import find_model
    from vllm_ahn.tools.cost.text import format_report

    model = find_model(args.model)
    settings = EngineSettings(
        dtype=model.shape.dtype if args.dtype == "auto" else args.dtype,
        block_size=args.block_size,
        tensor_parallel_size=args.tensor_parallel_size,
        max_num_batched_tokens=args.max_num_batched_tokens,
        async_scheduling=args.async_scheduling,
        enable_prefix_caching=args.enable_prefix_caching,
        spec_tokens=args.spec_tokens,
    )
    window = AHNConfig(None, args.window, args.sinks, state_dtype=args.state_dtype)
    if args.memory is not None:
        rows = compared_configs(window, None, [SHORT_NAMES[args.memory].name])
    else:
        rows = compared_configs(window, model.ahn(args.ahn, args.window, args.sinks, args.state_dtype))
    question = Question(model, rows, settings, args.length, args.sequences_in)
    report = build_report(question)
    print(json.dumps(report, indent=2) if args.json else format_report(report))
    if args.plot is not None:
        from vllm_ahn.tools.cost.plot import draw_plot

        draw_plot(question, pathlib.Path(args.plot))
    return 0


def _add(parser: argparse._ActionsContainer, *names: str, help: str, **settings: Any) -> None:
    parser.add_argument(*names, metavar="N", help=f"{help} (default: %(default)s)", **settings)


def _length(value: str) -> int:
    """Read tokens as vLLM does: 128000, 128,000 and 128k are one, 128K is 131,072."""
    quiet_vllm()
    from vllm.utils.argparse_utils import human_readable_int

    return int(human_readable_int(value.replace(",", "")))
