"""Perplexity and cache by position as a picture."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vllm_ahn.errors import AHNError

COLOURS = ("#4d4d4d", "#b0762b", "#0b7fab", "#a03a8c", "#3f8f3a", "#c0392b")
FORMATS = (".png", ".svg", ".pdf")


def check_plot(path: Path | None = None) -> None:
    """Raise `AHNError` if nothing can be plotted here, or not to `path`."""
    if path is not None and path.suffix not in FORMATS:
        raise AHNError(f"--plot: {path} ends with {path.suffix!r}, expected {', '.join(FORMATS)}")
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise AHNError("matplotlib, which plots, is not installed: pip install 'vllm-ahn[plot]'") from None


def plot_positions(suite: dict[str, Any], title: str, path: Path) -> bool:
    """Plot perplexity by position on the left and the cache held on the right, a line for each measured row.

    Args:
        suite: of a report, with perplexity.
        path: to write, one of `FORMATS`.

    Returns:
        whether any row was measured, and so the plot written.
    """
    rows = [row for row in suite["rows"] if "perplexity" in row]
    if not rows:
        return False
    capacity = suite["setting"]["window"] + suite["setting"]["sinks"]
    check_plot(path)
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot, ticker

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(12, 4.4), layout="constrained")
    for row, label, colour in zip(rows, _short([row["label"] for row in rows]), itertools.cycle(COLOURS), strict=False):
        style = {"label": label, "color": colour, "linewidth": 1.8}
        left.plot(*_perplexity_points(row["perplexity"]), **style)
        right.plot(*_cache_points(row["perplexity"]), **style)
    right.set_ylim(bottom=0)
    right.yaxis.set_major_formatter(ticker.EngFormatter("B"))
    left.legend(frameon=False, fontsize=8.5)
    for axes, name in ((left, "perplexity"), (right, "cache held")):
        axes.axvline(capacity, color="#999999", linewidth=0.8, linestyle=(0, (4, 3)))
        axes.set_title(name, loc="left", fontsize=10)
        axes.set_xlabel(f"tokens before (window and sinks: {capacity:,})")
        axes.spines[["top", "right"]].set_visible(False)
        axes.xaxis.set_major_formatter(ticker.StrMethodFormatter("{x:,.0f}"))
    figure.suptitle(title, x=0.01, ha="left", fontsize=11, fontweight="bold")
    figure.savefig(path, dpi=150)
    pyplot.close(figure)
    return True


def _perplexity_points(measured: dict[str, Any]) -> tuple[list[float], list[float]]:
    buckets = [bucket for bucket in measured["buckets"] if bucket["perplexity"] is not None]
    return [(b["start"] + b["end"]) / 2 for b in buckets], [b["perplexity"] for b in buckets]


def _cache_points(measured: dict[str, Any]) -> tuple[list[int], list[int]]:
    # Whole steps only: each holds the step's own tokens too, and the text's last step and those after it hold fewer.
    held = [(at, size) for at, size in measured["held"] if at < measured["all"]["end"]] or measured["held"]
    return [at for at, _ in held], [size for _, size in held]


def _short(labels: Sequence[str]) -> list[str]:
    """Leave out the checkpoint, which the table names, where the rest tells the lines apart."""
    names = [label.partition(" (")[0] for label in labels]
    return [label if names.count(name) > 1 else name for label, name in zip(labels, names, strict=True)]
