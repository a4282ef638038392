"""``vllm-ahn distill``: trains an AHN for a base model."""

from __future__ import annotations

import argparse
import dataclasses
from typing import Any

from vllm_ahn.errors import AHNError
from vllm_ahn.memory.spec import SHORT_NAMES
from vllm_ahn.tools.distill.settings import Settings

_DEFAULTS: dict[str, Any] = {field.name: field.default for field in dataclasses.fields(Settings)}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds what `run` reads to `parser`."""
    parser.add_argument("base", help="the model to extend, which stays as it is: a folder or a hub repository")
    parser.add_argument("--memory", choices=list(SHORT_NAMES), default="gdn")
    parser.add_argument(
        "--use-q-proj",
        action="store_true",
        help="a query projection of the memory's own, which the paper's have not (gdn)",
    )
    parser.add_argument(
        "--data", nargs="+", required=True, metavar="FILE_OR_NAME",
        help="text files, JSON lines with messages or text, or names of data sets of the hub",
    )  # fmt: skip
    parser.add_argument("--output", required=True, metavar="DIR", help="a new folder: the checkpoint to serve")
    _add(parser, "length", int, "most tokens of a sample")
    _add(parser, "window", int, "fixed W, tokens; drawn for every sample if not given")
    _add(parser, "sinks", int, "fixed S, tokens, beside --window")
    for name, what in (("lossless", "W + S"), ("sink_choices", "S")):
        parser.add_argument(
            _flag(name), nargs="+", type=int, default=list(_DEFAULTS[name]), metavar="N",
            help=f"what {what} is drawn from, tokens (default: %(default)s)",
        )  # fmt: skip
    _add(parser, "max_ratio", int, "how many times W + S a sample may be long, where they are drawn")
    parser.add_argument("--loss", choices=("kl", "ce"), default="kl", help="towards the teacher, or the text")
    _add(parser, "steps", int, "optimizer steps")
    _add(parser, "batch_size", int, "samples of a step, over all processes")
    _add(parser, "micro_batch", int, "samples that a process works on at a time, all of the same lengths")
    _add(parser, "learning_rate", float, "highest rate; a cosine follows the warm-up")
    _add(parser, "warm_up", float, "share of the steps in which the rate rises")
    _add(parser, "weight_decay", float, "of AdamW")
    _add(parser, "save_every", int, "steps between checkpoints to resume from")
    _add(parser, "seed", int, "of weights, order and lengths")
    parser.add_argument(
        "--dtype", choices=("auto", "float32", "bfloat16", "float16"), default="auto",
        help="of the base; auto: bfloat16 on a GPU, float32 on a CPU",
    )  # fmt: skip
    parser.add_argument(
        "--no-checkpointing", dest="checkpointing", action="store_false",
        help="keep what the gradient needs of every layer: faster by a quarter or so, where memory allows it",
    )  # fmt: skip
    parser.add_argument("--resume", action="store_true", help="go on from the newest checkpoint in --output")


def run(args: argparse.Namespace) -> int:
    """Trains as the arguments say and prints how to serve the result; returns 0. Raises `AHNError`."""
    values = {name: getattr(args, name) for name in _DEFAULTS}
    values |= {name: tuple(values[name]) for name in ("data", "lossless", "sink_choices")}
    settings = Settings(**values | {"memory": SHORT_NAMES[args.memory].name})
    try:
        from vllm_ahn.tools.distill.run import distill, is_first_process
    except ImportError as error:
        raise AHNError(
            f"distill: the package {error.name} is not installed, expected it from pip install vllm-ahn[distill]"
        ) from None
    output = distill(settings)
    if is_first_process():
        print(f"Serve it: vllm serve {settings.base} --ahn {output}")
    return 0


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _add(parser: argparse.ArgumentParser, name: str, kind: type, text: str) -> None:
    default = _DEFAULTS[name]
    shown = "" if default is None else f" (default: {default})"
    parser.add_argument(_flag(name), type=kind, default=default, metavar="N", help=text + shown)
