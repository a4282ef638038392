"""The report as a person reads it."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from typing import Any

from tabulate import SEPARATING_LINE, DataRow, Line, TableFormat, tabulate

_PARTS = {
    "keys_and_values": "keys and values",
    "gates": "gates",
    "state": "state",
    "slots": "slots",
    "rounding": "whole pages",
    "held": "held",
    "in_flight": "in flight",
    "reserved": "reserved",
}
_FORMAT = TableFormat(
    lineabove=None,
    linebelowheader=Line("", "-", "--", ""),
    linebetweenrows=None,
    linebelow=None,
    headerrow=DataRow("", "  ", ""),
    datarow=DataRow("", "  ", ""),
    padding=0,
    with_header_hide=None,
)
_FLOPS = (("PFLOP", 10**15), ("TFLOP", 10**12), ("GFLOP", 10**9))


def format_report(report: dict[str, Any]) -> str:
    """Return all tables of `report`, from `vllm_ahn.tools.cost.report.build_report`, for each of its lengths."""
    model, settings = report["model"], report["settings"]
    lines = [
        f"{model['name']}: {model['layers']} layers, hidden size {model['hidden']:,}, {model['heads']} heads, "
        f"{model['kv_heads']} key/value heads, head size {model['head_size']}",
        f"window {report['window']:,} tokens + {report['sinks']:,} sinks",
    ]
    for entry in report["lengths"]:
        lines += [
            f"\n== {entry['length']:,} tokens ==\n",
            _paper_table(entry["paper"]),
            "4 bytes an element; the gates of the tokens in the window are left out\n",
            _vllm_table(entry["vllm"], report["cache_memory_bytes"]),
            *_vllm_notes(settings),
            *_checkpoint_notes(entry["vllm"]),
            "",
            _parts_table(entry),
            f"paper: no gates, no rounding, and a state in the cache's dtype, here {settings['dtype']}, instead of "
            f"{report['state_dtype']}",
        ]
    return "\n".join(lines)


def rounded(value: Fraction | float, digits: int) -> str:
    """Return `value` with `digits` decimals, halves away from zero as in the paper's tables, thousands separated."""
    scaled = int(Fraction(value) * 10**digits + Fraction(1, 2))
    whole, rest = divmod(scaled, 10**digits)
    return f"{whole:,}.{rest:0{digits}d}" if digits else f"{whole:,}"


def percent(part: int, whole: int, digits: int = 1) -> str:
    """Return the share of `part` in percent, exact before it is rounded."""
    return rounded(Fraction(100 * part, whole), digits)


def _size(value: int, unit: int) -> str:
    # As many decimals as are worth reading.
    amount = Fraction(value, unit)
    return rounded(amount, 2 if amount >= Fraction(1, 10) else 5)


def _paper_table(rows: Sequence[dict[str, Any]]) -> str:
    flops, unit = _flops_unit(rows)
    cache, cache_unit = ("GB", 10**9) if rows[0]["cache_bytes"] >= 10**8 else ("MB", 10**6)
    header = [f"as the paper counts, {flops} and {cache}", "mixing", "%", "model", "%", "cache", "%"]
    columns = {"mixing_flops": unit, "model_flops": unit, "cache_bytes": cache_unit}
    return _table(header, [[row["name"], *_sizes_and_shares(row, rows[0], columns)] for row in rows])


def _vllm_table(rows: Sequence[dict[str, Any]], memory: int) -> str:
    flops, unit = _flops_unit(rows)
    cache, cache_unit = ("GiB", 2**30) if rows[0]["held_bytes"] >= 2**27 else ("MiB", 2**20)
    fit = f"fit {rounded(Fraction(memory, 2**30), 0 if memory % 2**30 == 0 else 2)} GiB"
    header = [f"as vLLM allocates, {flops} and {cache}", "mixing", "%", "model", "%", "held", "%", "reserved", "%"]
    columns = {"mixing_flops": unit, "model_flops": unit, "held_bytes": cache_unit, "reserved_bytes": cache_unit}
    table = [
        [
            row["name"],
            *_sizes_and_shares(row, rows[0], columns),
            f"{row['max_decoding']:,}",
            f"{row['max_concurrency']:,.2f}x",
        ]
        for row in rows
    ]
    return _table([*header, fit, "vLLM says"], table)


def _vllm_notes(settings: dict[str, Any]) -> list[str]:
    steps = f"{settings['max_in_flight_tokens'] // settings['max_num_batched_tokens']} x "
    ranks = settings["tensor_parallel_size"]
    each = f", on each of {ranks} GPUs" if ranks > 1 else ""
    return [
        f"{settings['dtype']}, blocks of {settings['block_size']} tokens, "
        f"{steps}{settings['max_num_batched_tokens']:,} tokens in flight{each}",
        "held: by a sequence that decodes at this length; fit: how many of these such a cache holds at a time",
        'reserved: its maximum, during prefill, chunks in flight included; vLLM says: its "Maximum concurrency"',
    ]


def _checkpoint_notes(rows: Sequence[dict[str, Any]]) -> list[str]:
    blocks = [
        f"{row['name'].removeprefix('AHN, ')} {row['checkpoint_blocks']}" for row in rows if row["checkpoint_blocks"]
    ]
    return [f"blocks of a checkpoint in the prefix cache, where there is room: {', '.join(blocks)}"] if blocks else []


def _parts_table(entry: dict[str, Any]) -> str:
    counted = {row["name"]: rounded(row["percent"]["cache_bytes"], 2) for row in entry["paper"]}
    table = []
    for row in entry["vllm"]:
        shares = row["parts_percent"] | {key: row["percent"][f"{key}_bytes"] for key in ("held", "reserved")}
        table.append([row["name"], *(rounded(shares[key], 2) for key in _PARTS), counted.get(row["name"], "-")])
    return _table(["% of full attention's cache for", *_PARTS.values(), "paper"], table)


def _sizes_and_shares(row: dict[str, Any], full: dict[str, Any], columns: dict[str, int]) -> list[str]:
    return [cell for key, unit in columns.items() for cell in (_size(row[key], unit), percent(row[key], full[key]))]


def _flops_unit(rows: Sequence[dict[str, Any]]) -> tuple[str, int]:
    flops = rows[0]["mixing_flops"]
    return next((unit for unit in _FLOPS if flops >= unit[1] // 10), _FLOPS[-1])


def _table(header: list[str], rows: list[list[str]]) -> str:
    # As a row, since tabulate makes columns wider than a header.
    table = [header, SEPARATING_LINE, *rows]
    alignment = ["left", *["right"] * (len(header) - 1)]
    return tabulate(table, tablefmt=_FORMAT, colalign=alignment, disable_numparse=True)
