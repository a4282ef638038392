"""The texts whose perplexity is measured: the user's files, or a book of PG19."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from vllm_ahn.errors import AHNError
from vllm_ahn.tools.evaluate.data import DATA_VARIABLE
from vllm_ahn.tools.evaluate.perplexity import Stretch, cut_text, longest_book

PG19 = "emozilla/pg19-test"
"""The test books of PG19 as a data set on the hub, with the fields ``short_book_title`` and ``text``."""


def read(tokenizer: Any, questions: Mapping[str, Any]) -> list[Stretch]:
    """The stretches that a job asks for.

    Args:
        questions: ``context``, tokens of a stretch; ``texts``, files to read whole, or None for the first book of
            PG19 that is long enough; ``data``, the folder to read PG19 from, or None for the hub; ``limit``, the most
            stretches, or None.

    Raises:
        AHNError: there is no text to be read.
    """
    context = questions["context"]
    if questions["texts"] is None:
        return [longest_book(tokenizer, books(questions["data"]), context)]
    stretches = []
    for name in questions["texts"]:
        stretches += cut_text(tokenizer, Path(name).name, read_text(name), context)
    if not stretches:
        raise AHNError(f"--text: {', '.join(questions['texts'])} holds less than two tokens, expected text")
    return stretches[: questions["limit"]]


def read_text(name: str) -> str:
    """The text of a file; raises `AHNError` if it is none."""
    try:
        return Path(name).read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or "it is not UTF-8"
        raise AHNError(f"--text: {name} cannot be read ({reason}), expected a text file") from None


def pg19_folder(data: str | None) -> Path | None:
    """Where PG19 lies in the local data, None for the hub; raises `AHNError` if it is not there."""
    root = data or os.environ.get(DATA_VARIABLE)
    if not root:
        return None
    folder = Path(root) / PG19
    if not folder.is_dir():
        raise AHNError(f"{folder}: no such folder, expected the data set {PG19}, or text files, one a book")
    return folder


def books(data: str | None) -> Iterator[tuple[str, str]]:
    """Title and text of PG19's test books: text files in ``FOLDER/emozilla/pg19-test``, or the data set that lies
    there, or (None) on the hub."""
    folder = pg19_folder(data)
    if folder is not None and (files := sorted(folder.glob("*.txt"))):
        for file in files:
            yield file.stem, read_text(str(file))
        return
    from datasets import load_dataset

    try:
        rows = load_dataset(str(folder or PG19), split="test", streaming=folder is None)
        for row in rows:
            yield str(row.get("short_book_title", "?")), row["text"]
    except Exception as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise AHNError(
            f"{folder or PG19}: reading the data set failed ({reason}), expected a split test with the field text"
        ) from error
