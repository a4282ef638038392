"""The report of an evaluation as JSON values: what was measured, beside what the paper reports, and how."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from vllm_ahn.tools.evaluate.base import Base
from vllm_ahn.tools.evaluate.jobs import versions
from vllm_ahn.tools.evaluate.methods import Method
from vllm_ahn.tools.evaluate.plan import Setting
from vllm_ahn.tools.evaluate.runner import Outcome


def build_report(outcomes: Sequence[Outcome], base: Base, command: str) -> dict[str, Any]:
    """Everything that a reader may want to know.

    Returns:
        ``base``, ``command`` and ``versions``; ``suites``, whose content depends only on what was asked and answered;
        ``runs``: when, where, and how often the model was asked.
    """
    settings = dict.fromkeys(outcome.row.setting for outcome in outcomes)
    return {
        "base": {"name": base.name, "revision": base.revision, "size": base.size, "files": base.files},
        "command": command,
        "versions": versions(),
        "suites": [
            _suite(setting, [outcome for outcome in outcomes if outcome.row.setting == setting], base)
            for setting in settings
        ],
        "runs": [_run(outcome) for outcome in outcomes if outcome.result is not None],
    }


def failed(report: dict[str, Any]) -> bool:
    """Whether any row has failed."""
    return any(row["status"] == "failed" for suite in report["suites"] for row in suite["rows"])


def _suite(setting: Setting, outcomes: Sequence[Outcome], base: Base) -> dict[str, Any]:
    suite = setting.suite
    departures = setting.departures()
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
        "rows": [_row(setting, outcome, base, comparable=not departures) for outcome in outcomes],
    }


def _row(setting: Setting, outcome: Outcome, base: Base, comparable: bool) -> dict[str, Any]:
    method = outcome.row.method
    row: dict[str, Any] = {"method": method.name, "label": _label(setting, method, base)}
    if setting.suite.kind == "lm_eval":
        row["paper"] = _paper(setting, method, base)
    if outcome.result is None:
        status = "failed" if outcome.error else "not run"
        return row | {"status": status, "why": outcome.error or outcome.row.note}
    row["status"] = "measured"
    if setting.suite.kind == "perplexity":
        return row | {"perplexity": outcome.result["perplexity"]}
    scores = outcome.result["scores"]
    row |= {
        "scores": {task: 100 * entry["score"] for task, entry in scores.items()},
        "stderr": {task: None if e["stderr"] is None else 100 * e["stderr"] for task, e in scores.items()},
        "samples": {task: entry["samples"] for task, entry in scores.items()},
        "all_samples": {task: entry["all"] for task, entry in scores.items()},
        "average": setting.suite.average({task: entry["score"] for task, entry in scores.items()}),
    }
    if comparable and row["paper"] is not None:
        ours = row["scores"] | {"average": row["average"]}
        theirs = row["paper"]["scores"] | {"average": row["paper"]["average"]}
        row["difference"] = {name: ours[name] - score for name, score in theirs.items() if score is not None}
    return row


def _label(setting: Setting, method: Method, base: Base) -> str:
    if method.name == "yarn" and (factor := base.yarn_factor(setting.max_model_len)) is not None:
        return f"{method.label} ×{factor}"
    return method.label


def _paper(setting: Setting, method: Method, base: Base) -> dict[str, Any] | None:
    """The paper's row in per cent; None if it has no figure for this base and method."""
    suite = setting.suite
    if base.size is None or method.paper is None:
        return None
    scores = {task: suite.paper_score(base.size, method.paper, task) for task in suite.tasks}
    average = suite.paper_score(base.size, method.paper)
    found = {task: score for task, score in scores.items() if score is not None}
    if not found and average is None:
        return None
    return {"model": f"Qwen2.5-{base.size}-Instruct", "method": method.paper, "scores": found, "average": average}


def _run(outcome: Outcome) -> dict[str, Any]:
    job, result = outcome.row.job, outcome.result
    assert job is not None and result is not None
    facts = {name: result[name] for name in ("finished", "seconds", "asked", "kept", "device", "versions")}
    return {"suite": job.suite, "method": job.label, **facts, "engine": job.engine}


def short_names(tasks: Sequence[str]) -> list[str]:
    """Names of tasks without the words that all of them begin and end with: for the head of a table."""
    words = [task.split("_") for task in tasks]
    if len(words) < 2:
        return list(tasks)
    while all(len(task) > 1 for task in words) and len({task[0] for task in words}) == 1:
        words = [task[1:] for task in words]
    while all(len(task) > 1 for task in words) and len({task[-1] for task in words}) == 1:
        words = [task[:-1] for task in words]
    return ["_".join(task) for task in words]
