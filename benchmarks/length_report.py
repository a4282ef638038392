"""The figures of `length.py`: tables for reading, and curves."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from engine_rows import ROWS, Comparison

from vllm_ahn.tools.cost.curves import AHN, FULL, STYLE, WINDOW, spread

MIB = 2**20
PARTS: tuple[tuple[str, str, str, str, float], ...] = (
    ("Cache the request holds", "MiB", "cache_bytes", "cache_ratio", 1 / MIB),
    ("Time per token", "ms", "token_s", "token_ratio", 1e3),
    ("Time to the first token", "s", "first_token_s", "first_token_ratio", 1),
)
"""Title, unit, value, ratio of full attention's to it, and factor to the unit; the first two are drawn."""
CURVES = {
    "full": ("full attention", FULL),
    "window": ("sinks + window", WINDOW),
    "ahn-gdn": ("AHN, GatedDeltaNet", AHN),
}
"""Name and colour of each row's."""


def markdown(setting: Comparison, result: dict[str, Any]) -> str:
    """The result for reading."""
    lines = [
        "# Cache and time per token over the length of the context",
        "",
        f"    {result['command']}",
        "",
        f"{description(setting, result)}; {result['machine']['versions']}. One request in each of three engines, which "
        f"took turns of {setting.steps} decode steps. Times per token are medians over the turns of "
        f"the fastest of {setting.repetitions} repetition(s), their ratios medians over all, between turns of one "
        f"round; times to the first token are medians. The load of the machine before the repetitions was "
        f"{' and '.join(f'{load:.1f}' for load in result['loads'])}. {result['seconds']:.0f} s in all.",
    ]
    for title, unit, value, ratio, factor in PARTS:
        names = [ROWS[row].text for row in setting.rows]
        lines += ["", f"## {title}, {unit}", ""]
        lines.append(f"| tokens | {' | '.join(names)} | full / window | full / AHN |")
        lines.append("|--:|" + "--:|" * (len(names) + 2))
        for context, rows in result["contexts"].items():
            cells = [f"{factor * rows[row][value]:.2f}" for row in setting.rows]
            cells += [f"{rows[row][ratio]:.2f}" for row in setting.rows[1:]]
            lines.append(f"| {int(context):,} | {' | '.join(cells)} |")
    lines += ["", "Checked before timing:", ""]
    lines += [f"* {name}: {text}" for name, text in result["verified"].items()]
    return "\n".join(lines) + "\n"


def description(setting: Comparison, result: dict[str, Any]) -> str:
    """What ran, and on what."""
    info = next(iter(result["engines"].values()))
    compiled = "vLLM's default compilation" if info["compiled"] else "eager"
    return (
        f"{shape(setting)}, {setting.dtype}, random weights; W = {setting.window:,}, S = {setting.sinks}, blocks of "
        f"{info['block_size']}; {device(result)}, {compiled}"
    )


def device(result: dict[str, Any]) -> str:
    """What the engines ran on: the GPU, or the processor with the threads of one."""
    info = next(iter(result["engines"].values()))
    if info["device"] != "cpu":
        return str(info["device"])
    threads = "1 thread" if info["threads"] == 1 else f"{info['threads']} threads"
    return f"{result['machine']['cpu']}, {threads} an engine"


def shape(setting: Comparison) -> str:
    """The model, in words."""
    name = "a tiny model" if setting.model == "tiny" else f"Qwen2.5-{setting.model}'s shape"
    return f"{name} with {setting.layers} layers"


def draw(setting: Comparison, result: dict[str, Any], file: Path) -> None:
    """Draws cache on the left and time per token on the right, over length, a line a row. Needs matplotlib."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    with pyplot.rc_context(STYLE | {"font.size": 11, "lines.linewidth": 2}):
        figure, (cache, token) = pyplot.subplots(1, 2, figsize=(11, 4.4), layout="constrained")
        for axes, (title, unit, value, _, factor) in zip((cache, token), PARTS, strict=False):
            curves = {row: [factor * rows[row][value] for rows in result["contexts"].values()] for row in setting.rows}
            draw_part(axes, setting, curves, f"{title}, {unit}", unit)
        figure.suptitle(
            f"{shape(setting)}, {setting.dtype}; window {setting.window:,} + {setting.sinks} sinks; one request; "
            f"{device(result)}",
            x=0.01,
            ha="left",
            fontsize=10,
            color="#606060",
        )
        figure.savefig(file, dpi=150)
        pyplot.close(figure)


def draw_part(axes: Any, setting: Comparison, curves: dict[str, list[float]], title: str, unit: str) -> None:
    """Draws one panel: ``curves`` are values by row at every length, and end in their name and last value."""
    lengths = setting.contexts[::-1]
    top = 1.05 * max(map(max, curves.values()))
    axes.set_xscale("log", base=2)
    axes.set_xlim(lengths[0], lengths[-1])
    axes.set_xticks(lengths, [short(length) for length in lengths])
    axes.minorticks_off()
    axes.set_ylim(0, top)
    axes.set_xlabel("tokens of context")
    axes.set_title(title, loc="left", fontsize=12)
    axes.axvline(setting.capacity, color="#c8c8c8", linewidth=1, zorder=0)
    axes.annotate(
        "window + sinks",
        (setting.capacity, 1),
        (4, 0),
        xycoords=axes.get_xaxis_transform(),
        textcoords="offset points",
        va="top",
        color="#707070",
        fontsize=9,
    )
    for row, column in curves.items():
        axes.plot(lengths, column, color=CURVES[row][1], marker="o", markersize=4, clip_on=False)
    ends = [
        (column[-1] / top, f"{CURVES[row][0]}\n{column[-1]:.3g} {unit}", CURVES[row][1])
        for row, column in curves.items()
    ]
    for height, (_, label, colour) in spread(ends, 0.125):
        axes.annotate(
            label,
            (1, height),
            (10, 0),
            xycoords="axes fraction",
            textcoords="offset points",
            va="center",
            color=colour,
            linespacing=1.15,
        )


def short(length: int) -> str:
    """512, 1k, 2k."""
    return f"{length // 1024}k" if length % 1024 == 0 else f"{length}"
