"""benchmarks/kernels.py: what it verifies and refuses, in the interpreter, and what it makes of times."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from kernel_cases import timing
from kernel_cases.oracles import compare, untouched
from kernel_cases.run import judge, table
from kernel_cases.setting import Row
from kernel_cases.timing import Timer, Times
from report import Aim, Mismatch, verdict
from support.paths import ROOT


def python(*arguments: str, interpret: bool) -> subprocess.CompletedProcess[str]:
    environment = os.environ | ({"TRITON_INTERPRET": "1"} if interpret else {})
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, env=environment, cwd=ROOT)


def in_interpreter(test: Any) -> Any:
    return pytest.mark.slow(pytest.mark.gpu_path(test))


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("kernels")
    done = python("tests/support/kernel_benchmark_case.py", str(folder), interpret=True)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    print(done.stdout)
    return {"said": done.stdout, **{path.stem: json.loads(path.read_text()) for path in folder.iterdir()}}


@in_interpreter
@pytest.mark.parametrize(
    ("case", "rows", "times", "ratio", "aims"),
    [
        ("write", 1, {"write", "copy"}, "% of copy", 0),
        ("decode", 1, {"memory", "read out", "both", "fla alone", "fla on pages", "copy"}, "fla on pages/memory", 2),
        ("prefill", 1, {"memory", "fla alone", "read out"}, "memory/fla alone", 0),
        (
            "window",
            2,
            {"AHN layer", "no memory layer", "full layer", "window", "full", "memory", "plan a step"},
            "full layer/AHN layer",
            2,
        ),
    ],
)
def test_verifies_and_times(
    results: dict[str, Any], case: str, rows: int, times: set[str], ratio: str, aims: int
) -> None:
    result = results[case]
    assert result["failures"] == []
    assert len(result["cases"][case]) == rows
    for row in result["cases"][case]:
        assert set(row["times"]) == times
        assert row["ratios"][ratio] > 0
    assert len(result["aims"]) == aims
    assert "torch" in result["machine"]["versions"] and result["setting"]["window"] == 40
    assert "not vLLM's" in result["attention"]


@in_interpreter
def test_attention_by_vllm_is_verified(results: dict[str, Any]) -> None:
    assert results["vllm"]["failures"] == [] and results["vllm"]["cases"] == {"window": []}
    assert "unified_attention" in results["vllm"]["attention"]


@in_interpreter
def test_what_is_wrong_is_not_timed(results: dict[str, Any]) -> None:
    wrong = results["wrong"]
    (failure,) = wrong["failures"]
    assert "absorb_and_read_steps's reads" in failure and "off by 0.001" in failure
    assert wrong["cases"]["decode"] == [] and len(wrong["cases"]["write"]) == 1
    assert [aim["met"] for aim in wrong["aims"]] == [None, None]


@in_interpreter
def test_what_there_is_no_time_for_is_named(results: dict[str, Any]) -> None:
    late = results["late"]
    assert late["left out"] == ["Cache write, tiny, Mamba2"] and late["failures"] == []
    assert late["cases"]["write"] == [] and results["write"]["left out"] == []


@in_interpreter
def test_command_line(results: dict[str, Any]) -> None:
    assert "nothing was timed" in results["said"]
    assert results["command"]["cases"] == {"write": []} and results["command"]["failures"] == []
    done = python("benchmarks/kernels.py", interpret=False)
    assert done.returncode == 2 and "there is no GPU here" in done.stderr


def test_needs_no_vllm() -> None:
    """As on a machine with PyTorch and Triton alone; nor does what the benchmark imports bring vLLM in."""
    code = """
import sys
for name in ("vllm", "tabulate", "support", "pytest", "safetensors", "transformers"):
    sys.modules[name] = None
