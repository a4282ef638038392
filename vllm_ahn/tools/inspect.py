"""``vllm-ahn inspect CKPT``: what an AHN checkpoint is, which base it fits, and what serving it would use."""

from __future__ import annotations

import argparse
import collections
import dataclasses
import json
import math
import pathlib
import re
from collections.abc import Iterable
from typing import Any

from vllm_ahn import published
from vllm_ahn.checkpoint import Checkpoint, local_folder, read_checkpoint
from vllm_ahn.checkpoint.find import split_revision
from vllm_ahn.checkpoint.tensors import (
    PUBLISHED_SIZES,
    AHNOptions,
    BaseShape,
    count_parameters,
    expected_tensors,
    state_bytes,
)
from vllm_ahn.config import DEFAULT_SINKS, DEFAULT_WINDOW, STATE_DTYPES
from vllm_ahn.errors import AHNError
from vllm_ahn.tools.arguments import add_state_dtype


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what `run` reads to `parser`."""
    parser.add_argument("checkpoint", help="folder or hub repository (REPOSITORY@REVISION for a revision)")
    add_state_dtype(parser)
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(args: argparse.Namespace) -> int:
    """Print `describe` of ``args.checkpoint`` and return 0. Raises `AHNError` if it is not a valid AHN checkpoint."""
    checkpoint, problem = find_checkpoint(args.checkpoint)
    report = describe(checkpoint, args.checkpoint, args.state_dtype, problem)
    print(json.dumps(report, indent=2) if args.json else _format(report))
    return 0


def find_checkpoint(name: str) -> tuple[Checkpoint, str | None]:
    """Read the checkpoint `name` and check it.

    Returns:
        The checkpoint, and None. For a published one whose files are out of reach: what it holds by the table of
        published models, without ``headers``, and why the files could not be read.

    Raises:
        AHNError: `name` cannot be found, or is not a valid AHN checkpoint.
    """
    base = published.find_base(name)
    if base is not None:
        example = next(ahn.name for ahn in published.AHNS.values() if ahn.base == base)
        raise AHNError(f"{name}: a base model, without an AHN, expected an AHN checkpoint, such as {example}")
    try:
        repository, revision = split_revision(name)
        folder = local_folder(repository, revision)
    except AHNError as error:
        ahn = published.find_ahn(name)
        if ahn is None:
            raise
        shape = BaseShape.from_config(ahn.config)
        known = Checkpoint(pathlib.Path(name), ahn.memory, AHNOptions(), shape, {}, merged=False)
        return known, str(error).removeprefix(f"{name}: ")
    return read_checkpoint(folder, name), None


def describe(
    checkpoint: Checkpoint, name: str, state_dtype: str = STATE_DTYPES[0], problem: str | None = None
) -> dict[str, Any]:
    """Return everything `run` prints, as JSON values: parameters in numbers, lengths in tokens, sizes in bytes.

    Args:
        checkpoint: what is described.
        name: as the user gave it.
        state_dtype: one of `STATE_DTYPES`.
        problem: why the files were not read, where `find_checkpoint` says so.
    """
    import torch

    shape, options = checkpoint.shape, checkpoint.options
    used = expected_tensors(checkpoint.memory, shape, options)
    found = {name: header.shape for name, header in checkpoint.headers.items()} if problem is None else used
    parameters = count_parameters(checkpoint.memory, shape, options)
    lossless = DEFAULT_WINDOW + DEFAULT_SINKS
    return {
        "checkpoint": name,
        "files_read": problem is None,
        "files_problem": problem,
        "memory": checkpoint.memory,
        "merged": checkpoint.merged,
        "options": {
            "use_q_proj": options.use_q_proj,
            "use_ahn_router": options.use_router,
            "fa_layer_ids": list(options.full_attention_layers),
        },
        "base": {**dataclasses.asdict(shape), "name": PUBLISHED_SIZES.get(shape)},
        "tensors": _patterns(found, used),
        "tensor_types": dict(collections.Counter(header.dtype for header in checkpoint.headers.values())),
        "parameters": parameters,
        "parameters_millions": round(parameters / 1e6, 1),
        "unused_parameters": sum(math.prod(dims) for tensor, dims in found.items() if tensor not in used),
        "serving": {
            "window": DEFAULT_WINDOW,
            "sinks": DEFAULT_SINKS,
            "lossless_tokens": lossless,
            "max_model_len": 4 * lossless,
            "state_shape_per_layer": [shape.num_attention_heads, shape.head_dim, shape.head_dim],
            "state_dtype": state_dtype,
            "state_bytes_per_sequence": state_bytes(shape, options, getattr(torch, state_dtype).itemsize),
        },
    }


def _patterns(found: dict[str, tuple[int, ...]], used: Iterable[str]) -> list[dict[str, Any]]:
    # A checkpoint repeats the same few tensors in every layer: one line for each of these, and one more where only
    # some layers use it.
    layers: collections.Counter[tuple[str, bool, tuple[int, ...]]] = collections.Counter()
    for tensor, shape in found.items():
        layers[re.sub(r"\.layers\.\d+\.", ".layers.N.", tensor), tensor in used, shape] += 1
    return [
        {"name": name, "shape": list(shape), "layers": count, "used": is_used}
        for (name, is_used, shape), count in sorted(layers.items())
    ]


def _format(report: dict[str, Any]) -> str:
    base, serving, problem = report["base"], report["serving"], report["files_problem"]
    merged = "base and AHN (merged): serve it as the model, without --ahn"
    million = f"{report['parameters'] / 1e6:.1f} million ({report['parameters']:,})"
    unused = f", and {report['unused_parameters']:,} that nothing uses" if report["unused_parameters"] else ""
    types = ", ".join(f"{count} of {dtype}" for dtype, count in report["tensor_types"].items())
    lines = [
        ("checkpoint", report["checkpoint"]),
        ("memory", report["memory"]),
        ("holds", merged if report["merged"] else "AHN only: serve its base with --ahn"),
        ("options", _format_options(report["options"])),
        ("parameters", million + unused),
        ("tensors", types or "expected, by the table of published models"),
    ]
    for entry in report["tensors"]:
        note = "" if entry["used"] else ", unused"
        plural = "" if entry["layers"] == 1 else "s"
        lines.append(("", f"{entry['name']}  {entry['shape']}  in {entry['layers']} layer{plural}{note}"))
    heads = f"{base['num_attention_heads']} heads, {base['num_key_value_heads']} key/value heads"
    state = f"{_format_size(serving['state_bytes_per_sequence'])} for each sequence longer than that"
    lines += [
        ("fits", f"{base['name'] or 'any base'} with model_type {base['model_type']},"),
        ("", f"{base['num_hidden_layers']} layers, hidden size {base['hidden_size']},"),
        ("", f"{heads}, head size {base['head_dim']}"),
        ("serving", f"window {serving['window']:,} tokens (--ahn-window)"),
        ("", f"sinks {serving['sinks']:,} tokens (--ahn-sinks)"),
        ("", f"lossless up to {serving['lossless_tokens']:,} tokens, through the memory beyond"),
        ("", f"max_model_len {serving['max_model_len']:,}, or the base's own if larger (--max-model-len)"),
        ("state", state),
        ("", f"{serving['state_shape_per_layer']} in {serving['state_dtype']} in each layer with an AHN"),
    ]
    if problem is not None:
        lines.insert(1, ("files", f"not read, so none of this was checked against them: {problem}"))
    return "\n".join(f"{key:<12}{value}" for key, value in lines)


def _format_options(options: dict[str, Any]) -> str:
    on = [name for name in ("use_q_proj", "use_ahn_router") if options[name]]
    if options["fa_layer_ids"]:
        on.append(f"full attention in layers {', '.join(map(str, options['fa_layer_ids']))}")
    return ", ".join(on) or "none"


def _format_size(count: int) -> str:
    return f"{count / 2**20:.1f} MiB" if count >= 2**20 else f"{count / 2**10:.1f} KiB"
