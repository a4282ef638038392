"""Runs the files of ``tests/kernels/interpreted`` in processes in which Triton interprets kernels."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.gpu_path

FOLDER = Path(__file__).parent / "interpreted"
# flash-linear-attention and vLLM are imported for the interpreter, each in a process that other files need not share.
SLOW = {
    "steps": ["test_steps.py"],
    "with_fla": ["test_prefill_memory.py"],
    "with_vllm": ["test_tables.py", "test_window_attention.py"],
}
OTHERS = sorted({path.name for path in FOLDER.glob("test_*.py")} - {name for names in SLOW.values() for name in names})
GROUPS = [
    pytest.param(OTHERS, id="others"),
    *(pytest.param(names, id=group, marks=pytest.mark.slow) for group, names in SLOW.items()),
]


@pytest.mark.parametrize("names", GROUPS)
def test_in_interpreter(names: list[str]) -> None:
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *(str(FOLDER / name) for name in names)],
        env=os.environ | {"TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, f"{run.stdout}\n{run.stderr}"
    # pytest also ends well when it leaves tests out.
    assert " passed" in run.stdout and "skipped" not in run.stdout, run.stdout
