"""Reads what the ``config.json`` of an AHN checkpoint, or of a base with a merged AHN, says about the AHN."""

from __future__ import annotations

import json
import pathlib
from collections.abc import Mapping
from typing import Any

from vllm_ahn.bases import BASES
from vllm_ahn.checkpoint.tensors import AHNOptions, BaseShape
from vllm_ahn.config import check_q_proj
from vllm_ahn.errors import AHNError
from vllm_ahn.memory.spec import MEMORIES


def read_config(folder: pathlib.Path, label: str) -> dict[str, Any]:
    """Read the ``config.json`` in `folder`. Raises `AHNError`, with `label` for the folder, if it cannot be read."""
    path = folder / "config.json"
    if not path.exists():
        raise AHNError(f"{label}: no config.json in it, expected the folder or repository of a checkpoint")
    return read_config_file(path, f"{label}/config.json")


def read_config_file(path: pathlib.Path, label: str) -> dict[str, Any]:
    """Read the configuration in the file `path`. Raises `AHNError`, with `label` for the file, if it is none."""
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError):
        raise AHNError(f"{label}: not readable, expected a JSON object") from None
    if not isinstance(config, dict):
        raise AHNError(f"{label}: holds {type(config).__name__}, expected a JSON object")
    return config


def read_memory(config: Mapping[str, Any], label: str) -> str:
    """Read ``_ahn_implementation``, one of `MEMORIES`.

    Raises `AHNError` for any other, and where ``_layer_implementation`` is of another base.

    ``sliding_window``, ``num_attn_sinks`` and ``dy_*`` are what a checkpoint was trained with, and
    ``sliding_window`` a leftover even of that (256 in the published ones): nobody serves with these, so
    nothing here reads them.
    """
    memory = config.get("_ahn_implementation")
    expected = f"expected one of {', '.join(MEMORIES)}"
    if memory is None:
        raise AHNError(f"{label}: no _ahn_implementation, so this is no AHN checkpoint; {expected}")
    if memory not in MEMORIES:
        raise AHNError(f"{label}: _ahn_implementation is {memory!r}, {expected}")
    layer = config.get("_layer_implementation")
    if layer is not None:
        base = next((base for base in BASES if base.layer_implementation == layer), None)
        if base is None:
            known = ", ".join(base.layer_implementation for base in BASES)
            raise AHNError(f"{label}: _layer_implementation is {layer!r}, expected one of {known}")
        if base.model_type != config.get("model_type"):
            raise AHNError(
                f"{label}: _layer_implementation is {layer}, but model_type is {config.get('model_type')!r}, "
                f"expected {base.model_type!r}"
            )
    return str(memory)


def read_options(config: Mapping[str, Any], shape: BaseShape, label: str) -> AHNOptions:
    """Read ``use_q_proj``, ``use_ahn_router`` and ``fa_layer_ids``, each off if absent; `AHNError` for what is none."""
    flags = {}
    for key in ("use_q_proj", "use_ahn_router"):
        value = config.get(key)
        if value is not None and not isinstance(value, bool):
            raise AHNError(f"{label}: {key} is {value!r}, expected true or false")
        flags[key] = bool(value)
    if flags["use_q_proj"]:
        check_q_proj(config.get("_ahn_implementation"), label)
    layers = _layer_numbers(config.get("fa_layer_ids"), shape.num_hidden_layers, label)
    return AHNOptions(flags["use_q_proj"], flags["use_ahn_router"], layers)


def _layer_numbers(value: object, layers: int, label: str) -> tuple[int, ...]:
    parts: list[object] = []
    if isinstance(value, str):
        parts = [part.strip() for part in value.split(",") if part.strip()]
    elif isinstance(value, (list, tuple)):
        parts = list(value)
    elif value is not None:
        parts = [value]
    numbers = set()
    for part in parts:
        if isinstance(part, str) and part.isascii() and part.isdigit():
            part = int(part)
        if not isinstance(part, int) or isinstance(part, bool) or not 0 <= part < layers:
            raise AHNError(
                f"{label}: fa_layer_ids is {value!r}, expected layer numbers from 0 to {layers - 1}, "
                f'as in "0,{layers - 1}"'
            )
        numbers.add(part)
    if len(numbers) == layers:
        raise AHNError(f"{label}: fa_layer_ids names all {layers} layers, expected at least one layer with an AHN")
    return tuple(sorted(numbers))
