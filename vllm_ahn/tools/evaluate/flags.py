"""Flags that ``vllm-ahn eval`` and ``vllm-ahn perplexity`` share: which methods, and the engine's arguments."""

from __future__ import annotations

import argparse
import json
from typing import Any

from vllm_ahn.config import MAX_LENGTH, parse_length
from vllm_ahn.errors import AHNError
from vllm_ahn.tools.evaluate.methods import BASELINES, check_arguments

_NAMED = ("dtype", "tensor_parallel_size", "gpu_memory_utilization", "kv_cache_memory_bytes")


def add_arguments(parser: argparse.ArgumentParser, baselines: str) -> None:
    """Adds the flags to `parser`.

    Args:
        baselines: those that are run if none are named.
    """
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
        help=f"some of {', '.join(f'{name} ({label})' for name, label in BASELINES.items())}, with commas between, "
        f"or '' for none (default: {baselines})",
    )
    engine = parser.add_argument_group("engine, the same for every method")
    engine.add_argument("--dtype", metavar="NAME", help="as for vllm serve")
    engine.add_argument("--tensor-parallel-size", metavar="N", type=int, help="as for vllm serve")
    engine.add_argument("--gpu-memory-utilization", metavar="SHARE", type=float, help="as for vllm serve")
    engine.add_argument(
        "--kv-cache-memory-bytes",
        metavar="N",
        type=int,
        help="as for vllm serve; say it on a CPU, where vLLM otherwise takes most of the memory",
    )
    engine.add_argument(
        "--engine-args",
        metavar="JSON",
        default="{}",
        help="other arguments of vllm.LLM as an object, such as '{\"enforce_eager\": true}'",
    )


def engine_arguments(args: argparse.Namespace) -> dict[str, Any]:
    """The arguments of `vllm.LLM` that were given; raises `AHNError`."""
    try:
        given = check_arguments(json.loads(args.engine_args))
    except ValueError as error:
        if isinstance(error, AHNError):
            raise
        raise AHNError(f"--engine-args: {args.engine_args!r} is no JSON, expected an object") from None
    for name in _NAMED:
        value = getattr(args, name)
        if value is None:
            continue
        if name in given:
            raise AHNError(f"--{name.replace('_', '-')} and --engine-args both give {name}, expected one of them")
        given[name] = value
    return given


def baselines(args: argparse.Namespace) -> list[str]:
    """The baselines that were named."""
    return [name.strip() for name in args.baselines.split(",") if name.strip()]


def lengths(args: argparse.Namespace) -> dict[str, int | None]:
    """``window`` and ``sinks`` in tokens, None where not given; raises `AHNError`."""
    return {"window": number(args.window, "--window", 1), "sinks": number(args.sinks, "--sinks", 0)}


def number(value: str | None, flag: str, least: int = 1) -> int | None:
    """A whole number from `least`, or None where the flag was not given; raises `AHNError` that names `flag`."""
    found = parse_length(value)
    if found is None:
        return None
    if not isinstance(found, int) or not least <= found <= MAX_LENGTH:
        raise AHNError(f"{flag} is {value!r}, expected a whole number from {least} to {MAX_LENGTH:,}")
    return found


def add_lengths(parser: argparse.ArgumentParser, window: str, sinks: str) -> None:
    """Adds ``--window`` and ``--sinks``, with what they are by default for the help."""
    parser.add_argument("--window", metavar="N", help=f"tokens that a query sees exactly (default: {window})")
    parser.add_argument("--sinks", metavar="N", help=f"tokens at the start that stay visible (default: {sinks})")
