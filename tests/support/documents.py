"""The Markdown pages of the repository: their code blocks, commands, links and the paths that they name."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

from markdown_it import MarkdownIt
from markdown_it.token import Token

from support.paths import ROOT

PAGES = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *(ROOT / "docs").glob("*.md")])
"""The pages whose blocks are checked."""

NAMES_PATHS_IN = (ROOT, ROOT / "vllm_ahn")
"""Where a path in a page may start, beside the page's own folder."""

_REASON = re.compile(r"<!-- not run: (.+?) -->\s*", re.DOTALL)
_PATH = re.compile(r"[\w.-]+(?:/[\w.-]+)*/?")
_PLACEHOLDER = re.compile(r"[A-Z]{2,}")


@dataclasses.dataclass(frozen=True)
class Command:
    """A command line, and what the page says it prints."""

    line: str
    output: str = ""

    @property
    def words(self) -> list[str]:
        """The words of the command without assignments before it and comments after it."""
        words = shlex.split(self.line, comments=True)
        while words and re.fullmatch(r"\w+=\S*", words[0]):
            del words[0]
        return words


@dataclasses.dataclass(frozen=True)
class Block:
    """A fenced block of a page."""

    page: Path
    line: int
    language: str
    text: str
    reason: str | None
    """Why it is not run, from the comment before it."""

    @property
    def where(self) -> str:
        return f"{self.page.name}:{self.line}"

    @property
    def commands(self) -> list[Command]:
        """Of ``bash`` every line is one, of ``console`` those after a "$"; they may go on over several lines."""
        commands: list[Command] = []
        lines = self.text.splitlines()
        while lines:
            line = lines.pop(0)
            if self.language == "console":
                if not line.startswith("$ "):
                    raise ValueError(f"{self.where}: {line!r} is the output of no command")
                line = line[2:]
            while not _is_whole(line) and lines:
                line = f"{line.removesuffix(chr(92))}\n{lines.pop(0)}"
            output = []
            while self.language == "console" and lines and not lines[0].startswith("$ "):
                output.append(lines.pop(0))
            if shlex.split(line, comments=True):
                commands.append(Command(line, "\n".join(output)))
        return commands


def _is_whole(line: str) -> bool:
    try:
        shlex.split(line, comments=True)
    except ValueError:
        return False
    return not line.endswith("\\")


@functools.cache
def _tokens(text: str) -> list[Token]:
    return MarkdownIt("commonmark").enable("table").parse(text)


def blocks(page: Path, text: str | None = None) -> list[Block]:
    """Return the fenced blocks of a page, whose text may be given."""
    tokens = _tokens(page.read_text(encoding="utf-8") if text is None else text)
    found = []
    for before, token in zip([None, *tokens], tokens, strict=False):
        if token.type != "fence":
            continue
        reason = _REASON.fullmatch(before.content) if before is not None and before.type == "html_block" else None
        line = (token.map or [0])[0] + 1
        found.append(Block(page, line, token.info, token.content, reason and reason[1]))
    return found


def links(page: Path, text: str | None = None) -> Iterator[str]:
    """Yield where the links and images of a page lead."""
    for token in _tokens(page.read_text(encoding="utf-8") if text is None else text):
        for child in token.children or ():
            for attribute in ("href", "src"):
                if (target := child.attrGet(attribute)) is not None:
                    yield str(target)


def anchors(page: Path) -> set[str]:
    """Return the anchors of a page's headings, as GitHub makes them."""
    tokens = _tokens(page.read_text(encoding="utf-8"))
    headings = [after.content for token, after in itertools.pairwise(tokens) if token.type == "heading_open"]
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def broken_link(page: Path, target: str) -> str | None:
    """Return what is wrong with a link, None if nothing is; the web is not asked."""
    if re.match(r"https?://", target):
        return None
    name, _, anchor = target.partition("#")
    file = (page.parent / name).resolve() if name else page
    if not file.exists():
        return f"{page.name}: there is no {target}"
    if not file.is_relative_to(ROOT.resolve()):
        return f"{page.name}: {target} leads out of the repository"
    if anchor and anchor not in anchors(file):
        return f"{page.name}: {file.name} has no heading #{anchor}"
    return None


def code_spans(page: Path, text: str | None = None) -> Iterator[str]:
    """Yield what is set as code within a page's paragraphs and tables."""
    for token in _tokens(page.read_text(encoding="utf-8") if text is None else text):
        for child in token.children or ():
            if child.type == "code_inline":
                yield child.content


def named_paths(page: Path, text: str | None = None) -> Iterator[str]:
    """Yield the paths that a page names in code spans: with a slash, and a suffix or a slash at the end."""
    for span in code_spans(page, text):
        is_path = _PATH.fullmatch(span) and "/" in span and (span.endswith("/") or "." in span.rpartition("/")[2])
        if is_path and not _PLACEHOLDER.search(Path(span).stem):
            yield span


def path_exists(page: Path, name: str) -> bool:
    """Whether a path that a page names is in the repository."""
    return any((folder / name).exists() for folder in (page.parent, *NAMES_PATHS_IN))
