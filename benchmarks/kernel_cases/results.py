"""Figures, aims, and how they are printed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from kernel_cases.timing import Times


@dataclass
class Row:
    """One measurement: a kernel, or several that do the same thing, at one size."""

    case: str
    model: str
    memory: str
    sizes: dict[str, int]
    times: dict[str, Times] = field(default_factory=dict)
    ratios: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Aim:
    """What was hoped for, and the measurement that is farthest from it."""

    text: str
    bound: str
    """``>=`` or ``<=``"""
    wanted: float
    measured: float | None
    """None: nothing was measured."""
    where: str

    @property
    def met(self) -> bool | None:
        if self.measured is None:
            return None
        return self.measured >= self.wanted if self.bound == ">=" else self.measured <= self.wanted

    @classmethod
    def least(cls, text: str, wanted: float, rows: Sequence[Row], ratio: str) -> Aim:
        """That a ratio is at least ``wanted`` in all rows."""
        return cls._of(text, ">=", wanted, min(rows, key=lambda row: row.ratios[ratio], default=None), ratio)

    @classmethod
    def most(cls, text: str, wanted: float, rows: Sequence[Row], ratio: str) -> Aim:
        """That a ratio is at most ``wanted`` in all rows."""
        return cls._of(text, "<=", wanted, max(rows, key=lambda row: row.ratios[ratio], default=None), ratio)

    @classmethod
    def _of(cls, text: str, bound: str, wanted: float, row: Row | None, ratio: str) -> Aim:
        if row is None:
            return cls(text, bound, wanted, None, "not measured")
        sizes = ", ".join(f"{name} {value}" for name, value in row.sizes.items() if name != "bytes")
        return cls(text, bound, wanted, row.ratios[ratio], f"{row.model} {row.memory}, {sizes}")


def table(rows: Sequence[Row]) -> str:
    """Rows of one case, medians in microseconds, then ratios."""
    if not rows:
        return "nothing was timed"
    sizes, times, ratios = (
        list(dict.fromkeys(name for row in rows for name in getattr(row, kind)))
        for kind in ("sizes", "times", "ratios")
    )
    sizes = [name for name in sizes if name != "bytes"]
    header = ["model", "memory", *sizes, *(f"{name}, us" for name in times), *ratios]
    lines = [header]
    for row in rows:
        cells = [row.model, row.memory, *(f"{row.sizes[name]:,}" if name in row.sizes else "" for name in sizes)]
        cells += [_figure(row.times[name].median) if name in row.times else "" for name in times]
        cells += [_figure(row.ratios[name]) if name in row.ratios else "" for name in ratios]
        lines.append(cells)
    widths = [max(len(line[i]) for line in lines) for i in range(len(header))]
    return "\n".join("  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)) for line in lines)


def _figure(value: float) -> str:
    """Three digits or more."""
    return f"{value:.2f}" if value < 10 else f"{value:.1f}" if value < 1000 else f"{value:,.0f}"


def verdict(aim: Aim) -> str:
    """An aim in one line."""
    if aim.measured is None:
        return f"  ?   {aim.text} {aim.bound} {aim.wanted:g}: not measured"
    return (
        f"{'pass' if aim.met else 'FAIL'}  {aim.text} {aim.bound} {aim.wanted:g}: "
        f"{_figure(aim.measured)} at worst ({aim.where})"
    )


def as_json(aim: Aim) -> dict[str, Any]:
    return {
        "aim": aim.text,
        "bound": aim.bound,
        "wanted": aim.wanted,
        "measured": aim.measured,
        "where": aim.where,
        "met": aim.met,
    }
