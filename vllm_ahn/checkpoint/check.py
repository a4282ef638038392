"""Reads an AHN checkpoint and checks it by itself: its configuration, and its tensors against that."""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Mapping

from vllm_ahn.checkpoint.options import read_config, read_memory, read_options
from vllm_ahn.checkpoint.read import FLOAT_DTYPES, TensorHeader, check_finite, read_headers, weight_files
from vllm_ahn.checkpoint.tensors import AHNOptions, BaseShape, expected_tensors, is_ahn_tensor, unused_tensors
from vllm_ahn.errors import AHNError

_QUANTISED = {"input_scale", "qweight", "qzeros", "scales", "weight_packed", "weight_scale", "weight_scale_inv"}
"""What quantisation tools put beside a layer's weight, or in its place."""


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """An AHN checkpoint, or the AHN in a merged base, whose configuration and tensors were found in order."""

    folder: pathlib.Path
    memory: str
    options: AHNOptions
    shape: BaseShape
    headers: dict[str, TensorHeader]
    """Of the AHN's own tensors; empty if no weights were asked for."""
    merged: bool


def read_checkpoint(
    folder: pathlib.Path, label: str, *, base: tuple[str, BaseShape] | None = None, weights: bool = True
) -> Checkpoint:
    """Read the AHN in `folder` and check its tensors against its own ``config.json``.

    Args:
        folder: where the checkpoint is.
        label: what errors call `folder`.
        base: name and shape of the base that it must have been made for; None: any.
        weights: whether the tensors are looked at; False reads ``config.json`` only.

    Raises:
        AHNError: a bad configuration, damaged files, or tensors that are missing, surplus, misshapen, not floating or
            not finite.
    """
    config = read_config(folder, label)
    memory = read_memory(config, f"{label}/config.json")
    shape = BaseShape.from_config(config, f"{label}/config.json")
    if base is not None:
        # Before the tensors: with another base's AHN every one of them differs, and the config says best why.
        _check_fit(shape, *base, label)
    options = read_options(config, shape, f"{label}/config.json")
    if not weights:
        return Checkpoint(folder, memory, options, shape, {}, merged=False)
    files = weight_files(folder, label)
    if not files:
        raise AHNError(f"{label}: no weights in it, expected *.safetensors files")
    headers = read_headers(files, label)
    merged = any(name.startswith("model.embed_tokens.") for name in headers)  # also a quantised one
    if merged:
        headers = {name: header for name, header in headers.items() if is_ahn_tensor(name)}
    _check_names(headers, memory, shape, options, label)
    _check_types(headers, memory, shape, options, label)
    check_finite(headers, label)
    return Checkpoint(folder, memory, options, shape, headers, merged)


def _check_fit(shape: BaseShape, base: str, expected: BaseShape, label: str) -> None:
    ours, theirs = dataclasses.asdict(shape), dataclasses.asdict(expected)
    different = [f"{name} is {ours[name]}, expected {theirs[name]}" for name in ours if ours[name] != theirs[name]]
    if different:
        raise AHNError(f"{label}/config.json: this AHN was made for another base than {base}: {', '.join(different)}")


def _check_names(
    headers: Mapping[str, TensorHeader], memory: str, shape: BaseShape, options: AHNOptions, label: str
) -> None:
    expected = expected_tensors(memory, shape, options)
    allowed = expected.keys() | unused_tensors(memory, shape, options).keys()
    missing = [name for name in expected if name not in headers]
    surplus = [name for name in headers if name not in allowed]
    for name in surplus:
        if name.rpartition(".")[2] in _QUANTISED:
            raise AHNError(f"{label}: {name} is of a quantised AHN, expected one that is not, whatever its base is")
    problems = []
    if missing:
        problems.append(f"{missing[0]} is missing" + _others(missing))
    if surplus:
        problems.append(f"{surplus[0]} is not among them" + _others(surplus))
    if problems:
        raise AHNError(
            f"{label}: expected the {len(expected)} tensors of a {memory} AHN of "
            f"{shape.num_hidden_layers} layers, but {' and '.join(problems)}"
        )


def _others(names: list[str]) -> str:
    return f" (and {len(names) - 1} more)" if len(names) > 1 else ""


def _check_types(
    headers: Mapping[str, TensorHeader], memory: str, shape: BaseShape, options: AHNOptions, label: str
) -> None:
    shapes = expected_tensors(memory, shape, options) | unused_tensors(memory, shape, options)
    for name, header in headers.items():
        where = f"{label}/{header.file.name}: {name}"
        if header.shape != shapes[name]:
            raise AHNError(f"{where} has shape {list(header.shape)}, expected {list(shapes[name])}")
        if header.dtype not in FLOAT_DTYPES:
            raise AHNError(f"{where} has type {header.dtype}, expected one of {', '.join(FLOAT_DTYPES)}")
