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
from kernel_cases.setting import MODELS, QUICK, TINY, TINY_SIZES, Row, Setting
from kernel_cases.timing import Timer
from vllm_ahn.memory.spec import MEMORIES

FIRST = tuple(MEMORIES)[:1]
CASES: dict[str, tuple[str, ModuleType, tuple[str, ...], tuple[str, ...]]] = {
    "write": ("Cache write", write, tuple(MODELS), FIRST),
    "decode": ("Decode memory and read-out, a layer", decode, tuple(MODELS), tuple(MEMORIES)),
    "window": ("Attention of a layer at 128k tokens", window, tuple(MODELS), FIRST),
    "prefill": ("Prefill memory, a layer", prefill, ("3B",), tuple(MEMORIES)),
}
"""Title, module, and the models and memories of the default run. What hardly depends on the memory has one memory;
tuning flash-linear-attention's chunk kernels takes minutes for every number of heads."""


def main(description: str, arguments: Sequence[str] | None = None, device: str = "cuda") -> int:
    """Run what the command line says; return the exit status.

    On a ``cpu``, for tests in Triton's interpreter, small shapes are verified and nothing is timed.
    """
    parser = report.parser(description)
    parser.add_argument("--cases", type=_names(CASES), default=list(CASES), help=f"some of {','.join(CASES)}")
    for name, known in (("models", MODELS), ("memories", MEMORIES)):
        parser.add_argument(f"--{name}", type=_names(known), help=f"some of {','.join(known)}, for every case")
    parser.add_argument("--quick", action="store_true", help="fewer sizes")
    parser.add_argument("--attention", choices=("auto", "vllm", "own"), default="auto", help="paged attention kernel")
    parser.add_argument("--minutes", type=float, default=7, help="start nothing new after so many (default: 7)")
    parser.add_argument("--json", type=Path, help="also write all figures to this file")
    values = parser.parse_args(arguments)
    if device == "cpu":
        setting = Setting(torch.device("cpu"), None, attention=values.attention, **TINY_SIZES)
    elif not torch.cuda.is_available():
        parser.error("there is no GPU here")
    else:
        gpu = torch.device("cuda", torch.cuda.current_device())
        setting = Setting(gpu, Timer(gpu), attention=values.attention, **(QUICK if values.quick else {}))
    with torch.no_grad():
        result = benchmark(setting, values.cases, values.models, values.memories, values.json, values.minutes)
    return 1 if result["failures"] else 0


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
    """Verify and time, print tables, and return the result.

    Models and memories are each case's own by default; on a CPU the model is a tiny one. ``file`` gets the result in
    JSON after every case, so that a run that is cut short leaves what it has. Nothing new is started after so many
    ``minutes``, and what that leaves out is said.
    """

    def save() -> None:
        result["seconds"] = round(time.perf_counter() - started, 1)
        if file is not None:
            file.write_text(json.dumps(result, indent=1) + "\n")

    started = time.perf_counter()
    result: dict[str, Any] = {
        "command": report.command(),
        "machine": report.machine(),
        "device": setting.timer and setting.timer.describe(),
        "attention": attention.described(setting),
        "seed": torch.seed(),
        "setting": setting.sizes(),
    }
    for name in ("command", "machine", "device", "attention", "seed"):
        print(f"{name}: {result[name]}")
    result |= {"cases": {}, "aims": [], "failures": [], "left out": []}
    save()
    for name in cases:
        title, module, default_models, default_memories = CASES[name]
        rows: list[Row] = []
        for model in (models or default_models) if setting.on_gpu else [TINY.name]:
            for memory in memories or default_memories:
                what = f"{title}, {model}, {memory}"
                if time.perf_counter() > started + 60 * minutes:
                    result["left out"].append(what)
                    print(f"{what}: left out, time is up", flush=True)
                else:
                    rows += _run(module, setting, model, memory, what, result["failures"])
        result["cases"][name] = [dataclasses.asdict(row) for row in rows]
        if setting.timer is not None:
            print(f"\n{title}\n{table(rows)}\n", flush=True)
            result["aims"] += judge(module, rows)
        save()
    for aim in result["aims"]:
        found = "" if aim["met"] is None else f": {_figure(aim['value'])} at worst ({aim['where']})"
        print(f"{aim['what']} {report.verdict(aim)}{found}")
    if setting.timer is None:
        print("nothing was timed: times of an interpreter mean nothing")
    print(f"{result['seconds']} s, {len(result['failures'])} failed, {len(result['left out'])} left out")
    return result


def _run(module: Any, setting: Setting, model: str, memory: str, what: str, failures: list[str]) -> list[Row]:
    """Verify and time one model and memory. What fails is said, and the others go on."""
    started, rows = time.perf_counter(), []
    case = (setting, MODELS.get(model, TINY), MEMORIES[memory])
    try:
        module.verify(*case)
        rows = list(module.measure(*case)) if setting.timer is not None else []
    except Exception as error:
        failures.append(f"{what}: {type(error).__name__}: {error}")
        print(f"FAILED {failures[-1]}", flush=True)
        traceback.print_exc()
    else:
        done = "verified" if setting.timer is None else "verified and timed"
        print(f"{what}: {done} in {time.perf_counter() - started:.1f} s", flush=True)
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
    cells = []
    for row in rows:
        sizes = {name: f"{size:,}" for name, size in row.sizes.items() if name != "bytes"}
        times = {f"{name}, us": _figure(times.median) for name, times in row.times.items()}
        ratios = {name: _figure(ratio) for name, ratio in row.ratios.items()}
        cells.append({"model": row.model, "memory": row.memory} | sizes | times | ratios)
    columns = list(dict.fromkeys(name for row in cells for name in row))
    return report.table(columns, [[row.get(name, "") for name in columns] for row in cells], left=2)


def _figure(value: float) -> str:
    """Return a figure with three digits or more."""
    return f"{value:.2f}" if value < 10 else f"{value:.1f}" if value < 1000 else f"{value:,.0f}"
