"""The texts whose perplexity is measured: the user's files, or a book of PG19, cut into stretches of tokens."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from vllm_ahn.errors import AHNError, first_line
from vllm_ahn.tools.evaluate.data import data_root

PG19 = "emozilla/pg19-test"
"""PG19's test books as a data set on the hub, with the fields ``short_book_title`` and ``text``."""


@dataclasses.dataclass(frozen=True)
class Stretch:
    """A piece of text that is read from its start."""

    source: str
    tokens: list[int]
    sizes: list[int]
    """UTF-8 bytes of each token."""


def read_stretches(
    tokenizer: Any, files: Sequence[str] | None, data: str | None, context: int, limit: int | None
) -> list[Stretch]:
    """Read the first `limit` stretches of `context` tokens.

    Args:
        files: text files to read whole, or None for the first book of PG19 that is long enough.
        data: the folder to read PG19 from, for `data.data_root`.

    Raises:
        AHNError: there is no text to read.
    """
    if files is None:
        return [longest_book(tokenizer, books(data), context)]
    found = [piece for name in files for piece in cut_text(tokenizer, Path(name).name, read_text(name), context)]
    if not found:
        raise AHNError(f"--text: {', '.join(files)} holds less than two tokens, expected text")
    return found[:limit]


def cut_text(tokenizer: Any, source: str, text: str, context: int) -> list[Stretch]:
    """Cut `text` into stretches of `context` tokens, the last one shorter; without special tokens."""
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    tokens, sizes = encoded["input_ids"], token_bytes(text, [end for _, end in encoded["offset_mapping"]])
    starts = range(0, len(tokens), context)
    pieces = [Stretch(source, tokens[start : start + context], sizes[start : start + context]) for start in starts]
    return [piece for piece in pieces if len(piece.tokens) > 1]  # the first token is predicted from nothing


def token_bytes(text: str, ends: Sequence[int]) -> list[int]:
    """Return the UTF-8 bytes of each token of `text`, given where it ends, in characters.

    The bytes of a character that several tokens share count for the first of them, so that sums are right.
    """
    sizes, before = [], 0
    for end in ends:
        sizes.append(len(text[before:end].encode("utf-8", "surrogatepass")))
        before = max(before, end)
    return sizes


def longest_book(tokenizer: Any, books: Iterable[tuple[str, str]], context: int) -> Stretch:
    """Return the first `context` tokens of the first book that has so many, or the longest book if none has.

    Args:
        books: title and text.
    """
    best: Stretch | None = None
    for title, text in books:
        for stretch in cut_text(tokenizer, title, text, context)[:1]:
            if len(stretch.tokens) == context:
                return stretch
            if best is None or len(stretch.tokens) > len(best.tokens):
                best = stretch
    if best is None:
        raise AHNError("pg19: no text in the data, expected books")
    return best


def read_text(name: str) -> str:
    """Read a text file. Raises `AHNError` if it cannot be read or is not UTF-8."""
    try:
        return Path(name).read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or "it is not UTF-8"
        raise AHNError(f"--text: {name} cannot be read ({reason}), expected a text file") from None


def pg19_folder(data: str | None) -> Path | None:
    """Return where PG19 lies in the local data folder, None for the hub. Raises `AHNError` if it is missing there."""
    root = data_root(data)
    if root is None:
        return None
    folder = root / PG19
    if not folder.is_dir():
        raise AHNError(f"{folder}: no such folder, expected the data set {PG19}, or text files, one a book")
    return folder


def books(data: str | None) -> Iterator[tuple[str, str]]:
    """Yield title and text of PG19's test books: text files or a data set in `pg19_folder`, or the hub's data set."""
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
        raise AHNError(
            f"{folder or PG19}: reading the data set failed ({first_line(error)}), expected a split test with the "
            "field text"
        ) from error
