"""The benchmarks' data sets, JSON lines, from the hub or from a local folder of the same layout.

`DATA_VARIABLE` (or ``data_folder`` in lm-eval's ``--metadata``) names a folder that holds the data sets' repositories
under their own names, as ``hf download --repo-type dataset OWNER/NAME --local-dir FOLDER/OWNER/NAME`` makes it::

    FOLDER/Infinigence/LVEval/cmrc_mixup.zip                       or, unpacked, cmrc_mixup/cmrc_mixup_128k.jsonl
    FOLDER/xinrongzhang2022/InfiniteBench/longbook_qa_eng.jsonl
    FOLDER/THUDM/LongBench/data.zip                                or, unpacked, data/hotpotqa.jsonl

With such a folder the hub is never asked, not even for what the folder lacks.
"""

from __future__ import annotations

import dataclasses
import json
import os
import zipfile
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from vllm_ahn.errors import AHNError, first_line

DATA_VARIABLE = "AHN_EVAL_DATA"


@dataclasses.dataclass(frozen=True)
class DataFile:
    """Where one set of a benchmark lies."""

    repository: str
    """The data set on the hub, ``OWNER/NAME``."""

    path: str
    """The JSON lines in the unpacked repository."""

    archive: str | None = None
    """The zip file in the repository that holds them, None if they are not packed."""

    def local(self, root: Path) -> Path:
        """Return this file, or else its archive, in the local folder `root`. Raises `AHNError` if neither is there."""
        names = [name for name in (self.path, self.archive) if name]
        for name in names:
            if (path := root / self.repository / name).is_file():
                return path
        raise AHNError(
            f"{root / self.repository}: no {' and no '.join(names)}, expected one of the data set's own files"
        )


def data_root(folder: str | None) -> Path | None:
    """Return the local data folder: `folder`, or what `DATA_VARIABLE` names, or None for the hub."""
    root = folder or os.environ.get(DATA_VARIABLE)
    return Path(root) if root else None


def read_records(file: DataFile, fields: Sequence[str], folder: str | None = None) -> list[dict[str, Any]]:
    """Read the records of `file`, JSON objects that each have all of `fields`.

    Args:
        folder: for `data_root`.

    Raises:
        AHNError: the file is missing or holds something else.
    """
    root = data_root(folder)
    found = file.local(root) if root else _download(file)
    name, text = str(found), found.read_bytes()
    if found.suffix == ".zip":
        name, text = f"{found}, {file.path}", _unzip(found, PurePosixPath(file.path).name)
    records = []
    for number, line in enumerate(text.split(b"\n"), 1):
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


def _download(file: DataFile) -> Path:
    import huggingface_hub

    name = file.archive or file.path
    try:
        return Path(huggingface_hub.hf_hub_download(file.repository, name, repo_type="dataset"))
    except Exception as error:  # from the network, the disk or the hub's client
        raise AHNError(
            f"{file.repository}: fetching {name} from the hub failed ({first_line(error)}), "
            f"and {DATA_VARIABLE} names no folder to read it from"
        ) from error


def _unzip(path: Path, name: str) -> bytes:
    # By the file's name alone: archives of the same data differ in the folders around it.
    try:
        with zipfile.ZipFile(path) as archive:
            found = [m for m in archive.namelist() if PurePosixPath(m).name == name and not m.startswith("__MACOSX/")]
            if len(found) != 1:
                raise AHNError(f"{path}: {len(found)} files called {name}, expected one")
            return archive.read(found[0])
    except zipfile.BadZipFile as error:
        raise AHNError(f"{path}: not a zip file ({error})") from error
