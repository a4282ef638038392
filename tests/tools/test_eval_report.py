"""The report's content where figures can be compared with the paper's, and the progress line."""

from __future__ import annotations

import json
from typing import Any

import pytest

from vllm_ahn.tools.evaluate import markdown
from vllm_ahn.tools.evaluate.methods import Base, Method
from vllm_ahn.tools.evaluate.plan import Row, Setting
from vllm_ahn.tools.evaluate.progress import Progress
from vllm_ahn.tools.evaluate.report import build_report, failed
from vllm_ahn.tools.evaluate.runner import Outcome
from vllm_ahn.tools.evaluate.suites import SUITES

QWEN_7B = {
    "model_type": "qwen2",
    "num_hidden_layers": 28,
    "hidden_size": 3584,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "max_position_embeddings": 32768,
    "rope_theta": 1000000.0,
}
BASE = Base("Qwen/Qwen2.5-7B-Instruct", "abc", QWEN_7B, "abc")
METHODS = [
    Method("full", "full attention", paper="full"),
    Method("yarn", "full attention, YaRN"),
    Method("window", "sinks + window", ahn="none", paper="window"),
    Method("CKPT", "AHN-GDN (CKPT)", ahn="CKPT", paper="GDN"),
]


def outcome(suite: str, method: Method, score: float | None, **change: Any) -> Outcome:
    """A row that has `score`, 0 to 1, in every task; None: it has failed."""
    chosen = SUITES[suite]
    setting = Setting(
        chosen, **({"max_model_len": chosen.max_model_len, "window": chosen.window, "sinks": 128} | change)
    )
    row = Row(setting, method, {"model": "m", "dtype": "auto"})
    if score is None:
        return Outcome(row, error="OutOfMemoryError: too long")
    scores = {task: {"score": score, "stderr": None, "samples": 3, "all": 3} for task in chosen.tasks}
    facts = {"finished": "then", "seconds": 1.0, "asked": 3, "kept": 0, "device": "d", "versions": {}}
    return Outcome(row, {"scores": scores, "average": score, **facts})


def render(outcomes: list[Outcome], base: Base = BASE) -> tuple[dict[str, Any], str]:
    report = build_report(outcomes, base, "vllm-ahn eval ...")
    return json.loads(json.dumps(report)), markdown.render(report, {})


def test_beside_the_papers_rows() -> None:
    scores = [None, 0.06, 0.05, 0.07]
    report, text = render([outcome("lveval-128k", *row) for row in zip(METHODS, scores, strict=True)])
    full, yarn, window, gdn = report["suites"][0]["rows"]
    assert failed(report) and full["status"] == "failed" and full["paper"]["average"] == 3.62 and "scores" not in full
    assert yarn["paper"] is None and "difference" not in yarn
    assert window["difference"] == {"average": pytest.approx(5.0 - 5.34)}
    assert gdn["difference"] == {"average": pytest.approx(7.0 - 6.54)}
    lines = {tuple(cell.strip() for cell in line.split("|")[1:3]): line for line in text.splitlines() if "|" in line}
    cells = {key: [cell.strip() for cell in line.split("|")[3:-1]] for key, line in lines.items()}
    assert cells["full attention", "failed"] == ["–"] * 12
    assert cells["full attention, YaRN ×8", "measured"] == ["6.00"] * 12
    assert cells["AHN-GDN (CKPT)", "measured"] == ["7.00"] * 12
    papers = [line for line in text.splitlines() if "*paper, Qwen2.5-7B-Instruct*" in line]
    assert [line.split("|")[-2].strip() for line in papers] == ["*3.62*", "*5.34*", "*6.54*"]
    assert all(line.count("–") == 11 for line in papers)
    differences = [line.split("|")[-2].strip() for line in text.splitlines() if "| difference" in line]
    assert differences == ["-0.34", "+0.46"]
    assert "full attention: failed: OutOfMemoryError: too long\n" in text and "Not the paper's setting" not in text


