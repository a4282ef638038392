"""``vllm-ahn inspect CKPT``: what an AHN checkpoint is, which base it fits, and what serving it would use."""

from __future__ import annotations

import argparse
import collections
import dataclasses
import json
import math
import re
import sys
from typing import Any

from vllm_ahn.checkpoint import Checkpoint, local_folder, read_checkpoint
from vllm_ahn.checkpoint.find import split_revision
from vllm_ahn.checkpoint.tensors import PUBLISHED_SIZES, count_parameters, expected_tensors, state_bytes
from vllm_ahn.config import DEFAULT_SINKS, DEFAULT_WINDOW
from vllm_ahn.errors import AHNError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds what `run` reads to `parser`."""
    parser.add_argument("checkpoint", help="folder or hub repository (REPOSITORY@REVISION for a revision)")
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(args: argparse.Namespace) -> int:
    """Prints `describe` of ``args.checkpoint``; returns 0, or 1 after a sentence on stderr if it is no good
    AHN."""
    try:
        name, revision = split_revision(args.checkpoint)
        report = describe(read_checkpoint(local_folder(name, revision), args.checkpoint), args.checkpoint)
    except AHNError as error:
        print(error, file=sys.stderr)
        return 1
    print(json.dumps(report, indent=2) if args.json else _text(report))
    return 0


def describe(checkpoint: Checkpoint, name: str) -> dict[str, Any]:
    """Everything `run` prints, as JSON values: parameters in numbers, lengths in tokens, sizes in bytes."""
    shape, options = checkpoint.shape, checkpoint.options
    used = expected_tensors(checkpoint.memory, shape, options)
    unused = [header for tensor, header in checkpoint.headers.items() if tensor not in used]
    parameters = count_parameters(checkpoint.memory, shape, options)
    lossless = DEFAULT_WINDOW + DEFAULT_SINKS
    return {
        "checkpoint": name,
        "memory": checkpoint.memory,
        "merged": checkpoint.merged,
        "options": {
            "use_q_proj": options.use_q_proj,
            "use_ahn_router": options.use_router,
            "fa_layer_ids": list(options.full_attention_layers),
        },
        "base": {**dataclasses.asdict(shape), "name": PUBLISHED_SIZES.get(shape)},
        "tensors": _tensor_patterns(checkpoint, used),
        "tensor_types": dict(collections.Counter(header.dtype for header in checkpoint.headers.values())),
        "parameters": parameters,
        "parameters_millions": round(parameters / 1e6, 1),
        "unused_parameters": sum(math.prod(header.shape) for header in unused),
        "serving": {
            "window": DEFAULT_WINDOW,
            "sinks": DEFAULT_SINKS,
            "lossless_tokens": lossless,
            "max_model_len": 4 * lossless,
            "state_shape_per_layer": [shape.num_attention_heads, shape.head_dim, shape.head_dim],
            "state_dtype": "float32",
            "state_bytes_per_sequence": state_bytes(shape, options),
        },
    }


def _tensor_patterns(checkpoint: Checkpoint, used: dict[str, tuple[int, ...]]) -> list[dict[str, Any]]:
    # A checkpoint repeats the same few tensors in every layer: one line for each of these, not for each
    # tensor.
    patterns: dict[str, dict[str, Any]] = {}
    for tensor, header in checkpoint.headers.items():
        pattern = re.sub(r"\.layers\.\d+\.", ".layers.N.", tensor)
        entry = patterns.setdefault(pattern, {"name": pattern, "shape": list(header.shape), "layers": 0, "used": False})
        entry["layers"] += 1
        entry["used"] |= tensor in used
    return sorted(patterns.values(), key=lambda entry: str(entry["name"]))


def _text(report: dict[str, Any]) -> str:
    base, serving = report["base"], report["serving"]
    merged = "base and AHN (merged): serve it as the model, without --ahn"
    million = f"{report['parameters'] / 1e6:.1f} million ({report['parameters']:,})"
    unused = f", and {report['unused_parameters']:,} that nothing uses" if report["unused_parameters"] else ""
    lines = [
        ("checkpoint", report["checkpoint"]),
        ("memory", report["memory"]),
        ("holds", merged if report["merged"] else "AHN only: serve its base with --ahn"),
        ("options", _options_text(report["options"])),
        ("parameters", million + unused),
        ("tensors", ", ".join(f"{count} of {dtype}" for dtype, count in report["tensor_types"].items())),
    ]
    for entry in report["tensors"]:
        note = "" if entry["used"] else ", unused"
        lines.append(("", f"{entry['name']}  {entry['shape']}  in {entry['layers']} layers{note}"))
    heads = f"{base['num_attention_heads']} heads, {base['num_key_value_heads']} key/value heads"
    state = f"{_size(serving['state_bytes_per_sequence'])} for each sequence longer than that"
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
    return "\n".join(f"{key:<12}{value}" for key, value in lines)


def _options_text(options: dict[str, Any]) -> str:
    on = [name for name in ("use_q_proj", "use_ahn_router") if options[name]]
    if options["fa_layer_ids"]:
        on.append(f"full attention in layers {', '.join(map(str, options['fa_layer_ids']))}")
    return ", ".join(on) or "none"


def _size(count: int) -> str:
    return f"{count / 2**20:.1f} MiB" if count >= 2**20 else f"{count / 2**10:.1f} KiB"
