"""The report as a person reads it."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from typing import Any

_PARTS = {
    "keys_and_values": "keys and values",
    "gates": "gates",
    "state": "state",
    "rounding": "whole pages",
    "held": "held",
    "in_flight": "in flight",
    "reserved": "reserved",
}


def text(report: dict[str, Any]) -> str:
    """Both tables for each length of a `report`."""
    model, settings = report["model"], report["settings"]
    lines = [
        f"{model['name']}: {model['layers']} layers, hidden size {model['hidden']:,}, {model['heads']} heads, "
        f"{model['kv_heads']} key/value heads, head size {model['head_size']}",
        f"window {report['window']:,} tokens + {report['sinks']:,} sinks",
    ]
    for entry in report["lengths"]:
        lines += ["", f"== {entry['length']:,} tokens ==", "", *_paper_table(entry), ""]
        lines += [
            *_vllm_table(entry, settings, report["cache_memory_bytes"]),
            "",
            *_parts_table(entry, settings["dtype"]),
        ]
    return "\n".join(lines)


def rounded(value: Fraction | float, digits: int) -> str:
    """`value` with `digits` decimals, halves away from zero as the paper's tables have them; thousands separated."""
    scaled = int(Fraction(value) * 10**digits + Fraction(1, 2))
    whole, rest = divmod(scaled, 10**digits)
    return f"{whole:,}.{rest:0{digits}d}" if digits else f"{whole:,}"


def percent(part: int, whole: int, digits: int = 1) -> str:
    """A share of 100, exact before it is rounded."""
    return rounded(Fraction(100 * part, whole), digits)


def size(value: int, unit: int) -> str:
    """``value / unit`` with as many decimals as are worth reading."""
    amount = Fraction(value, unit)
    return rounded(amount, 2 if amount >= Fraction(1, 10) else 5)


def _flops_unit(most: int) -> tuple[str, int]:
    units = (("PFLOP", 10**15), ("TFLOP", 10**12), ("GFLOP", 10**9))
    return next((unit for unit in units if most >= unit[1] // 10), units[-1])


def _cache_unit(most: int) -> tuple[str, int]:
    return ("GiB", 2**30) if most >= 2**27 else ("MiB", 2**20)


def _paper_table(entry: dict[str, Any]) -> list[str]:
    rows = entry["paper"]
    full = rows[0]
    name, unit = _flops_unit(full["mixing_flops"])
    gb, gb_unit = ("GB", 10**9) if full["cache_bytes"] >= 10**8 else ("MB", 10**6)
    columns = (("mixing_flops", unit), ("model_flops", unit), ("cache_bytes", gb_unit))
    header = [f"as the paper counts, {name} and {gb}", "mixing", "%", "model", "%", "cache", "%"]
    table = [
        [row["name"], *(cell for key, per in columns for cell in (size(row[key], per), percent(row[key], full[key])))]
        for row in rows
    ]
    return [*_aligned([header, *table]), "4 bytes an element; the gates of the tokens in the window are left out"]


def _vllm_table(entry: dict[str, Any], settings: dict[str, Any], memory: int) -> list[str]:
    rows = entry["vllm"]
    full = rows[0]
    name, unit = _flops_unit(full["mixing_flops"])
    gib, gib_unit = _cache_unit(full["held_bytes"])
    columns = (
        ("mixing_flops", unit),
        ("model_flops", unit),
        ("held_bytes", gib_unit),
        ("reserved_bytes", gib_unit),
    )
    fit = f"fit {rounded(Fraction(memory, 2**30), 0 if memory % 2**30 == 0 else 2)} GiB"
    header = [f"as vLLM allocates, {name} and {gib}", "mixing", "%", "model", "%", "held", "%", "reserved", "%"]
    header += [fit, "vLLM says"]
    table = [
        [
            row["name"],
            *(cell for key, per in columns for cell in (size(row[key], per), percent(row[key], full[key]))),
            f"{row['max_decoding']:,}",
            f"{row['max_concurrency']:,.2f}x",
        ]
        for row in rows
    ]
    steps = f"{settings['max_in_flight_tokens'] // settings['max_num_batched_tokens']} x "
    ranks = settings["tensor_parallel_size"]
    each = f", on each of {ranks} GPUs" if ranks > 1 else ""
    return [
        *_aligned([header, *table]),
        f"{settings['dtype']}, blocks of {settings['block_size']} tokens, "
        f"{steps}{settings['max_num_batched_tokens']:,} tokens in flight{each}",
        "held: by a sequence that decodes at this length; fit: as many such at a time in this much cache",
        'reserved: its most, in its prefill, chunks in flight included; vLLM says: its "Maximum concurrency" by that',
    ]


def _parts_table(entry: dict[str, Any], dtype: str) -> list[str]:
    counted = {row["name"]: rounded(row["percent"]["cache_bytes"], 2) for row in entry["paper"]}
    table = [["% of full attention's cache for", *_PARTS.values(), "paper"]]
    for row in entry["vllm"]:
        parts = dict(row["parts_percent"])
        parts["held"] = row["percent"]["held_bytes"]
        parts["reserved"] = row["percent"]["reserved_bytes"]
        table.append([row["name"], *(rounded(parts[key], 2) for key in _PARTS), counted.get(row["name"], "-")])
    return [
        *_aligned(table),
        f"paper: no gates, no rounding, and a state in the cache's dtype, here {dtype}, instead of float32",
    ]


def _aligned(table: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(len(row[column]) for row in table) for column in range(len(table[0]))]
    lines = []
    for row in table:
        cells = [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]
        lines.append("  ".join(cells).rstrip())
    lines.insert(1, "-" * max(map(len, lines)))
    return lines
