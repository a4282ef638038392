"""The text that the small model learns: the sources of Python's own standard library, which every Python has.

Files are sorted by name, and every sixteenth is held out. A hash identifies the text: another release of Python has
other sources, and gives another model.

    python examples/small_model/corpus.py FOLDER        writes train.txt and held_out.txt
"""

from __future__ import annotations

import hashlib
import pathlib
import sys
import sysconfig
from dataclasses import dataclass

EXCLUDED = ("test", "tests", "encodings", "site-packages", "dist-packages", "__pycache__", "lib2to3")
"""Folders that not every installation has, or that hold tables rather than text."""

HELD_OUT_EVERY = 16
"""One file in this many is for evaluation."""

MIN_BYTES = 256


@dataclass(frozen=True)
class Corpus:
    """Texts of whole files."""

    train: list[str]
    held_out: list[str]
    sha256: str
    """Of all texts in order."""


def read_corpus() -> Corpus:
    """Read the standard library of the Python that runs this."""
    root = pathlib.Path(sysconfig.get_path("stdlib"))
    texts, digest = [], hashlib.sha256()
    for path in sorted(root.rglob("*.py"), key=lambda path: path.relative_to(root).as_posix()):
        if any(part in EXCLUDED for part in path.relative_to(root).parts[:-1]):
            continue
        text = path.read_text(encoding="utf-8", errors="ignore")
        if len(text) < MIN_BYTES:
            continue
        texts.append(text)
        digest.update(text.encode() + b"\0")
    held_out = texts[HELD_OUT_EVERY - 1 :: HELD_OUT_EVERY]
    train = [text for i, text in enumerate(texts) if i % HELD_OUT_EVERY != HELD_OUT_EVERY - 1]
    return Corpus(train, held_out, digest.hexdigest())


def write_corpus(folder: pathlib.Path) -> Corpus:
    """Write ``train.txt`` and ``held_out.txt``, the texts one after another."""
    corpus = read_corpus()
    folder.mkdir(parents=True, exist_ok=True)
    for name, texts in (("train", corpus.train), ("held_out", corpus.held_out)):
        (folder / f"{name}.txt").write_text("\n".join(texts), encoding="utf-8")
    return corpus


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    print(write_corpus(pathlib.Path(sys.argv[1])).sha256)
