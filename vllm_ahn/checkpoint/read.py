"""Reads names, types and shapes from the first bytes of safetensors files, and values only where asked to.

The format (https://github.com/huggingface/safetensors): 8 bytes, little endian, the length n of the header; n
bytes of JSON, ``{name: {"dtype", "shape", "data_offsets": [begin, end]}}``; then the data, which offsets
count from its start.
"""

from __future__ import annotations

import dataclasses
import json
import math
import pathlib
import struct
from collections.abc import Iterable

from vllm_ahn.errors import AHNError

INDEX_NAME = "model.safetensors.index.json"
FLOAT_DTYPES = ("F64", "F32", "F16", "BF16")

_ELEMENT_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}
_LONGEST_HEADER = 100_000_000  # bytes; the format's own limit


@dataclasses.dataclass(frozen=True)
class TensorHeader:
    """One tensor of a safetensors file: everything but its values."""

    dtype: str
    shape: tuple[int, ...]
    file: pathlib.Path


def weight_files(folder: pathlib.Path, label: str) -> list[pathlib.Path]:
    """The safetensors files of a checkpoint in `folder`: those its index names, else all of them; maybe none.

    Raises `AHNError`, with `label` for the folder, if the index is no index or names a file that is not
    there.
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
    """Name -> header of every tensor in `files`. Raises `AHNError` for a damaged file and for a tensor met
    twice."""
    headers: dict[str, TensorHeader] = {}
    for file in files:
        for name, header in _read_header(file, f"{label}/{file.name}").items():
            if name in headers:
                raise AHNError(f"{label}: {name} is in {headers[name].file.name} and in {file.name}, expected it once")
            headers[name] = header
    return headers


def check_finite(headers: dict[str, TensorHeader], label: str) -> None:
    """Reads the values of the tensors in `headers`, one tensor at a time; raises `AHNError` at the first NaN
    or inf."""
    import torch
    from safetensors import SafetensorError, safe_open

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
            raise AHNError(f"{label}/{file.name}: cannot be read as safetensors ({_one_line(error)})") from None


def _read_header(file: pathlib.Path, label: str) -> dict[str, TensorHeader]:
    try:
        size = file.stat().st_size
        with file.open("rb") as stream:
            first = stream.read(8)
            if first == b"version ":  # a pointer that git-lfs puts in a large file's place
                raise AHNError(
                    f"{label}: a git-lfs pointer and not the file itself, expected safetensors (git lfs pull)"
                )
            length = struct.unpack("<Q", first)[0] if len(first) == 8 else 0
            # Half a file is the common case (an interrupted copy), and the header says how much should be
            # there.
            if not 2 <= length <= min(size - 8, _LONGEST_HEADER):
                raise AHNError(f"{label}: truncated or no safetensors file: {size:,} bytes, with no whole header")
            entries = json.loads(stream.read(length))
    except OSError as error:
        raise AHNError(f"{label}: cannot be read ({_one_line(error)})") from None
    except ValueError as error:
        if isinstance(error, AHNError):
            raise
        raise AHNError(f"{label}: corrupt safetensors file, its header is not JSON") from None
    try:
        return _parse(entries, file, label, data_bytes=size - 8 - length)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        if isinstance(error, AHNError):
            raise
        raise AHNError(f"{label}: corrupt safetensors file, its header lacks dtype, shape or data_offsets") from None


def _parse(entries: object, file: pathlib.Path, label: str, data_bytes: int) -> dict[str, TensorHeader]:
    if not isinstance(entries, dict):
        raise TypeError
    headers: dict[str, TensorHeader] = {}
    end_of_data = 0
    for name, entry in entries.items():
        if name == "__metadata__":
            continue
        dtype = str(entry["dtype"])
        shape = tuple(int(n) for n in entry["shape"])
        begin, end = (int(n) for n in entry["data_offsets"])
        wanted = math.prod(shape) * _ELEMENT_BYTES[dtype] if dtype in _ELEMENT_BYTES else end - begin
        if begin < 0 or end - begin != wanted:
            raise AHNError(
                f"{label}: corrupt safetensors file, {name} has {end - begin:,} bytes, "
                f"expected {wanted:,} for {dtype} {list(shape)}"
            )
        end_of_data = max(end_of_data, end)
        headers[name] = TensorHeader(dtype, shape, file)
    if data_bytes != end_of_data:
        state = "truncated" if data_bytes < end_of_data else "corrupt"
        raise AHNError(
            f"{label}: {state} safetensors file, with {data_bytes:,} bytes of tensors, "
            f"expected {end_of_data:,} by its header"
        )
    return headers


def _one_line(error: BaseException) -> str:
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__
