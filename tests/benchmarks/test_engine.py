"""`benchmarks/engine.py` in its tiny setting, and the parts of it that decide: agreement and aims."""

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import agreement
import engine
import engine_report
from engines import Choice
from report import Mismatch
from support.paths import BENCHMARKS

ROWS = ["full", "full-fp8", "window", "ahn-gdn"]
BLOCK, LONG, INSIDE = 32, 384, 128  # the tiny setting's; W + S is 128
NOT_COMPILED = '{"compilation_config": {"mode": 0}}'  # compilation is test_compile's, and takes half a minute an engine


def benchmark(output: Path, *options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(BENCHMARKS / "engine.py"), "--tiny", "--threads", "1", "--output", str(output)]
    return subprocess.run([*command, *options], capture_output=True, text=True, timeout=580, check=False)


@pytest.mark.slow
def test_all_rows_are_verified_and_measured(tmp_path: Path) -> None:
    done = benchmark(tmp_path / "engine", "--engine-args", NOT_COMPILED)
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "engine.json").read_text())
    table = (tmp_path / "engine.md").read_text()
    assert table in done.stdout

    # A row is there, or vLLM's own words are.
    measured = [row for row in ROWS if row not in result["missing"]]
    assert set(ROWS) - set(measured) <= {"full-fp8"} and all(result["missing"].values())
    for name in measured:
        assert result["verified"][f"{name}, eager"].startswith("64 of 64 tokens equal"), name
    for name in ("window", "ahn-gdn"):
        assert result["verified"][f"{name}, full inside the window"].startswith("40 of 40 tokens equal")
    assert "ahn-gdn, window past it" in result["verified"]

    assert list(result["contexts"]) == [str(LONG), str(INSIDE)]
    for context, rows in result["contexts"].items():
        assert list(rows) == measured
        for name, row in rows.items():
            check_capacity(name, int(context), row)
            check_times(row)
    long = result["contexts"][str(LONG)]
    assert long["full"]["sequences"] == 2
    assert long["window"]["sequences"] > long["ahn-gdn"]["sequences"] > long["full"]["sequences"]
    assert long["full"]["vllm_count"] < long["ahn-gdn"]["vllm_count"] < long["window"]["vllm_count"]
    if "full-fp8" in long:
        assert long["full-fp8"]["vllm_count"] == pytest.approx(4 * long["full"]["vllm_count"], rel=0.05)

    # Ratios are there, aims are for the real shapes.
    assert [entry["met"] for entry in result["aims"]] == [None] * 8
    ratios = {entry["what"]: entry["value"] for entry in result["aims"] if entry["context"] == LONG}
    assert ratios["sequences that fit, over full attention"] == long["ahn-gdn"]["sequences"] / 2
    assert all(value is not None for value in ratios.values())
    for text in ("full attention", "sinks + window, no memory", "AHN, GatedDeltaNet", "Contexts of 384 tokens"):
        assert text in table


def check_capacity(name: str, context: int, row: dict[str, Any]) -> None:
    """Counted again by hand: blocks a sequence takes, all of them without preemption."""
    usable = row["num_blocks"] - 1
    keeps_all = context <= INSIDE or name.startswith("full")
    whole = math.ceil(context / BLOCK)
    if keeps_all:
        assert row["vllm_count"] == row["num_blocks"] / whole
        expected = min(12, usable // whole)
        assert row["why_no_more"] == ("--max-batch" if expected == 12 else "vLLM's count")
        assert row["sequences"] == expected > 0
        assert row["held_blocks"] <= expected * whole <= usable
    else:
        # One sink block, three or four of the window, two pages of state.
        state = 2 * (name == "ahn-gdn")
        least, most = row["sequences"] * (4 + state), row["sequences"] * (5 + state)
        assert least <= row["held_blocks"] <= min(most, usable)
        assert row["sequences"] >= int(row["vllm_count"])
        assert row["why_no_more"] == "it would not fit beside the others"
        assert usable - row["held_blocks"] < 9 + state  # what one takes while its prompt is computed
    assert row["full"] == (row["why_no_more"] != "--max-batch")
    assert row["preemptions"] == 0
    assert row["cache_bytes"] == row["num_blocks"] * row["block_bytes"]


def check_times(row: dict[str, Any]) -> None:
    assert len(row["first_token_all_s"]) == 2 and row["first_token_s"] > 0
    batches = [entry["batch"] for entry in row["decode"]]
    assert batches == sorted({1, 2, 4, 8, row["sequences"]} & set(range(1, row["sequences"] + 1)))
    for entry in row["decode"]:
        assert 0 < entry["least_s"] <= entry["token_s"] <= entry["greatest_s"]
        assert entry["tokens_per_s"] == pytest.approx(entry["batch"] / entry["token_s"])


@pytest.mark.slow
def test_a_mismatch_fails(tmp_path: Path) -> None:
    done = benchmark(tmp_path / "engine", "--rows", "full", "--break-verification", "--engine-args", NOT_COMPILED)
    assert done.returncode == 1
    assert "not verified: eager and full after " in done.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("options", "sentence"),
    [(["--rows", "half"], "--rows has 'half', expected some of full,"), (["--sequences", "0"], "--sequences is 0")],
)
def test_bad_options(options: list[str], sentence: str) -> None:
    with pytest.raises(SystemExit, match=sentence):
        engine.read_setting(engine.parser().parse_args(["--tiny", *options]))