def test_a_figure_of_one_task() -> None:
    """RULER: the paper has one task and no average."""
    report, text = render([outcome("ruler-128k", METHODS[3], 0.25)])
    (row,) = report["suites"][0]["rows"]
    assert row["paper"]["average"] is None and row["paper"]["scores"] == {"niah_single_1": 26.8}
    assert row["difference"] == {"niah_single_1": pytest.approx(25 - 26.8)}
    assert "| single_1 | single_2 |" in " ".join(text.split())
    paper = next(line for line in text.splitlines() if "*26.80*" in line)
    assert paper.count("–") == 8 and not failed(report)


@pytest.mark.parametrize("change", [{"limit": 3}, {"window": 1000}, {"sinks": 64}, {"max_model_len": 65536}])
def test_no_difference_for_what_cannot_be_compared(change: dict[str, int]) -> None:
    report, text = render([outcome("lveval-128k", METHODS[2], 0.05, **change)])
    (row,) = report["suites"][0]["rows"]
    assert row["paper"]["average"] == 5.34 and "difference" not in row and "| difference" not in text
    assert "**Not the paper's setting: " in text and "cannot be compared with the paper's" in text


def test_a_base_that_the_paper_does_not_have() -> None:
    other = Base("other", None, {**QWEN_7B, "num_hidden_layers": 29}, "abc")
    report, text = render([outcome("lveval-128k", METHODS[2], 0.05)], other)
    assert report["suites"][0]["rows"][0]["paper"] is None and "The paper has no rows for this base." in text
    assert "*paper, " not in text


def test_yarn_and_unscaled_positions() -> None:
    assert BASE.yarn_factor(32768) is None and BASE.overrides(32768, yarn=True) == {} and BASE.overrides(32768) == {}
    assert BASE.overrides(131072, yarn=True) == {
        "max_position_embeddings": 131072,
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 1000000.0,
            "factor": 4.0,
            "original_max_position_embeddings": 32768,
        },
    }
    assert BASE.yarn_factor(131073) == 5 and BASE.overrides(131073) == {"max_position_embeddings": 131073}
    scaled = Base("scaled", None, {**QWEN_7B, "rope_scaling": {"type": "yarn", "factor": 4.0}}, "")
    for yarn in (True, False):
        with pytest.raises(ValueError, match=r"scales its positions itself .rope type 'yarn'. up to 32768 tokens"):
            scaled.overrides(32769, yarn)


def test_short_names() -> None:
    assert markdown.short_names(["ahn_lveval_a_b_128k", "ahn_lveval_c_128k"]) == ["a_b", "c"]
    assert markdown.short_names(["niah_single_1", "niah_single_2"]) == ["1", "2"] and markdown.short_names(
        ["one_task"]
    ) == ["one_task"]
    assert markdown.short_names(["a_b", "a_b_c"]) == ["b", "b_c"]


def test_progress(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Which suite, method and task, how many of how many, and when it will be done."""
    now = [1000.0]
    monkeypatch.setattr("tqdm.std.time", lambda: now[0])
    shown = Progress(2)
    shown.start("longbench, AHN")
    shown.total({"a": 3, "b": 1})
    shown.answer("a", kept=True)
    for task, seconds in (("a", 40), ("a", 80), ("b", 90)):
        now[0] = 1000.0 + seconds
        shown.answer(task, kept=False)
    shown.end("done")
    shown.close()
    lines = capsys.readouterr().err.replace("\r", "\n").splitlines()
    assert lines[-1] == "[1/2] longbench, AHN: done" and (shown.asked, shown.kept) == (3, 1)
    # What was kept does not count: one answer in 40 s, two to come.
    line = next(line for line in lines if "2/4" in line)
    assert line.startswith("[1/2] longbench, AHN:") and "00:40<01:20" in line and line.endswith(", a]")
    assert "4/4" in lines[-2] and lines[-2].endswith(", b]")
