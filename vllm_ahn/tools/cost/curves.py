"""How curves of full attention, of a window and of an AHN look in every figure: colours, frame, and room for labels."""

from __future__ import annotations

import pathlib
from collections.abc import Sequence

from vllm_ahn.errors import AHNError

# Blue and vermilion of Okabe and Ito's palette, which colour-blind readers tell apart, and greys for full attention.
FULL, FP8_CACHE, WINDOW, AHN = "#404040", "#8c8c8c", "#0072b2", "#d55e00"
STYLE = {"svg.fonttype": "none", "svg.hashsalt": "cost", "axes.spines.top": False, "axes.spines.right": False}
"""For matplotlib: text stays text, and axes have no frame."""


def check_plot(name: str) -> None:
    """Raise `AHNError` if no figure can be written to the file `name`, or if matplotlib is missing."""
    path = pathlib.Path(name)
    if path.suffix not in (".png", ".svg", ".pdf"):
        raise AHNError(f"--plot is {name}, expected a file name that ends in .png, .svg or .pdf")
    if not path.parent.is_dir():
        raise AHNError(f"--plot is {name}, expected a file in a folder that exists")
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise AHNError('--plot needs matplotlib, which is not installed: pip install "vllm-ahn[plot]"') from None


def spread(ends: Sequence[tuple[float, str, str]], gap: float) -> list[tuple[float, tuple[float, str, str]]]:
    """Place labels of curves that end at `ends` at least `gap` apart, around their middle where they meet.

    Args:
        ends: last value, label and colour of each curve.
        gap: the min distance of two labels, in the unit of the values.

    Returns:
        The height of each label, and its entry of `ends`.
    """
    clusters: list[list[tuple[float, str, str]]] = []
    for entry in sorted(ends):
        if clusters and entry[0] - clusters[-1][-1][0] < gap:
            clusters[-1].append(entry)
        else:
            clusters.append([entry])
    placed = []
    for cluster in clusters:
        middle = sum(value for value, _, _ in cluster) / len(cluster)
        lowest = max(gap / 2, middle - gap * (len(cluster) - 1) / 2)
        placed += [(lowest + gap * index, entry) for index, entry in enumerate(cluster)]
    return placed
