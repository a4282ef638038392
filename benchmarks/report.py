"""Where a benchmark's figures go, JSON for programs and Markdown for reading; and what else command lines share."""

from __future__ import annotations

import dataclasses
import json
import shlex
import sys
import time
from pathlib import Path
from typing import Any

from machine import describe

FOLDER = Path(__file__).parent / "results"


def command() -> str:
    """The command line that started this program, from the repository's root."""
    return shlex.join(["python", f"benchmarks/{Path(sys.argv[0]).name}", *sys.argv[1:]])


def head(setting: Any, started: float) -> dict[str, Any]:
    """What every result begins with: the command, the machine, seconds since ``started`` (`time.monotonic`), and the
    setting, which is a dataclass.
    """
    return {
        "command": command(),
        "machine": describe(),
        "seconds": time.monotonic() - started,
        "setting": dataclasses.asdict(setting),
    }


def numbers(text: str) -> tuple[int, ...]:
    """The numbers of an option's value, which commas separate."""
    return tuple(int(number) for number in text.split(","))


def say(text: str) -> None:
    """Says how far the run is."""
    print(f"{time.strftime('%H:%M:%S')} {text}", file=sys.stderr, flush=True)


def write(output: Path, result: dict[str, Any], table: str) -> None:
    """Writes ``output.json`` and ``output.md`` and prints the latter."""
    output.parent.mkdir(parents=True, exist_ok=True)
    output.with_suffix(".json").write_text(json.dumps(result, indent=1) + "\n")
    output.with_suffix(".md").write_text(table)
    print(table)
