"""How curves of full attention, of a window and of an AHN look in every figure: colours, frame, and room for labels."""

from __future__ import annotations

from collections.abc import Sequence

# Blue and vermilion of Okabe and Ito's palette, which colour-blind readers tell apart, and greys for full attention.
FULL, FP8_CACHE, WINDOW, AHN = "#404040", "#8c8c8c", "#0072b2", "#d55e00"
STYLE = {"svg.fonttype": "none", "svg.hashsalt": "cost", "axes.spines.top": False, "axes.spines.right": False}
"""For matplotlib: text stays text, and axes have no frame."""


def spread(ends: Sequence[tuple[float, str, str]], gap: float) -> list[tuple[float, tuple[float, str, str]]]:
    """Heights for labels of curves that end at `ends`: at least `gap` apart, around their middle where they meet."""
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
