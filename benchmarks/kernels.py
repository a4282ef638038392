"""The kernels of an AHN layer on a GPU: verified, then timed.

    python benchmarks/kernels.py [--quick] [--cases decode,prefill,window,write] [--json FILE]

Needs torch, triton, einops and flash-linear-attention, and no vLLM; where vLLM can be imported, window attention is its
kernel. Shapes are Qwen2.5's, W = 32,640, S = 128, blocks of 16 tokens, bfloat16 with states in float32.

Each case first compares kernels with plain torch in float64, on fresh random inputs. What does not agree is not timed,
and the exit status is 1. On a CPU (``--device cpu``, started with TRITON_INTERPRET=1) small shapes are verified, and
nothing is timed.
"""

import argparse
import dataclasses
import gc
import json
import math
import os
import sys
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parents[1] / "tests")]

if os.environ.get("TRITON_INTERPRET") == "1":
    from support.interpreter import install_for_fla

    install_for_fla()

from kernel_cases import attention, decode, prefill, window, write  # noqa: E402
from kernel_cases.results import Aim, Row, as_json, table, verdict  # noqa: E402
from kernel_cases.setting import MODELS, QUICK, TINY, TINY_SIZES, Model, Setting  # noqa: E402
from kernel_cases.timing import Timer  # noqa: E402
from machine import describe  # noqa: E402

MEMORIES = ("GatedDeltaNet", "DeltaNet", "Mamba2")


@dataclasses.dataclass(frozen=True)
class Case:
    title: str
    module: ModuleType
    models: tuple[str, ...]
    """Of the default run. Tuning flash-linear-attention's chunk kernels takes minutes for every number of heads."""
    memories: tuple[str, ...]
    """Likewise: what hardly depends on the memory is measured with one."""


CASES = {
    "write": Case("Cache write", write, tuple(MODELS), MEMORIES[:1]),
    "decode": Case("Decode memory and read-out, a layer", decode, tuple(MODELS), MEMORIES),
    "window": Case("Attention of a layer at 128k tokens", window, tuple(MODELS), MEMORIES[:1]),
    "prefill": Case("Prefill memory, a layer", prefill, ("3B",), MEMORIES),
}


def main() -> int:
    arguments = parse()
    device = torch.device(arguments.device)
    sizes: dict[str, Any] = TINY_SIZES
    timer = None
    if device.type == "cuda":
        device = torch.device("cuda", torch.cuda.current_device())
        sizes = QUICK if arguments.quick else {}
        timer = Timer(device)
    setting = Setting(device, timer, attention=arguments.attention, **sizes)
    result = benchmark(
        setting, arguments.cases, arguments.models, arguments.memories, arguments.json, arguments.minutes
    )
    return 1 if result["failures"] else 0


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
        cases: names in ``CASES``.
        models: names in ``MODELS``; None for each case's own choice.
        memories: names; None likewise.
        file: gets the result, in JSON, after every case, so that a run that is cut short leaves what it has.
        minutes: after which nothing new is started; what that leaves out is said.
    """

    def save() -> None:
        result["seconds"] = round(time.perf_counter() - started, 1)
        if file is not None:
            file.write_text(json.dumps(result, indent=1) + "\n")

    started = time.perf_counter()
    result = head(setting)
    save()
    for name in ("command", "machine", "device", "attention", "seed"):
        print(f"{name}: {result[name]}")
    aims: list[Aim] = []
    for name in cases:
        case = CASES[name]
        chosen = [MODELS[model] for model in models or case.models] if setting.on_gpu else [TINY]
        rows, failures, left_out = run(case, setting, chosen, memories or case.memories, started + 60 * minutes)
        result["cases"][name] = [dataclasses.asdict(row) for row in rows]
        result["failures"] += failures
        result["left out"] += left_out
        if setting.timer is not None:
            print(f"\n{case.title}\n{table(rows)}\n", flush=True)
            aims += case.module.aims(rows)
        result["aims"] = [as_json(aim) for aim in aims]
        save()
    for aim in aims:
        print(verdict(aim))
    if setting.timer is None:
        print("nothing was timed: times of an interpreter mean nothing")
    print(f"{result['seconds']} s, {len(result['failures'])} failed, {len(result['left out'])} left out")
    return result


def run(
    case: Case, setting: Setting, models: Sequence[Model], memories: Sequence[str], deadline: float
) -> tuple[list[Row], list[str], list[str]]:
    """Verify and time a case. What fails, and what there is no time for, is said and left out; the rest goes on."""
    rows: list[Row] = []
    failures, left_out = [], []
    for model in models:
        for memory in memories:
            started = time.perf_counter()
            name = f"{case.title}, {model.name}, {memory}"
            if started > deadline:
                left_out.append(name)
                print(f"{name}: left out, time is up", flush=True)
                continue
            try:
                case.module.verify(setting, model, memory)
                if setting.timer is not None:
                    rows += case.module.measure(setting, model, memory)
            except Exception as error:
                failures.append(f"{name}: {type(error).__name__}: {error}")
                print(f"FAILED {failures[-1]}", flush=True)
                traceback.print_exc()
            else:
                done = "verified" if setting.timer is None else "verified and timed"
                print(f"{name}: {done} in {time.perf_counter() - started:.1f} s", flush=True)
            gc.collect()
            if setting.on_gpu:
                torch.cuda.empty_cache()
    return rows, failures, left_out


def head(setting: Setting) -> dict[str, Any]:
    """What a result begins with."""
    sizes = {name: value for name, value in vars(setting).items() if name not in ("device", "timer", "dtype")}
    return {
        "command": " ".join(["python benchmarks/kernels.py", *sys.argv[1:]]),
        "machine": describe(),
        "device": None if setting.timer is None else setting.timer.describe(),
        "attention": attention.described(setting),
        "seed": torch.seed(),
        "setting": sizes | {"dtype": str(setting.dtype), "state dtype": str(torch.float32)},
        "cases": {},
        "aims": [],
        "failures": [],
        "left out": [],
    }


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=names(CASES), default=list(CASES), help=f"some of {','.join(CASES)}")
    parser.add_argument("--models", type=names(MODELS), help=f"some of {','.join(MODELS)}, for every case")
    parser.add_argument("--memories", type=names(MEMORIES), help=f"some of {','.join(MEMORIES)}, for every case")
    parser.add_argument("--quick", action="store_true", help="fewer sizes")
    parser.add_argument("--attention", choices=("auto", "vllm", "own"), default="auto", help="paged attention kernel")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--minutes", type=float, default=7, help="start nothing new after so many (default: 7)")
    parser.add_argument("--json", type=Path, help="also write all figures to this file")
    arguments = parser.parse_args()
    if arguments.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: there is no GPU; --device cpu verifies in Triton's interpreter")
    if (arguments.device == "cpu") != (os.environ.get("TRITON_INTERPRET") == "1"):
        parser.error("--device cpu and the environment variable TRITON_INTERPRET=1 go together")
    return arguments


def names(known: Any) -> Any:
    """A parser of names with commas between them."""

    def parse_names(text: str) -> tuple[str, ...]:
        chosen = tuple(text.split(","))
        for name in chosen:
            if name not in known:
                raise argparse.ArgumentTypeError(f"{name!r} is not one of {', '.join(known)}")
        return chosen

    return parse_names


if __name__ == "__main__":
    with torch.no_grad():
        sys.exit(main())
