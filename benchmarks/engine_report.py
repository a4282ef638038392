"""The figures of `engine.py`: what they aim at, and tables for reading."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from engine_rows import ROWS, Setting

from vllm_ahn.config import NO_MEMORY

AIMED_CONTEXT = 131072
"""Tokens: where the aims hold."""

Rows = dict[str, dict[str, Any]]
GIB = 2**30


def sequences_ratio(full: dict[str, Any], ahn: dict[str, Any]) -> float | None:
    """Sequences that fit, AHN over full attention."""
    return ahn["sequences"] / full["sequences"] if full["full"] and ahn["full"] else None


def throughput_ratio(full: dict[str, Any], ahn: dict[str, Any]) -> float | None:
    """Tokens per second with as many sequences as fit, AHN over full attention."""
    if not (full["full"] and ahn["full"]):
        return None
    return float(at_most(ahn)["tokens_per_s"] / at_most(full)["tokens_per_s"])


def prefill_share(window: dict[str, Any], ahn: dict[str, Any]) -> float | None:
    """What the memory adds to the time to the first token, over sinks and window alone."""
    return float(ahn["first_token_s"] / window["first_token_s"] - 1)


def decode_share(window: dict[str, Any], ahn: dict[str, Any]) -> float | None:
    """What the memory adds to the time per token, at the largest batch that both were measured at."""
    both = {entry["batch"]: entry for entry in window["decode"]}
    common = [entry for entry in ahn["decode"] if entry["batch"] in both]
    return common[-1]["token_s"] / both[common[-1]["batch"]]["token_s"] - 1 if common else None


Measure = Callable[[dict[str, Any], dict[str, Any]], float | None]
AIMS: list[tuple[str, str, Measure, str, float]] = [
    ("full", "sequences that fit, over full attention", sequences_ratio, ">=", 3.5),
    ("full", "tokens per second when full, over full attention when full", throughput_ratio, ">=", 3.0),
    ("window", "memory's share of prefill, over sinks + window", prefill_share, "<=", 0.05),
    ("window", "memory's share of decode, over sinks + window at the largest common batch", decode_share, "<=", 0.10),
]


def judge(setting: Setting, contexts: dict[str, Rows]) -> list[dict[str, Any]]:
    """Every aim for every memory and context; ``met`` is None where it is not aimed at or was not measured."""
    judged = []
    for context, rows in contexts.items():
        aimed = int(context) == AIMED_CONTEXT and setting.model != "tiny"
        for row in rows:
            if ROWS[row].memory in (None, NO_MEMORY):
                continue
            for against, what, measure, sign, bound in AIMS:
                value = measure(rows[against], rows[row]) if against in rows else None
                met = None
                if aimed and value is not None:
                    met = value >= bound if sign == ">=" else value <= bound
                judged.append(
                    {
                        "context": int(context),
                        "row": row,
                        "what": what,
                        "value": value,
                        "aim": f"{sign} {bound}" if aimed else None,
                        "met": met,
                    }
                )
    return judged


def at_most(row: dict[str, Any]) -> dict[str, Any]:
    """The decode figures at the most sequences that ran."""
    return next(entry for entry in row["decode"] if entry["batch"] == row["sequences"])


def markdown(setting: Setting, result: dict[str, Any]) -> str:
    """The result for reading."""
    lines = [*head(setting, result), *aims(result)]
    for context, rows in result["contexts"].items():
        lines += ["", f"## Contexts of {int(context):,} tokens", ""]
        lines += fits(setting, result, int(context), rows)
        lines += ["", *speed(rows)]
    lines += ["", "## Checked before timing", "", "| compared with | |", "|---|---|"]
    lines += [f"| {name} | {text} |" for name, text in result["verified"].items()]
    return "\n".join(lines) + "\n"


def head(setting: Setting, result: dict[str, Any]) -> list[str]:
    """What ran, and on what."""
    machine, engines = result["machine"], result["engines"]
    devices = ", ".join(sorted({info["device"] for info in engines.values()}))
    runners = ", ".join(sorted({info["runner"].rpartition(".")[0] for info in engines.values()}))
    layers = (
        f"{setting.layers} of {setting.all_layers} layers" if setting.layers != setting.all_layers else "all layers"
    )
    cache = f"{next(iter(engines.values()))['num_blocks'] * next(iter(engines.values()))['block_bytes'] / GIB:,.2f} GiB"
    turns = "one engine after the other" if setting.alone else "the engines lived side by side and took turns"
    extra = f" Engine arguments: {setting.engine}." if setting.engine else ""
    return [
        f"# vLLM at long contexts, {setting.model} shape",
        "",
        f"    {result['command']}",
        "",
        f"{devices}; {machine['cpu']}, {machine['cores']} cores; {machine['versions']}; {runners}. Random weights, "
        f"{layers}, {setting.dtype}; W = {setting.window:,}, S = {setting.sinks}; {setting.budget:,} tokens a step; "
        f"{cache} of cache an engine; {turns}; medians of {setting.repetitions} repetitions; "
        f"{result['seconds']:.0f} s in all.{extra}",
    ]


def aims(result: dict[str, Any]) -> list[str]:
    """The ratios, with pass or fail."""
    lines = ["", "| context | row | | | aim |", "|---|---|---|---|---|"]
    for entry in result["aims"]:
        value = "not measured" if entry["value"] is None else f"{entry['value']:.3f}"
        verdict = {True: ", met", False: ", missed", None: ""}[entry["met"]]
        aim = f"{entry['aim']}{verdict}" if entry["aim"] else ""
        lines.append(f"| {entry['context']:,} | {entry['row']} | {entry['what']} | {value} | {aim} |")
    return lines


def fits(setting: Setting, result: dict[str, Any], context: int, rows: Rows) -> list[str]:
    """How many sequences fit, and what one takes."""
    lines = [
        "| row | sequences | no more because of | vLLM's own count | MiB a sequence and layer "
        f"| computed: in 100 GiB with {setting.all_layers} layers |",
        "|---|---|---|---|---|---|",
    ]
    for name, row in rows.items():
        each = bytes_per_sequence(setting, name, context, row)
        computed = int(100 * GIB / (each / setting.layers * setting.all_layers))
        number = f"{row['sequences']}" if row["full"] else f"{row['sequences']} or more"
        lines.append(
            f"| {ROWS[name].text} | {number} | {row['why_no_more']} | {row['vllm_count']:.2f} "
            f"| {each / setting.layers / 2**20:,.2f} | {computed:,} |"
        )
    lines += [
        f"| {ROWS[name].text} | not supported by vLLM on this device: {first_line(text)} | | | | |"
        for name, text in result["missing"].items()
    ]
    return lines


def bytes_per_sequence(setting: Setting, name: str, context: int, row: dict[str, Any]) -> float:
    """Cache that a sequence takes at the end of the context, all layers of the model that ran."""
    if setting.keeps_all(name, context):
        return float(row["cache_bytes"] / row["vllm_count"])
    return float(row["bytes_per_sequence"])


def speed(rows: Rows) -> list[str]:
    """Times, and tokens per second with as many sequences as ran."""
    batches = sorted({entry["batch"] for row in rows.values() for entry in row["decode"]})
    lines = [
        f"| row | first token, s | {' | '.join(f'{batch}: ms' for batch in batches)} | tokens/s at the most |",
        "|---|---|" + "---|" * (len(batches) + 1),
    ]
    for name, row in rows.items():
        times = {entry["batch"]: f"{1e3 * entry['token_s']:.2f}" for entry in row["decode"]}
        cells = " | ".join(times.get(batch, "") for batch in batches)
        most = f"{at_most(row)['tokens_per_s']:,.0f}" if row["decode"] else ""
        lines.append(f"| {ROWS[name].text} | {row['first_token_s']:.3f} | {cells} | {most} |")
    return lines


def first_line(text: str) -> str:
    """A message without what follows its first line."""
    return text.strip().splitlines()[0]
