"""The run of ``benchmarks/kernels.py``: every case verified, then timed."""

from __future__ import annotations

import argparse
import dataclasses
import gc
import json
import math
import time
import traceback
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

import report
from kernel_cases import attention, decode, prefill, window, write
from kernel_cases.setting import MODELS, QUICK, TINY, TINY_SIZES, Model, Row, Setting
from kernel_cases.timing import Timer
from vllm_ahn.memory.spec import MEMORIES


@dataclasses.dataclass(frozen=True)
class Case:
    """One module of this package."""

    title: str
    module: ModuleType
    models: tuple[str, ...]
    """Of the default run. Tuning flash-linear-attention's chunk kernels takes minutes for every number of heads."""
    memories: tuple[str, ...]
    """Likewise: what hardly depends on the memory is measured with one."""


FIRST = tuple(MEMORIES)[:1]
CASES = {
    "write": Case("Cache write", write, tuple(MODELS), FIRST),
    "decode": Case("Decode memory and read-out, a layer", decode, tuple(MODELS), tuple(MEMORIES)),
    "window": Case("Attention of a layer at 128k tokens", window, tuple(MODELS), FIRST),
    "prefill": Case("Prefill memory, a layer", prefill, ("3B",), tuple(MEMORIES)),
}


def main(description: str, arguments: Sequence[str] | None = None, device: str = "cuda") -> int:
    """Run what the command line says; return the exit status.

    Args:
        description: for ``--help``.
        arguments: of the command line; None for this program's.
        device: on a ``cpu``, for tests in Triton's interpreter, small shapes are verified and nothing is timed.
    """
    options = _parser(description)
    values = options.parse_args(arguments)
    if device == "cpu":
        setting = Setting(torch.device("cpu"), None, attention=values.attention, **TINY_SIZES)
    elif not torch.cuda.is_available():
        options.error("there is no GPU here")
    else:
        gpu = torch.device("cuda", torch.cuda.current_device())
        setting = Setting(gpu, Timer(gpu), attention=values.attention, **(QUICK if values.quick else {}))
    with torch.no_grad():
        result = benchmark(setting, values.cases, values.models, values.memories, values.json, values.minutes)
    return 1 if result["failures"] else 0


def _parser(description: str) -> argparse.ArgumentParser:
    parser = report.parser(description)
    parser.add_argument("--cases", type=_names(CASES), default=list(CASES), help=f"some of {','.join(CASES)}")
    for name, known in (("models", MODELS), ("memories", MEMORIES)):
        parser.add_argument(f"--{name}", type=_names(known), help=f"some of {','.join(known)}, for every case")
    parser.add_argument("--quick", action="store_true", help="fewer sizes")
    parser.add_argument("--attention", choices=("auto", "vllm", "own"), default="auto", help="paged attention kernel")
    parser.add_argument("--minutes", type=float, default=7, help="start nothing new after so many (default: 7)")
    parser.add_argument("--json", type=Path, help="also write all figures to this file")
    return parser


def _names(known: Collection[str]) -> Callable[[str], tuple[str, ...]]:
    def parse(text: str) -> tuple[str, ...]:
        for name in text.split(","):
            if name not in known:
                raise argparse.ArgumentTypeError(f"{name!r} is not one of {', '.join(known)}")
        return tuple(text.split(","))

    return parse


def benchmark(
    setting: Setting,
    cases: Sequence[str],
    models: Sequence[str] | None = None,
    memories: Sequence[str] | None = None,
    file: Path | None = None,
    minutes: float = math.inf,
) -> dict[str, Any]:
    """Verify and time, print tables, and return what is written to ``file``.

    Args:
        setting: what to measure and on what; without a timer nothing is timed, on a CPU the model is a tiny one.
        cases: names in `CASES`.
        models: names in `MODELS`; None for each case's own choice.
        memories: names; None likewise.
        file: gets the result, in JSON, after every case, so that a run that is cut short leaves what it has.
        minutes: after which nothing new is started; what that leaves out is said.
    """

    def save() -> None:
        result["seconds"] = round(time.perf_counter() - started, 1)
        if file is not None:
            file.write_text(json.dumps(result, indent=1) + "\n")

    started = time.perf_counter()
    result = _head(setting)
    save()
    for name in ("command", "machine", "device", "attention", "seed"):
        print(f"{name}: {result[name]}")
    for name in cases:
        case = CASES[name]
        chosen = [MODELS[model] for model in models or case.models] if setting.on_gpu else [TINY]
        rows = _run(case, setting, chosen, memories or case.memories, started + 60 * minutes, result)
        result["cases"][name] = [dataclasses.asdict(row) for row in rows]
        if setting.timer is not None:
            print(f"\n{case.title}\n{table(rows)}\n", flush=True)
            result["aims"] += judge(case.module, rows)
        save()
    for aim in result["aims"]:
        found = "" if aim["met"] is None else f": {_figure(aim['value'])} at worst ({aim['where']})"
        print(f"{aim['what']} {report.verdict(aim)}{found}")
    if setting.timer is None:
        print("nothing was timed: times of an interpreter mean nothing")
    print(f"{result['seconds']} s, {len(result['failures'])} failed, {len(result['left out'])} left out")
    return result


