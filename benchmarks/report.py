"""Where a benchmark's figures go: JSON for programs, Markdown for reading."""

from __future__ import annotations

import json
import shlex
import sys
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent / "results"


def command() -> str:
    """The command line that started this program, from the repository's root."""
    return shlex.join(["python", f"benchmarks/{Path(sys.argv[0]).name}", *sys.argv[1:]])


def write(output: Path, result: dict[str, Any], table: str) -> None:
    """Writes ``output.json`` and ``output.md`` and prints the latter."""
    output.parent.mkdir(parents=True, exist_ok=True)
    output.with_suffix(".json").write_text(json.dumps(result, indent=1) + "\n")
    output.with_suffix(".md").write_text(table)
    print(table)
