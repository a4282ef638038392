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
    """A bound on a figure."""

    sign: str
    """``>=`` or ``<=``."""
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


def head(setting: Any, started: float) -> dict[str, Any]:
    """Return what every result begins with.

    Args:
        setting: a dataclass.
        started: `time.monotonic` at the beginning of the run.
    """
    return {
        "command": command(),
        "machine": machine(),
        "seconds": time.monotonic() - started,
        "setting": dataclasses.asdict(setting),
    }


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
        lines = [headers, ["---"] * len(headers), *rows]
        return "\n".join(f"| {' | '.join(line)} |" for line in lines)
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


def parser(description: str | None, output: str | None = None) -> argparse.ArgumentParser:
    """Return a parser that shows a module's docstring, with ``--output`` if there is a default for it."""
    result = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    if output:
        result.add_argument("--output", type=Path, default=FOLDER / output, help="without .json and .md")
    return result


def numbers(text: str) -> tuple[int, ...]:
    """Return the numbers of an option's value, which commas separate."""
    return tuple(int(number) for number in text.split(","))


def option(text: str, **keywords: Any) -> Any:
    """Return a dataclass field that is an option of the command line as well."""
    return dataclasses.field(metadata={"help": text} | keywords)


def add_options(to: argparse.ArgumentParser, setting: type[Any]) -> None:
    """Add the options among the fields of ``setting``; None stands for one that is not given."""
    types = {"int": int, "float": float, "str": str, "tuple[int, ...]": numbers, "dict[str, Any]": json.loads}
    for field in dataclasses.fields(setting):
        if field.metadata:
            flag = "--" + field.name.replace("_", "-")
            to.add_argument(flag, **{"type": types.get(str(field.type)), **field.metadata})


def given(args: argparse.Namespace, setting: type[Any]) -> dict[str, Any]:
    """Return the values of the options that are given."""
    names = [field.name for field in dataclasses.fields(setting) if field.metadata]
    return {name: getattr(args, name) for name in names if getattr(args, name) is not None}
