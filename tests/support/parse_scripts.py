"""Command lines of Python programs, held against the programs' own argument parsers: ``parse_scripts.py`` < JSON.

Reads a list of ``[program, argument, ...]``, and runs each program up to the point where its parser has taken the
arguments. A program without a parser runs to its end. Writes a list of what was wrong with each, null for nothing.
"""

import argparse
import contextlib
import io
import json
import runpy
import sys
from pathlib import Path
from typing import Any


class Parsed(BaseException):
    """The arguments were taken."""


def problem(words: list[str]) -> str | None:
    """Return what is wrong with a command line, None if nothing is."""
    sys.argv = words
    sys.path[0] = str(Path(words[0]).parent)  # as for a program that is run: it imports its neighbours
    said = io.StringIO()
    try:
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            runpy.run_path(words[0], run_name="__main__")
    except Parsed:
        return None
    except SystemExit as end:
        return None if end.code in (None, 0) else f"{said.getvalue()}{end.code}"
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return None


def main() -> None:
    original = argparse.ArgumentParser.parse_args

    def parse_args(self: argparse.ArgumentParser, *args: Any, **kwargs: Any) -> Any:
        original(self, *args, **kwargs)
        raise Parsed

    argparse.ArgumentParser.parse_args = parse_args  # type: ignore[method-assign]
    json.dump([problem(words) for words in json.load(sys.stdin)], sys.stdout)


if __name__ == "__main__":
    main()
