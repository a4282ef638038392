"""Reads the benchmarks' data sets, JSON lines, from the hub or from a local folder of the same layout.

`DATA_VARIABLE` (or ``data_folder`` in lm-eval's ``--metadata``) names a folder that holds the data sets' repositories
under their own names, as ``hf download --repo-type dataset OWNER/NAME --local-dir FOLDER/OWNER/NAME`` makes it::

    FOLDER/Infinigence/LVEval/cmrc_mixup.zip                       or, unpacked, cmrc_mixup/cmrc_mixup_128k.jsonl
    FOLDER/xinrongzhang2022/InfiniteBench/longbook_qa_eng.jsonl
    FOLDER/THUDM/LongBench/data.zip                                or, unpacked, data/hotpotqa.jsonl

With such a folder nothing is asked of the hub, also for what the folder lacks.
"""

from __future__ import annotations

import dataclasses
import io
import json
import os
import zipfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from vllm_ahn.errors import AHNError

DATA_VARIABLE = "AHN_EVAL_DATA"


@dataclasses.dataclass(frozen=True)
class DataFile:
    """Where one set of a benchmark lies."""

    repository: str
    """Of the data set on the hub, ``OWNER/NAME``."""

    path: str
    """Of the JSON lines in the unpacked repository."""

    archive: str | None = None
    """The zip file in the repository that holds them; None: they lie in it unpacked."""


def read_records(file: DataFile, fields: Sequence[str], folder: str | None = None) -> list[dict[str, Any]]:
    """The records of `file`, each a JSON object that has all of `fields`.

    Args:
        folder: the local folder; None: the one that `DATA_VARIABLE` names, or if it is not set the hub.

    Raises:
        AHNError: there is no such file, or something else in it.
    """
    root = folder or os.environ.get(DATA_VARIABLE)
    found = local_file(Path(root), file) if root else _download(file)
    if found.suffix != ".zip":
        with found.open(encoding="utf-8") as lines:
            return _parse(lines, str(found), fields)
    try:
        with zipfile.ZipFile(found) as archive, archive.open(_member(archive, found, file)) as binary:
            return _parse(io.TextIOWrapper(binary, encoding="utf-8"), f"{found}, {file.path}", fields)
    except zipfile.BadZipFile as error:
        raise AHNError(f"{found}: not a zip file ({error})") from error


def data_folder(metadata: Mapping[str, Any]) -> str | None:
    """``data_folder`` of lm-eval's metadata; raises `AHNError` if it is no text."""
    folder = metadata.get("data_folder")
    if folder is not None and not isinstance(folder, str):
        raise AHNError(f"metadata: data_folder is {folder!r}, expected the path of a folder")
    return folder


def local_file(root: Path, file: DataFile) -> Path:
    """`file`, or the archive that holds it, in the local folder `root`; raises `AHNError` if neither is there."""
    names = [file.path, *([file.archive] if file.archive else [])]
    for name in names:
        if (path := root / file.repository / name).is_file():
            return path
    raise AHNError(f"{root / file.repository}: no {' and no '.join(names)}, expected one of the data set's own files")


def _download(file: DataFile) -> Path:
    import huggingface_hub

    name = file.archive or file.path
    try:
        return Path(huggingface_hub.hf_hub_download(file.repository, name, repo_type="dataset"))
    except Exception as error:  # whatever the network, the disk or the hub's client comes up with
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise AHNError(
            f"{file.repository}: fetching {name} from the hub failed ({reason}), "
            f"and {DATA_VARIABLE} names no folder to read it from"
        ) from error


def _member(archive: zipfile.ZipFile, path: Path, file: DataFile) -> str:
    # By its last part: archives of the same data differ in the folders around it.
    wanted = PurePosixPath(file.path).name
    members = [m for m in archive.namelist() if PurePosixPath(m).name == wanted and not m.startswith("__MACOSX/")]
    if len(members) != 1:
        raise AHNError(f"{path}: {len(members)} files called {wanted}, expected one")
    return members[0]


def _parse(lines: Iterable[str], name: str, fields: Sequence[str]) -> list[dict[str, Any]]:
    records = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except ValueError as error:
            raise AHNError(f"{name}, line {number}: no JSON ({error})") from error
        if not isinstance(record, dict):
            raise AHNError(f"{name}, line {number}: {type(record).__name__}, expected a JSON object")
        if missing := [field for field in fields if field not in record]:
            raise AHNError(f"{name}, line {number}: no field {', '.join(missing)}")
        records.append(record)
    if not records:
        raise AHNError(f"{name}: no records, expected JSON lines")
    return records
