"""The curves of `length.py`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from models import AHN, FULL, WINDOW, Comparison
from vllm_ahn.tools.cost import curves
from vllm_ahn.tools.evaluate.plot import check_plot

__all__ = ["PARTS", "check_plot", "device", "draw"]

PARTS: tuple[tuple[str, str, str, str, float], ...] = (
    ("Cache the request holds", "MiB", "cache_bytes", "cache_ratio", 2**-20),
    ("Time per token", "ms", "token_s", "token_ratio", 1e3),
    ("Time to the first token", "s", "first_token_s", "first_token_ratio", 1),
)
"""Title, unit, value, ratio of full attention's to it, and factor to the unit; the first two are drawn."""
CURVES = {
    FULL: ("full attention", curves.FULL),
    WINDOW: ("sinks + window", curves.WINDOW),
    AHN: ("AHN, GatedDeltaNet", curves.AHN),
}
"""Name and colour of each row's."""


def device(result: dict[str, Any]) -> str:
    """Return what the engines ran on: the GPU, or the processor with the threads of one."""
    info = next(iter(result["engines"].values()))
    if info["device"] != "cpu":
        return str(info["device"])
    threads = "1 thread" if info["threads"] == 1 else f"{info['threads']} threads"
    return f"{result['machine']['cpu']}, {threads} an engine"


def draw(setting: Comparison, result: dict[str, Any], file: Path) -> None:
    """Draw cache on the left and time per token on the right, over length, a line a row. Needs matplotlib."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    with pyplot.rc_context(curves.STYLE | {"font.size": 11, "lines.linewidth": 2}):
        figure, panels = pyplot.subplots(1, 2, figsize=(11, 4.4), layout="constrained")
        for axes, (title, unit, value, _, factor) in zip(panels, PARTS, strict=False):
            values = {row: [factor * rows[row][value] for rows in result["contexts"].values()] for row in setting.rows}
            _draw_panel(axes, setting, values, unit)
            axes.set_title(f"{title}, {unit}", loc="left", fontsize=12)
        text = f"{setting.describe()}; window {setting.window:,} + {setting.sinks} sinks; one request; {device(result)}"
        figure.suptitle(text, x=0.01, ha="left", fontsize=10, color="#606060")
        figure.savefig(file, dpi=150)
        pyplot.close(figure)


def _draw_panel(axes: Any, setting: Comparison, values: dict[str, list[float]], unit: str) -> None:
    """Draw lines of ``values`` by row at every length, which end in their name and last value."""
    lengths = setting.contexts[::-1]
    top = 1.05 * max(map(max, values.values()))
    axes.set_xscale("log", base=2)
    axes.set_xlim(lengths[0], lengths[-1])
    axes.set_xticks(lengths, [f"{n // 1024}k" if n % 1024 == 0 else f"{n}" for n in lengths])
    axes.minorticks_off()
    axes.set_ylim(0, top)
    axes.set_xlabel("tokens of context")
    axes.axvline(setting.capacity, color="#c8c8c8", linewidth=1, zorder=0)
    at_top = {"xycoords": axes.get_xaxis_transform(), "textcoords": "offset points", "va": "top"}
    axes.annotate("window + sinks", (setting.capacity, 1), (4, 0), color="#707070", fontsize=9, **at_top)
    ends = []
    for row, column in values.items():
        name, colour = CURVES[row]
        axes.plot(lengths, column, color=colour, marker="o", markersize=4, clip_on=False)
        ends.append((column[-1] / top, f"{name}\n{column[-1]:.3g} {unit}", colour))
    at_end = {"xycoords": "axes fraction", "textcoords": "offset points", "va": "center", "linespacing": 1.15}
    for height, (_, label, colour) in curves.spread(ends, 0.125):
        axes.annotate(label, (1, height), (10, 0), color=colour, **at_end)
