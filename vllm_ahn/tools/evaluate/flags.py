"""What ``vllm-ahn eval`` and ``vllm-ahn perplexity`` share: flags for methods, lengths and the engine, and the run."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vllm_ahn.config import MAX_LENGTH, parse_length
from vllm_ahn.errors import AHNError
from vllm_ahn.tools.evaluate.methods import BASELINES, Base, find_methods
from vllm_ahn.tools.evaluate.plan import Setting, make_plan
from vllm_ahn.tools.evaluate.report import build_report
from vllm_ahn.tools.evaluate.runner import run_plan

_NAMED = ("dtype", "tensor_parallel_size", "gpu_memory_utilization", "kv_cache_memory_bytes")

FIXED_ARGUMENTS = (
    "model", "tokenizer", "revision", "tokenizer_revision", "additional_config", "hf_overrides", "max_model_len",
    "runner", "max_length", "pretrained", "data_parallel_size", "skip_tokenizer_init",
)  # fmt: skip
"""Arguments of `vllm.LLM` that a method or a suite decides, or that one engine a process rules out."""


def add_arguments(parser: argparse.ArgumentParser, *, baselines: str, window: str, sinks: str) -> None:
    """Add the flags to `parser`; the other arguments are the defaults, for the help."""
    parser.add_argument("--window", metavar="N", help=f"tokens that a query sees exactly (default: {window})")
    parser.add_argument("--sinks", metavar="N", help=f"tokens at the start that stay visible (default: {sinks})")
    methods = parser.add_argument_group("methods, a row each")
    methods.add_argument(
        "--ahn",
        metavar="CKPT[@REVISION]",
        action="append",
        default=[],
        help="AHN checkpoint for the base, a folder or a Hugging Face repository; may be given several times. "
        "'none': the baseline window",
    )
    methods.add_argument(
        "--baselines",
        metavar="NAMES",
        default=baselines,
        help=f"some of {', '.join(f'{name} ({label})' for name, label in BASELINES.items())}, separated by commas, "
        f"or '' for none (default: {baselines})",
    )
    engine = parser.add_argument_group("engine, the same for every method")
    engine.add_argument("--dtype", metavar="NAME", help="as in vllm serve")
    engine.add_argument("--tensor-parallel-size", metavar="N", type=int, help="as in vllm serve")
    engine.add_argument("--gpu-memory-utilization", metavar="SHARE", type=float, help="as in vllm serve")
    engine.add_argument(
        "--kv-cache-memory-bytes",
        metavar="N",
        type=int,
        help="as in vllm serve; set it on CPU, where vLLM otherwise takes most of the memory",
    )
    engine.add_argument(
        "--engine-args",
        metavar="JSON",
        default="{}",
        help="other arguments of vllm.LLM as an object, such as '{\"enforce_eager\": true}'",
    )


def engine_arguments(args: argparse.Namespace) -> dict[str, Any]:
    """Return the given arguments of `vllm.LLM`. Raises `AHNError`."""
    try:
        given = json.loads(args.engine_args)
    except ValueError:
        raise AHNError(f"--engine-args: {args.engine_args!r} is no JSON, expected an object") from None
    if not isinstance(given, dict):
        raise AHNError(f'--engine-args: {given!r}, expected a JSON object such as {{"block_size": 32}}')
    if fixed := [name for name in given if name in FIXED_ARGUMENTS]:
        raise AHNError(f"--engine-args: {', '.join(fixed)} is decided by the evaluation, expected other arguments")
    named = {name: value for name in _NAMED if (value := getattr(args, name)) is not None}
    for name in named.keys() & given.keys():
        raise AHNError(f"--{name.replace('_', '-')} and --engine-args both give {name}, expected one of them")
    return {**given, **named}


def lengths(args: argparse.Namespace) -> dict[str, int | None]:
    """Return ``window``, ``sinks`` and ``limit``, None where not given. Raises `AHNError`."""
    return {name: number(args, name, 0 if name == "sinks" else 1) for name in ("window", "sinks", "limit")}


def number(args: argparse.Namespace, name: str, minimum: int = 1) -> int | None:
    """Return the whole number that a flag gives, None if it is not given. Raises `AHNError` below `minimum`."""
    value = getattr(args, name)
    found = parse_length(value)
    if found is None:
        return None
    if not isinstance(found, int) or not minimum <= found <= MAX_LENGTH:
        flag = name.replace("_", "-")
        raise AHNError(f"--{flag} is {value!r}, expected a whole number from {minimum} to {MAX_LENGTH:,}")
    return found


def run(
    args: argparse.Namespace, settings: Sequence[Setting], base: str, given: dict[str, Any], folder: Path
) -> dict[str, Any]:
    """Run `settings` with the flags' methods on `base` and return the report; exit with 130 if interrupted.

    Args:
        given: from `engine_arguments`.
        folder: where answers and results go.
    """
    found = Base.find(base)
    baselines = [name.strip() for name in args.baselines.split(",") if name.strip()]
    rows = make_plan(settings, find_methods(baselines, args.ahn, found), found, given)
    try:
        outcomes = run_plan(rows, folder)
    except KeyboardInterrupt:
        print(f"interrupted: the answers so far are kept; to continue: --output {folder}", file=sys.stderr)
        sys.exit(130)
    return build_report(outcomes, found, args.command_line)
