"""`benchmarks/length.py` in its tiny setting."""

import json
import statistics
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import agreement
import length
from report import Mismatch
from support.paths import BENCHMARKS
from vllm_ahn.config import AHNConfig
from vllm_ahn.tools.cost.allocation import EngineSettings, ahn_attention, full_attention
from vllm_ahn.tools.cost.shape import ModelShape

CONTEXTS = [64, 128, 256, 512]
WINDOW, SINKS = 96, 32  # the tiny setting's
EAGER = '{"enforce_eager": true}'  # compilation is test_compile's


@pytest.mark.slow
def test_all_lengths_are_verified_measured_and_drawn(tmp_path: Path) -> None:
    options = ["--tiny", "--engine-args", EAGER, "--output", str(tmp_path / "length")]
    command = [sys.executable, str(BENCHMARKS / "length.py"), *options]
    done = subprocess.run(command, capture_output=True, text=True, timeout=580, check=False)
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "length.json").read_text())
    table = (tmp_path / "length.md").read_text()
    assert table in done.stdout
    drawn = (tmp_path / "length.svg").read_text()
    for words in ("Cache the request holds, MiB", "Time per token, ms", "full attention", "sinks + window", "0.5 MiB"):
        assert words in drawn, words

    assert len(result["verified"]) == 4
    for name, text in result["verified"].items():
        expected = "tokens each: equal" if "inside the window" in name else "tokens after 224: each at most 0.00"
        assert text.startswith(f"4 requests, 32 {expected}"), name

    assert [int(context) for context in result["contexts"]] == CONTEXTS
    for context, rows in result["contexts"].items():
        assert list(rows) == ["full", "window", "ahn-gdn"]
        for name, row in rows.items():
            check_times(row, rows["full"])
            # The engine's count is what `vllm-ahn cost` computes.
            assert row["cache_bytes"] == row["blocks"] * result["engines"][name]["block_bytes"]
            assert row["cache_bytes"] == counted(name, int(context)), (name, context)
            assert f"{row['cache_bytes'] / 2**20:.2f}" in table
    far = result["contexts"]["512"]
    assert far["window"]["cache_ratio"] > far["ahn-gdn"]["cache_ratio"] > 2
    assert far["ahn-gdn"]["blocks"] == result["contexts"]["256"]["ahn-gdn"]["blocks"]


def check_times(row: dict[str, Any], full: dict[str, Any]) -> None:
    rounds = row["rounds_s"]
    assert len(rounds) == 2 * 3  # repetitions, rounds
    assert 0 < min(rounds) == row["least_s"] <= row["token_s"] <= row["greatest_s"] == max(rounds)
    assert row["token_s"] == min(statistics.median(rounds[:3]), statistics.median(rounds[3:]))
    assert row["first_token_ratio"] == pytest.approx(full["first_token_s"] / row["first_token_s"])
    ratios = sorted(whole / part for whole, part in zip(full["rounds_s"], rounds, strict=True))
    assert row["token_ratio"] == pytest.approx((ratios[2] + ratios[3]) / 2)


def counted(row: str, context: int) -> int:
    """Bytes that a request holds by the specs alone."""
    shape = ModelShape(
        layers=2, hidden=128, heads=4, kv_heads=2, head_size=32, intermediate=256, vocabulary=512, dtype="float32"
    )
    settings = EngineSettings(
        "float32", block_size=32, max_num_batched_tokens=64, async_scheduling=False, enable_prefix_caching=False
    )
    if row == "full":
        return full_attention(shape, settings, context, "float32").held_bytes
    config = AHNConfig("GatedDeltaNet" if row == "ahn-gdn" else None, WINDOW, SINKS)
    return ahn_attention(shape, settings, context, config).held_bytes


@pytest.mark.parametrize(
    ("contexts", "sentence"),
    [
        ("16,512", "--contexts has 16, expected more than the 18 tokens of an answer"),
        ("64,128", "--contexts ends at 128, expected at least twice window and sinks, 256"),
    ],
)
def test_bad_contexts(contexts: str, sentence: str) -> None:
    with pytest.raises(SystemExit, match=sentence):
        length.read_setting(length.parser().parse_args(["--tiny", "--contexts", contexts]))


class FakeEngine:
    """Answers every prompt with the same tokens."""

    def __init__(self, *tokens: int) -> None:
        self.tokens = list(tokens)

    def generate(self, prompts: Any, max_tokens: int) -> Any:
        return SimpleNamespace(tokens=[self.tokens for _ in prompts])


def test_checks_can_fail() -> None:
    full, other = FakeEngine(1, 2), FakeEngine(1, 3)
    assert agreement.check_inside(full, FakeEngine(1, 2), [[0], [5]], 2).startswith("2 requests, 2 tokens each")
    with pytest.raises(Mismatch, match="inside the window"):
        agreement.check_inside(full, other, [[0], [5]], 2)

    def reference(tokens: torch.Tensor, last: int) -> torch.Tensor:
        """Token 1 is the best after the prompt [0, 0]; 3 comes after it, and 2 is 0.25 less."""
        assert tokens.shape == (1, 3) and tokens[0, :2].tolist() == [0, 0] and last == 2
        return torch.tensor([[[0.0, 1.0, 0.0, 0.0], [0.0, 0.0, 0.75, 1.0]]])

    def past(engine: FakeEngine, full: FakeEngine, tolerance: float) -> str:
        return agreement.check_past(full, engine, reference, [[0, 0]], 2, tolerance)

    assert "at most 0.000" in past(other, full, 0.1)
    assert "at most 0.250" in past(full, other, 0.3)
    with pytest.raises(Mismatch, match=r"0\.250 below the reference's best, allowed is 0\.1"):
        past(full, other, 0.1)
    with pytest.raises(Mismatch, match="full attention"):
        past(other, other, 0.1)
