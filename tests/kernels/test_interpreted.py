"""Runs the files of ``tests/kernels/interpreted`` in processes in which Triton interprets kernels."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent / "interpreted"
# flash-linear-attention and vLLM are imported for the interpreter, each in a process that other files need not share.
WITH_FLA, WITH_VLLM = ["test_prefill_memory.py"], ["test_tables.py", "test_window_attention.py"]
OTHERS = sorted({path.name for path in FOLDER.glob("test_*.py")} - {*WITH_FLA, *WITH_VLLM})


@pytest.mark.parametrize("names", [OTHERS, WITH_FLA, WITH_VLLM], ids=["others", "with_fla", "with_vllm"])
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