def _head(setting: Setting) -> dict[str, Any]:
    sizes = {name: value for name, value in vars(setting).items() if name not in ("device", "timer")}
    return {
        "command": report.command(),
        "machine": report.machine(),
        "device": None if setting.timer is None else setting.timer.describe(),
        "attention": attention.described(setting),
        "seed": torch.seed(),
        "setting": sizes | {name: str(sizes[name]) for name in ("dtype", "state_dtype")},
        "cases": {},
        "aims": [],
        "failures": [],
        "left out": [],
    }


def _run(
    case: Case,
    setting: Setting,
    models: Sequence[Model],
    memories: Sequence[str],
    deadline: float,
    result: dict[str, Any],
) -> list[Row]:
    """Verify and time a case. What fails, and what there is no time for, is said and left out; the rest goes on."""
    rows: list[Row] = []
    for model in models:
        for memory in memories:
            started = time.perf_counter()
            name = f"{case.title}, {model.name}, {memory}"
            if started > deadline:
                result["left out"].append(name)
                print(f"{name}: left out, time is up", flush=True)
                continue
            try:
                case.module.verify(setting, model, MEMORIES[memory])
                if setting.timer is not None:
                    rows += case.module.measure(setting, model, MEMORIES[memory])
            except Exception as error:
                result["failures"].append(f"{name}: {type(error).__name__}: {error}")
                print(f"FAILED {result['failures'][-1]}", flush=True)
                traceback.print_exc()
            else:
                done = "verified" if setting.timer is None else "verified and timed"
                print(f"{name}: {done} in {time.perf_counter() - started:.1f} s", flush=True)
            gc.collect()
            if setting.on_gpu:
                torch.cuda.empty_cache()
    return rows


def judge(module: Any, rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Return each aim of a case, with the measurement that is farthest from it."""
    judged = []
    for what, aim, ratio, applies in getattr(module, "AIMS", ()):
        some = [row for row in rows if applies is None or applies(row.sizes)]
        worst = (min if aim.sign == ">=" else max)(some, key=lambda row: row.ratios[ratio], default=None)
        where, value = "", None
        if worst is not None:
            sizes = ", ".join(f"{name} {value}" for name, value in worst.sizes.items() if name != "bytes")
            where, value = f"{worst.model} {worst.memory}, {sizes}", worst.ratios[ratio]
        judged.append({"what": what, "value": value, "where": where, **aim.judge(value)})
    return judged


def table(rows: Sequence[Row]) -> str:
    """Return the rows of one case: medians in microseconds, then ratios."""
    if not rows:
        return "nothing was timed"
    sizes, times, ratios = (
        list(dict.fromkeys(name for row in rows for name in getattr(row, kind) if name != "bytes"))
        for kind in ("sizes", "times", "ratios")
    )
    lines = []
    for row in rows:
        cells = [f"{row.sizes[name]:,}" if name in row.sizes else "" for name in sizes]
        cells += [_figure(row.times[name].median) if name in row.times else "" for name in times]
        cells += [_figure(row.ratios[name]) if name in row.ratios else "" for name in ratios]
        lines.append([row.model, row.memory, *cells])
    return report.table(["model", "memory", *sizes, *(f"{name}, us" for name in times), *ratios], lines, left=2)


def _figure(value: float) -> str:
    """Return a figure with three digits or more."""
    return f"{value:.2f}" if value < 10 else f"{value:.1f}" if value < 1000 else f"{value:,.0f}"
