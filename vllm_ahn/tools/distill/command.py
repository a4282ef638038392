"""``vllm-ahn distill``: train an AHN for a base model."""

from __future__ import annotations

import argparse
import dataclasses
from typing import Any

from vllm_ahn.errors import AHNError
from vllm_ahn.memory.spec import SHORT_NAMES
from vllm_ahn.tools.distill.settings import Settings

_DEFAULTS: dict[str, Any] = {field.name: field.default for field in dataclasses.fields(Settings)}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what `run` reads to `parser`."""
    parser.add_argument("base", help="the model to extend, a folder or a hub repository; it is not changed")
    parser.add_argument("--memory", choices=list(SHORT_NAMES), default="gdn", help="(default: %(default)s)")
    parser.add_argument(
        "--use-q-proj",
        action="store_true",
        help="give the memory a query projection of its own, which the paper's lack (gdn)",
    )
    parser.add_argument(
        "--data", nargs="+", required=True, metavar="FILE_OR_NAME",
        help="text files, JSON lines with messages or text, or names of data sets of the hub",
    )  # fmt: skip
    parser.add_argument("--output", required=True, metavar="DIR", help="a new folder: the checkpoint to serve")
    _add(parser, "length", int, "max tokens of a sample")
    _add(parser, "window", int, "fixed window W, tokens; without it, drawn for every sample")
    _add(parser, "sinks", int, "fixed sinks S, tokens; needs --window")
    for name, what in (("lossless", "W + S"), ("sink_choices", "S")):
        parser.add_argument(
            _flag(name), nargs="+", type=int, default=list(_DEFAULTS[name]), metavar="N",
            help=f"values {what} is drawn from, tokens (default: %(default)s)",
        )  # fmt: skip
    _add(parser, "max_ratio", int, "max length of a sample over its W + S, where they are drawn")
    parser.add_argument(
        "--loss",
        choices=("kl", "ce"),
        default="kl",
        help="kl: match the teacher; ce: match the text (default: %(default)s)",
    )
    _add(parser, "steps", int, "optimizer steps")
    _add(parser, "batch_size", int, "samples a step, over all processes")
    _add(parser, "micro_batch", int, "samples a process takes at a time, all of one length")
    _add(parser, "learning_rate", float, "peak learning rate; it falls as a cosine after the warm-up")
    _add(parser, "warm_up", float, "share of the steps in which the learning rate rises")
    _add(parser, "weight_decay", float, "AdamW weight decay")
    _add(parser, "save_every", int, "steps between checkpoints to resume from")
    _add(parser, "seed", int, "seed of weights, order and lengths")
    parser.add_argument(
        "--dtype", choices=("auto", "float32", "bfloat16", "float16"), default="auto",
        help="dtype of the base; auto: bfloat16 on a GPU, float32 on a CPU (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--no-checkpointing", dest="checkpointing", action="store_false",
        help="keep all activations: about a quarter faster, for more memory",
    )  # fmt: skip
    parser.add_argument("--resume", action="store_true", help="continue from the newest checkpoint in --output")


def run(args: argparse.Namespace) -> int:
    """Train as the arguments say, print how to serve the result, and return 0. Raises `AHNError`."""
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
