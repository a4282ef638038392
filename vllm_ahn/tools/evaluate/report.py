"""The report of an evaluation as JSON values: what was measured, beside what the paper reports, and how."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from vllm_ahn.tools.evaluate.methods import Base, Method
from vllm_ahn.tools.evaluate.plan import Setting, versions
from vllm_ahn.tools.evaluate.runner import Outcome
from vllm_ahn.tools.evaluate.suites import Suite


def build_report(outcomes: Sequence[Outcome], base: Base, command: str) -> dict[str, Any]:
    """Return all that a reader may want to know.

    Returns:
        ``base``, ``command`` and ``versions``; ``suites``, whose content depends only on what was asked and answered;
        ``runs``: when, where, and how often the model was asked.
    """
    by_setting: dict[Setting, list[Outcome]] = {}
    for outcome in outcomes:
        by_setting.setdefault(outcome.row.setting, []).append(outcome)
    return {
        "base": {"name": base.name, "revision": base.revision, "size": base.size, "files": base.files},
        "command": command,
        "versions": versions(),
        "suites": [_suite(setting, found, base) for setting, found in by_setting.items()],
        "runs": [_run(outcome, outcome.result) for outcome in outcomes if outcome.result is not None],
    }


def failed(report: dict[str, Any]) -> bool:
    """Return whether any row has failed."""
    return any(row["status"] == "failed" for suite in report["suites"] for row in suite["rows"])


def _suite(setting: Setting, outcomes: Sequence[Outcome], base: Base) -> dict[str, Any]:
    suite, departures = setting.suite, setting.departures()
    return {
        "name": suite.name,
        "title": suite.title,
        "kind": suite.kind,
        "note": suite.note,
        "tasks": list(suite.tasks),
        "setting": {
            "window": setting.window,
            "sinks": setting.sinks,
            "max_model_len": setting.max_model_len,
            "max_prompt_tokens": setting.prompt_tokens,
            "max_answer_tokens": suite.max_answer_tokens,
            "limit": setting.limit,
        },
        "departures": departures,
        "rows": [_row(outcome, base, comparable=not departures) for outcome in outcomes],
    }


def _row(outcome: Outcome, base: Base, comparable: bool) -> dict[str, Any]:
    setting, method, result = outcome.row.setting, outcome.row.method, outcome.result
    suite, label = setting.suite, method.label
    if method.name == "yarn" and (factor := base.yarn_factor(setting.max_model_len)) is not None:
        label += f" ×{factor}"
    row: dict[str, Any] = {"method": method.name, "label": label}
    if suite.kind == "lm_eval":
        row["paper"] = _paper(suite, method, base)
    if result is None:
        return row | {"status": "failed" if outcome.error else "not run", "why": outcome.error or outcome.row.not_run}
    row["status"] = "measured"
    if suite.kind == "perplexity":
        return row | {"perplexity": result["perplexity"]}
    scores = result["scores"]
    row |= {
        "scores": {task: 100 * entry["score"] for task, entry in scores.items()},
        "stderr": {task: None if e["stderr"] is None else 100 * e["stderr"] for task, e in scores.items()},
        "samples": {task: entry["samples"] for task, entry in scores.items()},
        "all_samples": {task: entry["all"] for task, entry in scores.items()},
        "average": 100 * result["average"],
    }
    if comparable and row["paper"] is not None:
        ours = row["scores"] | {"average": row["average"]}
        theirs = row["paper"]["scores"] | {"average": row["paper"]["average"]}
        row["difference"] = {name: ours[name] - score for name, score in theirs.items() if score is not None}
    return row


def _paper(suite: Suite, method: Method, base: Base) -> dict[str, Any] | None:
    """Return the paper's row in per cent; None if it has no figure for this base and method."""
    figures = {task: score for (*row, task), score in suite.paper.items() if row == [base.size, method.paper]}
    if not figures:
        return None
    average = figures.pop(None, None)
    model = f"Qwen2.5-{base.size}-Instruct"
    return {"model": model, "method": method.paper, "scores": figures, "average": average}


def _run(outcome: Outcome, result: dict[str, Any]) -> dict[str, Any]:
    facts = {name: result[name] for name in ("finished", "seconds", "asked", "kept", "device", "versions")}
    row = outcome.row
    return {"suite": row.setting.suite.name, "method": row.method.label, **facts, "engine": row.engine}
