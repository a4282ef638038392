"""`benchmarks/serving.py` with a tiny model."""

import json
import statistics
import subprocess
import sys
from pathlib import Path

import pytest

from support.paths import TESTS


@pytest.mark.slow
def test_verified_and_measured(tmp_path: Path) -> None:
    command = [sys.executable, str(TESTS / "support" / "serving_benchmark_case.py"), str(tmp_path / "serving")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=580, check=False)
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "serving.json").read_text())
    assert (tmp_path / "serving.md").read_text() in done.stdout

    inside, past = result["checks"].values()
    assert inside == "2 requests, 8 tokens each: equal to the base's"
    assert past.startswith("1 requests, 8 tokens after 1100: each at most 0.000 below")
    turns = [repetition["past"][0] for repetition in result["repetitions"]]
    assert len(turns) == 2
    for turn in turns:
        assert turn["base"]["far_blocks"] == 41  # ceil((1300 + 7) / 32)
        assert turn["ahn"]["far_blocks"] == 35  # one of sinks, 32 of the window, two of the state
    summary = result["summary"]
    assert summary["d"]["median"] == turns[0]["base"]["far_cache_bytes"] / turns[0]["ahn"]["far_cache_bytes"]
    assert summary["d"]["aim"] == ">= 10" and summary["d"]["met"] is False
    ratios = [turn["base"]["far_answer_s"] / turn["ahn"]["far_answer_s"] for turn in turns]
    assert summary["c"]["median"] == pytest.approx(statistics.median(ratios)) and "aim" not in summary["c"]
