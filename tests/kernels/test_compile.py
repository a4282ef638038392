"""Every kernel compiles for GPUs that are not here, without spilling registers."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from support.paths import BENCHMARKS

REPORT = BENCHMARKS / "compile_report.py"
HEAD_SIZES = ("64", "80", "96", "128", "256")
KERNELS = {
    "add_up_kernel",
    "attend_kernel",
    "compact_kernel",
    "copy_states_kernel",
    "decode_kernel",
    "decode_reads_kernel",
    "gated_squares_kernel",
    "gather_kernel",
    "read_out_kernel",
    "write_kernel",
}


@pytest.mark.parametrize(("dtype", "head_sizes"), [("bfloat16", HEAD_SIZES), ("float16", ("128",))])
@pytest.mark.parametrize("target", ["sm_80", "sm_90", "sm_100", "gfx942"])
def test_kernels_compile_without_spills(target: str, dtype: str, head_sizes: tuple[str, ...], tmp_path: Path) -> None:
    """In a process of its own: the interpreter's tests and this one want different things of Triton."""
    file = tmp_path / "report.json"
    command = [sys.executable, str(REPORT), "--targets", target, "--dtypes", dtype, "--json", str(file)]
    run = subprocess.run([*command, "--head-sizes", *head_sizes], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    results = json.loads(file.read_text())
    print(run.stdout)
    assert {result["kernel"] for result in results} == KERNELS
    assert {result["target"] for result in results} == {target}
    for size in head_sizes:
        assert sum(f"D={size} " in result["case"] for result in results) >= 15
    spilled = [result for result in results if result["spills"]]
    assert not spilled, spilled
