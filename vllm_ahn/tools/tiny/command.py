"""``vllm-ahn make-tiny DIR``: write a tiny random base model and an AHN checkpoint for it."""

from __future__ import annotations

import argparse
import inspect

from vllm_ahn.errors import AHNError
from vllm_ahn.memory.spec import MEMORIES
from vllm_ahn.tools.tiny.make import DTYPES, MODEL_TYPES, make_tiny

# The parser may carry arguments of the command around this one; these are ours.
_OPTIONS = inspect.signature(make_tiny).parameters.keys() - {"folder"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what `run` reads to `parser`."""
    parser.add_argument("folder", help="where to write: FOLDER/base and FOLDER/ahn, or FOLDER/merged")
    parser.add_argument("--model-type", default="qwen2", choices=list(MODEL_TYPES), help="base architecture")
    parser.add_argument("--memory", default="GatedDeltaNet", choices=list(MEMORIES), help="memory of the AHN")
    parser.add_argument("--seed", type=int, default=0, help="the same seed gives the same files")
    parser.add_argument("--merged", action="store_true", help="write base and AHN into one checkpoint")
    sizes = {"layers": 3, "hidden": 128, "intermediate": 256, "heads": 4, "kv-heads": 2}
    for name, default in sizes.items():
        parser.add_argument(f"--{name}", type=int, default=default, metavar="N")
    parser.add_argument("--head-dim", type=int, metavar="N", help="hidden / heads for qwen2, twice that for qwen3")
    parser.add_argument("--vocab", type=int, default=512, metavar="N", help="tokens, at least 259")
    parser.add_argument("--max-position-embeddings", type=int, default=4096, metavar="N")
    parser.add_argument("--use-q-proj", action="store_true", help="give the memory its own query projection")
    parser.add_argument("--use-router", action="store_true", help="weigh the memory by a gate (use_ahn_router)")
    parser.add_argument("--fa-layer-ids", default="", metavar="N,N", help="layers with plain full attention")
    parser.add_argument("--dtype", default="float32", choices=DTYPES)
    parser.add_argument("--shards", type=int, default=1, metavar="N", help="weight files a checkpoint")


def run(args: argparse.Namespace) -> int:
    """Write what the arguments ask for, print where, and return 0. Raises `AHNError`."""
    options = {name: value for name, value in vars(args).items() if name in _OPTIONS}
    try:
        paths = make_tiny(args.folder, **options)
    except OSError as error:
        raise AHNError(f"make-tiny: {error}") from None
    print(f"base  {paths.base}" if paths.ahn else f"merged  {paths.base}")
    if paths.ahn:
        print(f"ahn   {paths.ahn}")
    ahn = f" --ahn {paths.ahn}" if paths.ahn else ""
    print(f"Serve it: vllm serve {paths.base}{ahn} --ahn-window 64 --ahn-sinks 8 --dtype {args.dtype}")
    return 0
