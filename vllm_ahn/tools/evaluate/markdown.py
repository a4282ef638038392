"""The report of an evaluation as Markdown."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Any

from tqdm import tqdm

from vllm_ahn.tools.evaluate.packages import require

NOTHING = "–"
_PER_SUITE = ("model", "revision", "tokenizer_revision", "max_model_len", "additional_config", "hf_overrides")
"""Arguments of the engine that suites and methods decide."""


def render(report: dict[str, Any], plots: dict[str, str]) -> str:
    """Return the whole report.

    Args:
        report: from `report.build_report`.
        plots: name of a suite -> file name of its plot, beside the report.
    """
    parts = [
        f"# {report['base']['name']} evaluated",
        "Rows marked *measured* are from this run. Rows marked *paper* are copied from arXiv 2510.07318 v2; nothing\n"
        f"here measured them. {NOTHING}: there is no such figure. Scores are in per cent; the average is the mean of\n"
        "the tasks.",
    ]
    for suite in report["suites"]:
        parts += _suite(suite, report["base"]["size"])
        if suite["name"] in plots:
            parts.append(f"![perplexity and cache by position]({plots[suite['name']]})")
    return "\n\n".join([*parts, *_how(report)]) + "\n"


def table(rows: Sequence[Sequence[str]], left: int = 1) -> str:
    """Return a Markdown table, its first row the head; the first `left` columns are aligned to the left."""
    align = ["left" if column < left else "right" for column in range(len(rows[0]))]
    tabulate = require("tabulate", "a table").tabulate
    return str(tabulate(rows[1:], headers=rows[0], tablefmt="pipe", disable_numparse=True, colalign=align))


def perplexity_table(suite: dict[str, Any]) -> str:
    """Return the table of a suite that measures perplexity."""
    capacity = suite["setting"]["window"] + suite["setting"]["sinks"]
    parts = [f"first {capacity:,} tokens", "beyond"]
    rows = [["", "perplexity", *parts, "bits per byte", *parts, "cache at the end"]]
    for row in suite["rows"]:
        cells = [NOTHING] * 7
        if measured := row.get("perplexity"):
            rates = [
                measured.get(part, {}).get(rate)
                for rate in ("perplexity", "bits_per_byte")
                for part in ("all", "within_window", "beyond_window")
            ]
            cells = [NOTHING if rate is None else f"{rate:.3f}" for rate in rates]
            size = tqdm.format_sizeof(measured["held"][-1][1])  # without a space: 590k
            cells.append(re.sub(r"([\d.]+)(\D*)", r"\1 \2B", size))
        rows.append([row["label"], *cells])
    return table(rows)


def short_names(tasks: Sequence[str]) -> list[str]:
    """Return names of tasks without the words that all of them begin and end with: for the head of a table."""
    words = [task.split("_") for task in tasks]
    for end in (0, -1) if len(words) > 1 else ():
        while all(len(task) > 1 for task in words) and len({task[end] for task in words}) == 1:
            for task in words:
                del task[end]
    return ["_".join(task) for task in words]


def _suite(suite: dict[str, Any], size: str | None) -> list[str]:
    setting, scored = suite["setting"], suite["kind"] == "lm_eval"
    lengths = (
        f"Window {setting['window']:,} tokens and {setting['sinks']:,} sinks (not for full attention); "
        f"{'prompts' if scored else 'texts'} of at most {setting['max_prompt_tokens']:,} tokens"
    )
    if scored:
        lengths += f", answers of at most {setting['max_answer_tokens']:,}, greedy"
    parts = [f"## {suite['title']}", f"{lengths}."]
    if suite["departures"]:
        unlike = " The figures cannot be compared with the paper's, so no difference is given." if scored else ""
        parts.append(f"**Not the paper's setting: {'; '.join(suite['departures'])}.**{unlike}")
    elif scored and size is None:
        parts.append("The paper has no rows for this base.")
    if suite["note"]:
        parts.append(suite["note"])
    parts.append(_scores(suite) if scored else perplexity_table(suite))
    parts += [f"{row['label']}: {why}" for row in suite["rows"] if (why := why_missing(row))]
    return parts


def why_missing(row: dict[str, Any]) -> str:
    """Return why a row of the report has no figures; empty if it has."""
    if row["status"] == "measured":
        return ""
    return f"failed: {row['why']}" if row["status"] == "failed" else str(row["why"])


def _scores(suite: dict[str, Any]) -> str:
    columns = [*suite["tasks"], "average"]

    def cells(values: dict[str, Any], form: str) -> list[str]:
        return [NOTHING if values.get(name) is None else form.format(values[name]) for name in columns]

    rows = [["", "", *short_names(suite["tasks"]), "average"]]
    counts: dict[str, int] = {}
    for row in suite["rows"]:
        rows.append([row["label"], row["status"], *cells(row.get("scores", {}) | row, "{:.2f}")])
        counts = row.get("samples", counts)
        if paper := row["paper"]:
            rows.append(["", f"*paper, {paper['model']}*", *cells(paper["scores"] | paper, "*{:.2f}*")])
        if "difference" in row:
            rows.append(["", "difference", *cells(row["difference"], "{:+.2f}")])
    if counts:
        rows.append(["samples", "", *cells(counts | {"average": sum(counts.values())}, "{}")])
    return table(rows, left=2)


def _how(report: dict[str, Any]) -> list[str]:
    base, runs = report["base"], report["runs"]
    which = f"commit {base['revision']}" if base["revision"] else f"files {base['files'][:12]}"
    versions = ", ".join(f"{name} {found}" for name, found in report["versions"].items())
    parts = ["## How it was measured", f"```bash\n{report['command']}\n```"]
    lines = [f"Base: {base['name']}, {which}.", f"Versions: {versions}."]
    if runs:
        common = {name: value for name, value in runs[0]["engine"].items() if name not in _PER_SUITE}
        lines.append(f"Arguments of the engine, the same for all methods of a suite: `{json.dumps(common)}`.")
    parts.append("\n".join(lines))
    if runs:
        parts.append(
            "Each row is a process of its own. Asked: requests that the model answered in the run that finished the\n"
            "row; kept: answers of earlier runs."
        )
        rows = [["suite", "method", "finished", "took", "asked", "kept", "device"]]
        for run in runs:
            took = tqdm.format_interval(run["seconds"])
            asked, kept = str(run["asked"]), str(run["kept"])
            rows.append([run["suite"], run["method"], run["finished"], took, asked, kept, run["device"]])
        parts.append(table(rows, left=4))
    return parts