def test_agreement() -> None:
    choice = Choice
    one = [[choice(1, {1: -1.0, 2: -1.1}), choice(3, {3: -0.5, 4: -2.0})]]

    def compare(*steps: Any, tolerance: float = 0.2) -> Any:
        return agreement.compare(one, [list(steps)], tolerance, ["x"])

    same = compare(*one[0])
    assert (same.tokens, same.compared, same.equal, same.difference) == (2, 2, 2, 0)
    # Both of the first two are near: the other choice ends the comparison, which half the tokens may do.
    tie = compare(choice(2, {1: -1.1, 2: -1.0}), choice(9, {9: -0.1}))
    assert (tie.compared, tie.equal) == (1, 0) and tie.difference == pytest.approx(0.1)
    with pytest.raises(Mismatch, match=r"token 0: the log-probability of 1 is -1\.0000 and -1\.3000"):
        compare(choice(2, {1: -1.3, 2: -1.0}), one[0][1])
    with pytest.raises(Mismatch, match="token 1: 3 is the best of one"):
        compare(one[0][0], choice(4, {4: -0.5, 5: -2.0}))
    with pytest.raises(Mismatch, match=r"is -0\.5000 and nan"):
        compare(one[0][0], choice(3, {3: math.nan}))
    with pytest.raises(Mismatch, match="only 1 of 4 tokens"):
        agreement.compare([[*one[0], *one[0]]], [[choice(2, {1: -1.1, 2: -1.0}), *[one[0][0]] * 3]], 0.2, ["x"])
    assert agreement.largest_difference(one, [[choice(1, {1: -1.5, 7: -1.2})]]) == pytest.approx(0.5)
    assert agreement.largest_difference(one, one) == 0


def test_aims() -> None:
    def row(sequences: int, first: float, token: float, full: bool = True) -> dict[str, Any]:
        decode = [{"batch": 4, "token_s": token, "tokens_per_s": 4 / token}]
        if sequences != 4:
            decode.append({"batch": sequences, "token_s": token, "tokens_per_s": sequences / token})
        return {"sequences": sequences, "full": full, "first_token_s": first, "decode": decode}

    def verdicts(setting: Any, ahn: dict[str, Any]) -> list[bool | None]:
        measured = {"full": row(4, 5.0, 0.01), "window": row(15, 2.0, 0.01), "ahn-gdn": ahn}
        return [entry["met"] for entry in engine_report.judge(setting, {"131072": measured, "32768": measured})]

    real = engine.read_setting(engine.parser().parse_args(["--layers", "9"]))
    assert (real.layers, real.contexts, real.capacity) == (9, (131072, 32768), 32768)
    assert verdicts(real, row(14, 2.09, 0.0109)) == [True] * 4 + [None] * 4
    assert verdicts(real, row(13, 2.2, 0.012)) == [False, False, False, False] + [None] * 4
    assert verdicts(real, row(14, 2.09, 0.0109, full=False)) == [None, None, True, True] + [None] * 4
    tiny = engine.read_setting(engine.parser().parse_args(["--tiny"]))
    assert verdicts(tiny, row(14, 2.09, 0.0109)) == [None] * 8
