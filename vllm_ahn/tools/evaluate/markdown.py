"""The report of an evaluation as Markdown, to be read by people."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from vllm_ahn.tools.evaluate.progress import duration
from vllm_ahn.tools.evaluate.report import short_names

NOTHING = "–"
_ENGINE_NAMED = ("model", "revision", "tokenizer_revision", "max_model_len", "additional_config", "hf_overrides")


def render(report: dict[str, Any], plots: dict[str, str]) -> str:
    """The whole report.

    Args:
        report: of `report.build_report`.
        plots: name of a suite -> file name of its plot, beside the report.
    """
    base = report["base"]
    lines = [f"# {base['name']} evaluated", ""]
    lines += [
        "Rows marked *measured* are of this run. Rows marked *paper* are copied from arXiv 2510.07318 v2; nothing here",
        f"measured them. {NOTHING}: there is no such figure. Scores are in per cent; the average is the plain mean of",
        "the tasks.",
        "",
    ]
    for suite in report["suites"]:
        lines += _suite(suite, base["size"], plots.get(suite["name"]))
    lines += _how(report)
    return "\n".join(lines) + "\n"


def table(rows: Sequence[Sequence[str]], left: int = 1) -> list[str]:
    """A Markdown table, its first row the head; the first `left` columns are aligned to the left."""
    widths = [max(3, *(len(row[column]) for row in rows)) for column in range(len(rows[0]))]
    aligned = [
        "| "
        + " | ".join(
            cell.ljust(w) if n < left else cell.rjust(w) for n, (cell, w) in enumerate(zip(row, widths, strict=True))
        )
        + " |"
        for row in rows
    ]
    rule = "|" + "|".join("-" * (w + 2) if n < left else "-" * (w + 1) + ":" for n, w in enumerate(widths)) + "|"
    return [aligned[0], rule, *aligned[1:]]


def _suite(suite: dict[str, Any], size: str | None, plot: str | None) -> list[str]:
    setting = suite["setting"]
    lines = [f"## {suite['title']}", ""]
    lines.append(
        f"Window {setting['window']:,} tokens and {setting['sinks']:,} sinks (not for full attention); "
        + (
            f"prompts of at most {setting['max_prompt_tokens']:,} tokens, answers of at most "
            f"{setting['max_answer_tokens']:,}, greedy."
            if suite["kind"] == "lm_eval"
            else f"texts of at most {setting['max_prompt_tokens']:,} tokens."
        )
    )
    if suite["departures"]:
        lines += ["", f"**Not the paper's setting: {'; '.join(suite['departures'])}.**"]
        if suite["kind"] == "lm_eval":
            lines[-1] += " The figures cannot be compared with the paper's, so no difference is given."
    elif suite["kind"] == "lm_eval" and size is None:
        lines += ["", "The paper has no rows for this base."]
    if suite["note"]:
        lines += ["", suite["note"]]
    lines.append("")
    lines += table(_scores(suite), left=2) if suite["kind"] == "lm_eval" else table(perplexity_table(suite))
    for row in suite["rows"]:
        if row["status"] != "measured":
            lines += [
                "",
                f"{row['label']}: {'failed: ' if row['status'] == 'failed' else ''}{row['why']}",
            ]
    if plot:
        lines += ["", f"![perplexity and cache by position]({plot})"]
    return [*lines, ""]


def _scores(suite: dict[str, Any]) -> list[list[str]]:
    tasks = suite["tasks"]
    rows = [["", "", *short_names(tasks), "average"]]
    counts: dict[str, int] = {}
    for row in suite["rows"]:
        status = row["status"]
        scores = row["scores"] | {"average": row["average"]} if status == "measured" else {}
        rows.append([row["label"], status, *_figures(scores, tasks, "{:.2f}")])
        counts = row.get("samples", counts)
        if paper := row["paper"]:
            figures = _figures(paper["scores"] | {"average": paper["average"]}, tasks, "*{:.2f}*")
            rows.append(["", f"*paper, {paper['model']}*", *figures])
        if "difference" in row:
            rows.append(["", "difference", *_figures(row["difference"], tasks, "{:+.2f}")])
    if counts:
        rows.append(["samples", "", *(str(counts[task]) for task in tasks), str(sum(counts.values()))])
    return rows


def _figures(values: dict[str, float | None], tasks: Sequence[str], form: str) -> list[str]:
    found = [values.get(name) for name in (*tasks, "average")]
    return [NOTHING if value is None else form.format(value) for value in found]


def perplexity_table(suite: dict[str, Any]) -> list[list[str]]:
    capacity = suite["setting"]["window"] + suite["setting"]["sinks"]
    parts = [f"first {capacity:,} tokens", "beyond"]
    rows = [["", "perplexity", *parts, "bits per byte", *parts, "cache at the end"]]
    for row in suite["rows"]:
        measured = row.get("perplexity")
        cells = [NOTHING] * 7
        if measured:
            rates = [
                NOTHING if (value := measured.get(name, {}).get(rate)) is None else f"{value:.3f}"
                for rate in ("perplexity", "bits_per_byte")
                for name in ("all", "inside", "beyond")
            ]
            cells = [*rates, size(measured["held"][-1][1])]
        rows.append([row["label"], *cells])
    return rows


def size(count: float) -> str:
    """Bytes for people."""
    for unit, factor in (("GB", 1e9), ("MB", 1e6)):
        if count >= factor:
            return f"{count / factor:.2f} {unit}"
    return f"{count / 1e3:.0f} kB"


def _how(report: dict[str, Any]) -> list[str]:
    base, runs = report["base"], report["runs"]
    lines = ["## How it was measured", "", "```bash", report["command"], "```", ""]
    what = f"commit {base['revision']}" if base["revision"] else f"files {base['files'][:12]}"
    lines.append(f"Base: {base['name']}, {what}.")
    lines.append("Versions: " + ", ".join(f"{name} {found}" for name, found in report["versions"].items()) + ".")
    if runs:
        common = {k: v for k, v in runs[0]["engine"].items() if k not in _ENGINE_NAMED}
        lines.append(f"Arguments of the engine, the same for all methods of a suite: `{json.dumps(common)}`.")
        lines += [
            "",
            "Each row is a process of its own. Asked: requests that the model answered in the run that finished the",
            "row; kept: answers of earlier runs.",
            "",
        ]
        head = ["suite", "method", "finished", "took", "asked", "kept", "device"]
        rows = [
            [
                run["suite"],
                run["method"],
                run["finished"],
                duration(run["seconds"]),
                str(run["asked"]),
                str(run["kept"]),
                run["device"],
            ]
            for run in runs
        ]
        lines += table([head, *rows], left=4)
    return lines
