"""What all benchmarks share: the head of a result, aims, tables, options, and where results go."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import platform
import shlex
import sys
import time
from collections.abc import Iterable, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent / "results"
PACKAGES = ("vllm", "torch", "triton", "flash-linear-attention")


class Mismatch(Exception):
    """What was computed is not what it should be, so nothing is timed; the message says where."""


@dataclasses.dataclass(frozen=True)
class Aim:
    """A bound on a figure: ``sign`` is ``>=`` or ``<=``."""

    sign: str
    bound: float

    def judge(self, value: float | None) -> dict[str, Any]:
        """Return the aim in words and whether ``value`` meets it, None where nothing was measured."""
        met = None if value is None else value >= self.bound if self.sign == ">=" else value <= self.bound
        return {"aim": f"{self.sign} {self.bound:g}", "met": met}


NO_AIM: dict[str, Any] = {"aim": None, "met": None}
"""As from `Aim.judge`, for a figure without an aim."""


def verdict(judged: dict[str, Any]) -> str:
    """Return what `Aim.judge` found, for a cell of a table."""
    if not judged.get("aim"):
        return ""
    return judged["aim"] + {True: ", met", False: ", missed", None: ", not measured"}[judged["met"]]


def head(started: float) -> dict[str, Any]:
    """Return what every result begins with; ``started`` is `time.monotonic` at the beginning of the run."""
    return {"command": command(), "machine": machine(), "seconds": time.monotonic() - started}


def command() -> str:
    """Return the command line that started this program, from the repository's root."""
    return shlex.join(["python", f"benchmarks/{Path(sys.argv[0]).name}", *sys.argv[1:]])


def machine() -> dict[str, Any]:
    """Return the processor, the cores this process may use, and versions."""
    info = Path("/proc/cpuinfo").read_text(encoding="utf-8") if Path("/proc/cpuinfo").exists() else ""
    names = [line.partition(":")[2].strip() for line in info.splitlines() if line.startswith("model name")]
    versions = ", ".join(f"{name} {_version(name)}" for name in PACKAGES)
    return {
        "cpu": names[0] if names else platform.processor() or "unknown processor",
        "cores": len(os.sched_getaffinity(0)),
        "versions": f"Python {platform.python_version()}, {versions}",
        "system": f"{sys.platform} {platform.machine()}",
    }


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"


def table(headers: Sequence[str], rows: Iterable[Sequence[str]], left: int = 1) -> str:
    """Return a Markdown table of cells that are text already, the first ``left`` columns aligned to the left."""
    rows = list(rows)
    try:
        from tabulate import tabulate
    except ImportError:  # `kernels.py` runs where there are PyTorch and Triton alone
        return "\n".join(f"| {' | '.join(line)} |" for line in [headers, ["---"] * len(headers), *rows])
    align = ["left" if column < left else "right" for column in range(len(headers))]
    return tabulate(rows, headers, tablefmt="pipe", disable_numparse=True, colalign=align if rows else None)


def checked(found: dict[str, str]) -> list[str]:
    """Return the paragraphs on what was verified before anything was timed."""
    return ["Checked before timing:", "\n".join(f"* {name}: {text}" for name, text in found.items())]


def say(text: str) -> None:
    """Print how far the run is."""
    print(f"{time.strftime('%H:%M:%S')} {text}", file=sys.stderr, flush=True)


def write(output: Path, result: dict[str, Any], title: str, paragraphs: Iterable[str]) -> None:
    """Write ``output.json``, and ``output.md`` of a title, the command and paragraphs; print the latter."""
    text = "\n\n".join([f"# {title}", f"    {result['command']}", *paragraphs]) + "\n"
    output.parent.mkdir(parents=True, exist_ok=True)
    output.with_suffix(".json").write_text(json.dumps(result, indent=1) + "\n")
    output.with_suffix(".md").write_text(text)
    print(text)


def parser(description: str | None) -> argparse.ArgumentParser:
    """Return a parser that shows a module's docstring."""
    return argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
