"""Reads names, types and shapes from safetensors files, and values only where asked to."""

from __future__ import annotations

import dataclasses
import json
import pathlib
from collections.abc import Iterable

from safetensors import SafetensorError, safe_open

from vllm_ahn.errors import AHNError, first_line

INDEX_NAME = "model.safetensors.index.json"
FLOAT_DTYPES = ("F64", "F32", "F16", "BF16")

_GIT_LFS = b"version "
"""The first bytes of the pointer that git-lfs puts in a large file's place."""


@dataclasses.dataclass(frozen=True)
class TensorHeader:
    """One tensor of a safetensors file: everything but its values."""

    dtype: str
    shape: tuple[int, ...]
    file: pathlib.Path


def weight_files(folder: pathlib.Path, label: str) -> list[pathlib.Path]:
    """Return the safetensors files of a checkpoint in `folder`: those its index names, else all of them; maybe none.

    Raises `AHNError`, with `label` for the folder, if the index is no index or names a file that is not there.
    """
    index = folder / INDEX_NAME
    if not index.is_file():
        return sorted(folder.glob("*.safetensors"))
    try:
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        names = sorted({str(name) for name in weight_map.values()})
    except (ValueError, KeyError, TypeError, AttributeError, OSError):
        raise AHNError(
            f"{label}/{INDEX_NAME}: not readable, expected JSON with a weight_map from tensors to files"
        ) from None
    for name in names:
        if not (folder / name).is_file():
            raise AHNError(f"{label}/{INDEX_NAME}: weight_map names {name}, expected such a file beside it")
    return [folder / name for name in names]


def read_headers(files: Iterable[pathlib.Path], label: str) -> dict[str, TensorHeader]:
    """Return name -> header of every tensor in `files`.

    Raises:
        AHNError: a file is damaged or something else, or a tensor is in two of them; `label` names their folder.
    """
    headers: dict[str, TensorHeader] = {}
    for file in files:
        for name, header in _read_header(file, f"{label}/{file.name}").items():
            if name in headers:
                raise AHNError(f"{label}: {name} is in {headers[name].file.name} and in {file.name}, expected it once")
            headers[name] = header
    return headers


def _read_header(file: pathlib.Path, label: str) -> dict[str, TensorHeader]:
    try:
        with file.open("rb") as stream:
            if stream.read(len(_GIT_LFS)) == _GIT_LFS:
                raise AHNError(
                    f"{label}: a git-lfs pointer and not the file itself, expected safetensors (git lfs pull)"
                )
        with safe_open(file, framework="numpy") as tensors:  # which allocates nothing for what is not read
            slices = {name: tensors.get_slice(name) for name in tensors.keys()}  # noqa: SIM118
            return {name: TensorHeader(s.get_dtype(), tuple(s.get_shape()), file) for name, s in slices.items()}
    except OSError as error:
        raise AHNError(f"{label}: cannot be read ({first_line(error)})") from None
    except SafetensorError as error:
        # Half a file is the common case, an interrupted copy.
        raise AHNError(f"{label}: truncated, corrupt or no safetensors file ({first_line(error)})") from None


def check_finite(headers: dict[str, TensorHeader], label: str) -> None:
    """Read the values of the tensors in `headers`, one at a time, and raise `AHNError` at the first NaN or inf."""
    import torch

    by_file: dict[pathlib.Path, list[str]] = {}
    for name, header in headers.items():
        by_file.setdefault(header.file, []).append(name)
    for file, names in by_file.items():
        try:
            with safe_open(file, framework="pt") as tensors:
                for name in names:
                    values = tensors.get_tensor(name)
                    if not bool(torch.isfinite(values).all()):
                        what = "NaN" if bool(torch.isnan(values).any()) else "an infinite value"
                        raise AHNError(f"{label}/{file.name}: {name} holds {what}, expected finite numbers")
        except (SafetensorError, OSError) as error:
            raise AHNError(f"{label}/{file.name}: cannot be read as safetensors ({first_line(error)})") from None
