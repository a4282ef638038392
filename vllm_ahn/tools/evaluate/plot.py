"""Perplexity and cache by position as a picture."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vllm_ahn.errors import AHNError

COLOURS = ("#4d4d4d", "#b0762b", "#0b7fab", "#a03a8c", "#3f8f3a", "#c0392b")
FORMATS = (".png", ".svg", ".pdf")
_GAP = 0.055
"""Least distance between two labels, of the height of the plot."""


def check_plot(path: Path | None = None) -> None:
    """Raises `AHNError` if nothing can be plotted here, or not to `path`."""
    if path is not None and path.suffix not in FORMATS:
        raise AHNError(f"--plot: {path} ends with {path.suffix!r}, expected {', '.join(FORMATS)}")
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise AHNError("matplotlib, which plots, is not installed: pip install 'vllm-ahn[plot]'") from None


def plot_positions(rows: Sequence[dict[str, Any]], capacity: int, title: str, path: Path) -> None:
    """Writes perplexity by position on the left, the cache held on the right, a line a row.

    Args:
        rows: measured rows of a report, with ``label`` and ``perplexity``.
        capacity: W + S, which is marked.
        path: one of `FORMATS`.
    """
    check_plot(path)
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    caches = [_cache_points(row) for row in rows]
    unit, factor = _unit(max(held for points in caches for _, held in points))
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(12, 4.4), layout="constrained")
    curves: list[tuple[Any, list[list[tuple[float, float]]], str]] = [
        (left, [_perplexity_points(row) for row in rows], "perplexity"),
        (right, [[(at, held / factor) for at, held in points] for points in caches], f"cache held, {unit}"),
    ]
    for axes, lines, name in curves:
        for points, colour in zip(lines, itertools.cycle(COLOURS), strict=False):
            axes.plot(*zip(*points, strict=True), color=colour, linewidth=1.8)
        low = 0.0 if axes is right else 0.95 * min(value for points in lines for _, value in points)
        axes.set_ylim(low, 1.08 * max(value for points in lines for _, value in points))
        axes.axvline(capacity, color="#999999", linewidth=0.8, linestyle=(0, (4, 3)))
        axes.annotate(
            f" window and sinks, {capacity:,}", (capacity, 1), xycoords=("data", "axes fraction"), va="bottom",
            fontsize=8, color="#777777", ha="left",
        )  # fmt: skip
        axes.set_xlabel("tokens before")
        axes.set_title(name, loc="left", fontsize=10, pad=18)
        axes.spines[["top", "right"]].set_visible(False)
        axes.xaxis.set_major_formatter(matplotlib.ticker.FuncFormatter(lambda value, _: f"{value:,.0f}"))
        _label(axes, _short([row["label"] for row in rows]), [points[-1] for points in lines])
    figure.suptitle(title, x=0.01, ha="left", fontsize=11, fontweight="bold")
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def _perplexity_points(row: dict[str, Any]) -> list[tuple[float, float]]:
    return [
        ((bucket["start"] + bucket["end"]) / 2, bucket["perplexity"])
        for bucket in row["perplexity"]["buckets"]
        if bucket["perplexity"] is not None
    ]


def _cache_points(row: dict[str, Any]) -> list[tuple[float, float]]:
    # Those of whole steps: each has the step's own tokens in it, and the last of the text, and what is generated
    # after it, have fewer.
    held, end = row["perplexity"]["held"], row["perplexity"]["all"]["end"]
    return [(at, size) for at, size in held if at < end] or held


def _label(axes: Any, labels: Sequence[str], ends: Sequence[tuple[float, float]]) -> None:
    """Writes each label at the end of its line, moved apart where they would lie over each other."""
    low, high = axes.get_ylim()
    order = sorted(range(len(ends)), key=lambda number: ends[number][1])
    below = -_GAP
    for number in order:
        below = max((ends[number][1] - low) / (high - low), below + _GAP)
        axes.annotate(
            labels[number], (1.01, below), xycoords="axes fraction", va="center", fontsize=8.5,
            color=COLOURS[number % len(COLOURS)], annotation_clip=False,
        )  # fmt: skip


def _short(labels: Sequence[str]) -> list[str]:
    """Without the checkpoint, which the table has, where the rest says which line it is."""
    names = [label.partition(" (")[0] for label in labels]
    return [label if names.count(name) > 1 else name for label, name in zip(labels, names, strict=True)]


def _unit(most: float) -> tuple[str, float]:
    return next((unit, factor) for unit, factor in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3), ("B", 1)) if most >= factor)
