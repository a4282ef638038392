"""The figures of `engine.py`: what they aim at, and tables for reading."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import report
from models import FULL, ROWS, SHAPES, WINDOW, Comparison
from report import NO_AIM, Aim
from vllm_ahn.config import NO_MEMORY

AIMED_CONTEXT = 131072
"""Tokens: where the aims hold."""

Figures = dict[str, Any]
Rows = dict[str, Figures]
GIB = 2**30


def _when_full(figure: Callable[[Figures], float]) -> Callable[[Figures, Figures], float | None]:
    """Return the ratio of a figure, where both rows have as many sequences as fit."""
    return lambda full, ahn: figure(ahn) / figure(full) if full["full"] and ahn["full"] else None


def decode_share(window: Figures, ahn: Figures) -> float | None:
    """Return what the memory adds to the time per token, at the largest batch that both were measured at."""
    both = {entry["batch"]: entry["token_s"] for entry in window["decode"]}
    shares = [entry["token_s"] / both[entry["batch"]] - 1 for entry in ahn["decode"] if entry["batch"] in both]
    return shares[-1] if shares else None


def at_most(row: Figures) -> Figures:
    """Return the decode figures at the most sequences that ran."""
    return next(entry for entry in row["decode"] if entry["batch"] == row["sequences"])


AIMS: list[tuple[str, str, Callable[[Figures, Figures], float | None], Aim]] = [
    (FULL, "sequences that fit, over full attention", _when_full(lambda row: row["sequences"]), Aim(">=", 3.5)),
    (
        FULL,
        "tokens per second when full, over full attention when full",
        _when_full(lambda row: at_most(row)["tokens_per_s"]),
        Aim(">=", 3),
    ),
    (
        WINDOW,
        "memory's share of prefill, over sinks + window",
        lambda window, ahn: ahn["first_token_s"] / window["first_token_s"] - 1,
        Aim("<=", 0.05),
    ),
    (WINDOW, "memory's share of decode, over sinks + window at the largest common batch", decode_share, Aim("<=", 0.1)),
]


def judge(setting: Comparison, contexts: dict[str, Rows]) -> list[dict[str, Any]]:
    """Return every aim for every memory and context; ``met`` is None where it is no aim or was not measured."""
    judged = []
    for context, rows in contexts.items():
        aimed = int(context) == AIMED_CONTEXT and setting.model != "tiny"
        for row in rows:
            if ROWS[row].memory in (None, NO_MEMORY):
                continue
            for against, what, measure, aim in AIMS:
                value = measure(rows[against], rows[row]) if against in rows else None
                figure = {"context": int(context), "row": row, "what": what, "value": value}
                judged.append(figure | (aim.judge(value) if aimed else NO_AIM))
    return judged


def paragraphs(setting: Comparison, result: dict[str, Any]) -> list[str]:
    """Return the result for reading."""
    machine, engines = result["machine"], list(result["engines"].values())
    devices = ", ".join(sorted({info["device"] for info in engines}))
    runners = ", ".join(sorted({info["runner"].rpartition(".")[0] for info in engines}))
    cache = f"{engines[0]['num_blocks'] * engines[0]['block_bytes'] / GIB:,.2f} GiB"
    turns = "one engine after the other" if setting.alone else "the engines lived side by side and took turns"
    text = (
        f"{devices}; {machine['cpu']}, {machine['cores']} cores; {machine['versions']}; {runners}. "
        f"{setting.describe()} (of {SHAPES[setting.model]['layers']}), random weights; W = {setting.window:,}, "
        f"S = {setting.sinks}; {setting.budget:,} tokens a step; {cache} of cache an engine; {turns}; medians of "
        f"{setting.repetitions} repetitions; {result['seconds']:.0f} s in all."
        + (f" Engine arguments: {setting.engine}." if setting.engine else "")
    )
    aims = []
    for entry in result["aims"]:
        value = "not measured" if entry["value"] is None else f"{entry['value']:.3f}"
        aims.append([f"{entry['context']:,}", entry["row"], entry["what"], value, report.verdict(entry)])
    parts = [text, report.table(["context", "row", "", "", "aim"], aims, left=3)]
    for context, rows in result["contexts"].items():
        parts += [f"## Contexts of {int(context):,} tokens", fits(setting, result["missing"], int(context), rows)]
        parts.append(speed(rows))
    return parts + report.checked(result["verified"])


def fits(setting: Comparison, missing: dict[str, str], context: int, rows: Rows) -> str:
    """Return a table of how many sequences fit, and what one takes."""
    layers = SHAPES[setting.model]["layers"]
    lines = []
    for name, row in rows.items():
        # Cache at the end of the context, all layers of the model that ran.
        whole = setting.keeps_all(name, context)
        each = (row["cache_bytes"] / row["vllm_count"] if whole else row["bytes_per_sequence"]) / setting.layers
        number = f"{row['sequences']}" if row["full"] else f"{row['sequences']} or more"
        cells = [f"{row['vllm_count']:.2f}", f"{each / 2**20:,.2f}", f"{int(100 * GIB / (each * layers)):,}"]
        lines.append([ROWS[name].text, number, row["why_no_more"], *cells])
    for name, text in missing.items():
        said = f"not supported by vLLM on this device: {text.strip().splitlines()[0]}"
        lines.append([ROWS[name].text, "", said, "", "", ""])
    computed = f"computed: in 100 GiB with {layers} layers"
    headers = ["row", "sequences", "no more because of", "vLLM's own count", "MiB a sequence and layer", computed]
    return report.table(headers, lines)


def speed(rows: Rows) -> str:
    """Return a table of times, and tokens per second with as many sequences as ran."""
    batches = sorted({entry["batch"] for row in rows.values() for entry in row["decode"]})
    lines = []
    for name, row in rows.items():
        times = {entry["batch"]: f"{1e3 * entry['token_s']:.2f}" for entry in row["decode"]}
        most = f"{at_most(row)['tokens_per_s']:,.0f}" if row["decode"] else ""
        cells = [times.get(batch, "") for batch in batches]
        lines.append([ROWS[name].text, f"{row['first_token_s']:.3f}", *cells, most])
    headers = ["row", "first token, s", *(f"{batch}: ms" for batch in batches), "tokens/s at the most"]
    return report.table(headers, lines)