sys.path.insert(0, "benchmarks")
sys.argv = ["kernels.py", "--help"]
from kernel_cases import attention, run
from kernel_cases.setting import Row, Setting
from kernel_cases.timing import Times
assert attention.chosen(Setting(None, None)) == "own"
row = Row("case", "3B", "Mamba2", {"batch": 1}, {"memory": Times(1, 1, 1)})
assert "| 3B | Mamba2 | 1 | 1.00 |" in run.table([row])
run.main("what it shows")
"""
    done = python("-c", code, interpret=False)
    assert done.returncode == 0 and "what it shows" in done.stdout, done.stderr


def row(batch: int, ratio: float) -> Row:
    return Row("case", "3B", "Mamba2", {"batch": batch, "bytes": 5}, {"memory": Times(1234.5, 1, 2)}, {"r": ratio})


def test_table_and_aims() -> None:
    rows = [row(1, 0.5), row(32, 2.25)]
    lines = table(rows).splitlines()
    assert len(lines) == 4 and len({len(line) for line in lines}) == 1
    assert lines[0].split("|")[1].strip() == "model" and "bytes" not in lines[0]
    assert [cell.strip() for cell in lines[3].split("|")[1:-1]] == ["3B", "Mamba2", "32", "1,234", "2.25"]
    aims = [("fast", Aim(">=", 1), "r", None), ("slow", Aim("<=", 3), "r", None), ("far", Aim(">=", 1), "r", alone)]
    fast, slow, far = judge(SimpleNamespace(AIMS=aims), rows)
    assert fast["met"] is False and fast["value"] == 0.5 and fast["where"] == "3B Mamba2, batch 1"
    assert slow["met"] is True and slow["value"] == 2.25 and verdict(slow) == "<= 3, met"
    assert far["met"] is False and far["value"] == 0.5 and verdict(far) == ">= 1, missed"
    (nothing,) = judge(SimpleNamespace(AIMS=aims[:1]), [])
    assert nothing["met"] is None and verdict(nothing) == ">= 1, not measured"


def alone(sizes: dict[str, int]) -> bool:
    return sizes["batch"] == 1


def test_compare() -> None:
    wanted = torch.randn(100)
    assert compare("x", wanted, wanted, mean=0, most=0) == 0
    off = wanted.clone()
    off[3] += 0.5 * wanted.abs().max()
    for got, reason in (
        (off, "off by"),
        (wanted.index_fill(0, torch.tensor([7]), torch.nan), "1 of 100 elements are not finite"),
        (wanted[:99], "shape"),
    ):
        with pytest.raises(Mismatch, match=reason):
            compare("x", got, wanted, mean=1e-1, most=1e-1)
    nan = torch.full((4,), torch.nan)
    untouched("x", nan, nan.clone())
    with pytest.raises(Mismatch, match="bytes"):
        untouched("x", nan, nan.index_fill(0, torch.tensor([1]), 0.0))


class FakeDevice:
    """A GPU on which a call takes as long as it says: ``torch.cuda`` with a clock of its own, in microseconds."""

    def __init__(self) -> None:
        self.now = 0.0
        self.captured: list[float] | None = None

    def spend(self, microseconds: float) -> Callable[[], None]:
        def call() -> None:
            if self.captured is not None:
                self.captured.append(microseconds)
            else:
                self.now += microseconds

        return call

    @contextmanager
    def graph(self, graph: Any) -> Any:
        self.captured = []
        yield
        graph.calls, self.captured = self.captured, None

    def install(self, monkeypatch: pytest.MonkeyPatch) -> None:
        device = self

        class Graph:
            calls: list[float]

            def replay(self) -> None:
                device.now += sum(self.calls)

        class Event:
            def __init__(self, enable_timing: bool) -> None:
                assert enable_timing

            def record(self) -> None:
                self.at = device.now

            def elapsed_time(self, end: Any) -> float:
                return (end.at - self.at) / 1e3

        stream = SimpleNamespace()
        properties = SimpleNamespace(name="fake", multi_processor_count=3, total_memory=1 << 30, L2_cache_size=1 << 10)
        for name, value in {
            "get_device_properties": lambda _: properties,
            "Stream": lambda *_: stream,
            "stream": lambda _: nullcontext(),
            "CUDAGraph": Graph,
            "graph": self.graph,
            "Event": Event,
            "synchronize": lambda *_: None,
            "_sleep": lambda _: self.spend(1e6)(),
        }.items():
            monkeypatch.setattr(torch.cuda, name, value)


def test_timer(monkeypatch: pytest.MonkeyPatch) -> None:
    device = FakeDevice()
    device.install(monkeypatch)
    monkeypatch.setattr(timing, "COPIED", 4096)
    # A copy of 4096 bytes takes 2 us: what it reads and writes makes 4.096 GB/s.
    copied = device.spend(2.0)
    monkeypatch.setattr(torch.Tensor, "copy_", lambda self, source: copied())
    timer = Timer(torch.device("cpu"))
    assert timer.copy_bandwidth == pytest.approx(4.096)
    assert timer.percent_of_copy(4096, 2.0) == pytest.approx(50)
    assert timer.copy(1000).median == pytest.approx(2.0)
    assert timer.copy(16384).median == pytest.approx(4.0)  # twice what the tensors hold
    assert [timer.sets(n) for n in (1, 100, 4096, 1 << 20)] == [256, 41, 1, 1]

    times = timer.graph([device.spend(3.0), device.spend(5.0)])
    assert times.median == times.low == times.high == pytest.approx(4.0) and times.host is None
    times = timer.stream(device.spend(7.0))  # neither the pause nor the flush counts
    assert times.median == pytest.approx(7.0) and times.host is not None
    assert timer.describe()["copy GB/s"] == 4.1
