"""Every kernel compiles for GPUs that are not here, without spilling registers."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from support.paths import BENCHMARKS

pytestmark = pytest.mark.slow

REPORT = BENCHMARKS / "compile_report.py"
KERNELS = {
    "compact_kernel",
    "copy_states_kernel",
    "find_steps_kernel",
    "gated_squares_kernel",
    "gather_kernel",
    "read_out_kernel",
    "steps_kernel",
    "write_kernel",
}
BENCHMARKS_OWN = {"attend_kernel", "add_up_kernel"}
"""The benchmark's attention, for heads of 128."""

ALL = ("64", "80", "128", "256")
"""96 compiles as 80 does, to a block of 128 under a mask."""
CASES = [
    ("sm_90", "bfloat16", ALL),
    ("gfx942", "bfloat16", ALL),
    ("sm_80", "bfloat16", ("80", "256")),
    ("sm_100", "bfloat16", ("80", "256")),
    ("sm_80", "float16", ("128",)),
    ("gfx942", "float16", ("128",)),
    ("gfx90a", "bfloat16", ("96",)),
    ("gfx950", "float16", ("96",)),
]


@pytest.mark.parametrize(("target", "dtype", "head_sizes"), CASES, ids=str)
def test_kernels_compile_without_spills(target: str, dtype: str, head_sizes: tuple[str, ...], tmp_path: Path) -> None:
    """In a process of its own: the interpreter's tests and this one want different things of Triton."""
    file = tmp_path / "report.json"
    command = [sys.executable, str(REPORT), "--targets", target, "--dtypes", dtype, "--json", str(file)]
    run = subprocess.run([*command, "--head-sizes", *head_sizes], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    results = json.loads(file.read_text())
    print(run.stdout)
    assert {result["kernel"] for result in results} == KERNELS | (BENCHMARKS_OWN if "128" in head_sizes else set())
    assert {result["target"] for result in results} == {target}
    for size in head_sizes:
        assert sum(f"D={size} " in result["case"] for result in results) >= 15
    spilled = [result for result in results if result["spills"]]
    assert not spilled, spilled
