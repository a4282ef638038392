"""Cache and FLOPs over the length of a sequence, as curves."""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

from vllm_ahn.config import AHNConfig
from vllm_ahn.errors import AHNError
from vllm_ahn.tools.cost import flops
from vllm_ahn.tools.cost.allocation import FP8, ahn_attention, full_attention
from vllm_ahn.tools.cost.curves import AHN, FP8_CACHE, FULL, STYLE, WINDOW, spread
from vllm_ahn.tools.cost.report import FULL_ROW, Question, row_name

_CACHE_UNITS = (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10))
_FLOPS_UNITS = (("PFLOP", 10**15), ("TFLOP", 10**12), ("GFLOP", 10**9))
_POINTS = 128
"""Min number of lengths at which a curve is computed."""


@dataclasses.dataclass(frozen=True)
class _Curve:
    label: str
    colour: str
    value: Callable[[int], int]
    """At a length in tokens: bytes or FLOPs."""


def draw_plot(question: Question, file: pathlib.Path) -> None:
    """Draw the curves of `question` up to twice its greatest length, at least four times window and sinks.

    Of several memories only the first is drawn: on this scale the others are one line with it. Needs matplotlib.
    Raises `AHNError` if `file` cannot be written.
    """
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    shape, settings, first = question.model.shape, question.settings, question.configs[0]
    path = pathlib.Path(question.model.name)
    model = path.stem if path.suffix == ".json" else path.name
    each = f" on each of {settings.tensor_parallel_size} GPUs" if settings.tensor_parallel_size > 1 else ""
    with pyplot.rc_context(STYLE | {"font.size": 10}):
        figure, (cache, work) = pyplot.subplots(1, 2, figsize=(11, 4.6), layout="constrained")
        _draw(cache, _cache_curves(question), question, _CACHE_UNITS)
        _draw(work, _flops_curves(question), question, _FLOPS_UNITS)
        cache.set_title(f"Cache a sequence holds while it decodes{each}", loc="left", fontsize=11)
        work.set_title("FLOPs to process it, whole model", loc="left", fontsize=11)
        heading = (
            f"{model}: {shape.layers} layers, {shape.heads} heads, {shape.kv_heads} key/value heads, "
            f"{settings.dtype}; window {first.window:,} + {first.sinks:,} sinks"
        )
        figure.suptitle(heading, x=0.01, ha="left", fontsize=10, color="#606060")
        try:
            figure.savefig(file, dpi=150)
        except OSError as error:
            raise AHNError(f"--plot is {file}, which cannot be written ({error.strerror})") from None
        finally:
            pyplot.close(figure)


def _cache_curves(question: Question) -> list[_Curve]:
    shape, settings = question.model.shape, question.settings

    def full(dtype: str) -> Callable[[int], int]:
        return lambda length: full_attention(shape, settings, length, dtype).held_bytes

    def ahn(config: AHNConfig) -> Callable[[int], int]:
        return lambda length: ahn_attention(shape, settings, length, config).held_bytes

    curves = [
        _Curve(f"{FULL_ROW}, {dtype}", colour, full(dtype))
        for dtype, colour in ((settings.dtype, FULL), (FP8, FP8_CACHE))
    ]
    return curves + [_Curve(row_name(config), colour, ahn(config)) for config, colour in _drawn(question)]


def _flops_curves(question: Question) -> list[_Curve]:
    def model_flops(config: AHNConfig | None) -> Callable[[int], int]:
        return lambda length: flops.model_flops(question.model.shape, length, config)

    curves = [_Curve(FULL_ROW, FULL, model_flops(None))]
    return curves + [_Curve(row_name(config), colour, model_flops(config)) for config, colour in _drawn(question)]


def _drawn(question: Question) -> list[tuple[AHNConfig, str]]:
    return list(zip(question.configs, (WINDOW, AHN), strict=False))


def _draw(axes: Any, curves: Sequence[_Curve], question: Question, units: Sequence[tuple[str, int]]) -> None:
    capacity = question.configs[0].capacity
    end = max(2 * max(question.lengths), 4 * capacity)
    step = max(1, end // _POINTS)
    lengths = sorted({*range(step, end + 1, step), capacity, capacity + 1, end, *question.lengths})
    values = [[curve.value(length) for length in lengths] for curve in curves]
    unit, per = next((unit for unit in units if max(map(max, values)) >= unit[1] / 2), units[-1])
    for curve, column in zip(curves, values, strict=True):
        axes.plot([n / 1000 for n in lengths], [value / per for value in column], color=curve.colour, linewidth=2)
    ends = [(column[-1] / per, curve.label, curve.colour) for curve, column in zip(curves, values, strict=True)]
    top = max(ends)[0]
    for y, (value, label, colour) in spread(ends, 0.11 * top):
        axes.text(end / 1000 * 1.02, y, f"{label}\n{value:.3g} {unit}", color=colour, va="center", linespacing=1.15)
    for row, length in enumerate(sorted(set(question.lengths))):
        index = lengths.index(length)
        _mark(axes, length, values[-1][index] / per, values[0][index] / per, curves[-1].colour, row, end)
    axes.set_xlim(0, end / 1000)
    axes.set_ylim(0, top * 1.04)
    axes.set_xlabel("tokens of the sequence, thousands")
    axes.set_ylabel(unit)


def _mark(axes: Any, length: int, value: float, full: float, colour: str, row: int, end: int) -> None:
    """Draw a line at a length that was asked for, and say beside it which share of full attention `value` is."""
    axes.axvline(length / 1000, color="#d0d0d0", linewidth=1, zorder=0)
    axes.plot(length / 1000, value, "o", color=colour, markersize=5)
    left = length > 0.25 * end
    # Above all curves, which are low wherever a length that was asked for can be; one under the other.
    axes.annotate(
        f"{length:,} tokens:\n{100 * value / full:.0f} % of full",
        (length / 1000, 1 - 0.13 * row),
        (-4 if left else 4, 0),
        xycoords=axes.get_xaxis_transform(),
        textcoords="offset points",
        ha="right" if left else "left",
        va="top",
        color=colour,
        fontsize=9,
    )
