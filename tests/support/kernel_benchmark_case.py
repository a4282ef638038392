"""The kernel benchmark on the CPU, in Triton's interpreter, with a timer that calls what it is given and counts.

    TRITON_INTERPRET=1 python tests/support/kernel_benchmark_case.py FOLDER

FOLDER gets a result for every case, one for attention by vLLM's kernel, one without time for anything, ``wrong.json``,
in which the kernel of one case is a little off, and ``command.json``, which is that of a command line.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from support.interpreter import install_for_fla
from support.paths import BENCHMARKS

sys.path.insert(0, str(BENCHMARKS))

from kernel_cases.timing import Call, Times

MEMORIES = {"write": "GatedDeltaNet", "decode": "Mamba2", "prefill": "DeltaNet", "window": "Mamba2"}
"""By case: the kernels themselves are tested with all three elsewhere."""


class CountingTimer:
    """Calls everything once; every measurement takes a microsecond longer than the one before."""

    multiprocessors = 2

    def __init__(self) -> None:
        self.measured = 0

    def describe(self) -> dict[str, Any]:
        return {"name": "none"}

    def free_bytes(self) -> int:
        return 1 << 30

    def sets(self, num_bytes: int) -> int:
        return 2

    def graph(self, calls: Sequence[Call]) -> Times:
        for call in calls:
            call()
        self.measured += 1
        return Times(self.measured, self.measured, self.measured)

    def stream(self, call: Call) -> Times:
        return self.graph([call])

    def copy(self, num_bytes: int) -> Times:
        return self.graph([])

    def percent_of_copy(self, num_bytes: int, microseconds: float) -> float:
        return num_bytes / microseconds


def main(folder: Path) -> None:
    install_for_fla()
    from kernel_cases import layer, run
    from kernel_cases.setting import TINY_SIZES, Setting

    layer.VAST = 1 << 20  # what a GPU is to do far apart, here only apart
    timer: Any = CountingTimer()
    setting = Setting(torch.device("cpu"), timer, attention="own", **TINY_SIZES)
    for name, memory in MEMORIES.items():
        run.benchmark(setting, [name], None, [memory], folder / f"{name}.json")
    verified = dataclasses.replace(setting, timer=None, attention="vllm", chunks=())
    run.benchmark(verified, ["window"], None, ["GatedDeltaNet"], folder / "vllm.json")

    run.benchmark(setting, ["write"], None, ["Mamba2"], folder / "late.json", minutes=-1)
    assert run.main("", ["--cases", "write", "--json", str(folder / "command.json")], "cpu") == 0

    right = layer.absorb_and_read_steps

    def wrong(*args: Any, **kwargs: Any) -> None:
        right(*args, **kwargs)
        args[8].mul_(1.001)

    layer.absorb_and_read_steps = wrong
    run.benchmark(setting, ["decode", "write"], None, ["DeltaNet"], folder / "wrong.json")


if __name__ == "__main__":
    with torch.no_grad():
        main(Path(sys.argv[1]))
