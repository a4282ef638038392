"""Cache and FLOPs over the length of a sequence, as curves."""

from __future__ import annotations

import pathlib
from collections.abc import Callable, Sequence
from typing import Any

from vllm_ahn.config import AHNConfig
from vllm_ahn.errors import AHNError
from vllm_ahn.tools.cost import flops
from vllm_ahn.tools.cost.allocation import FP8, Allocation, ahn_attention, full_attention
from vllm_ahn.tools.cost.curves import AHN, FP8_CACHE, FULL, STYLE, WINDOW, spread
from vllm_ahn.tools.cost.report import Question

Curve = tuple[str, str, Callable[[int], float]]
"""Label, colour, and the value at a length."""


def plot(question: Question, file: pathlib.Path) -> None:
    """Draws the curves of `question` up to twice its greatest length, at least four times window and sinks.

    Of several memories only the first is drawn: on this scale the others are one line with it. Needs matplotlib.
    Raises `AHNError` if `file` cannot be written.
    """
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    capacity = question.configs[0].capacity
    end = max(2 * max(question.lengths), 4 * capacity)
    with pyplot.rc_context(STYLE | {"font.size": 10}):
        figure, (cache, work) = pyplot.subplots(1, 2, figsize=(11, 4.6), layout="constrained")
        _draw(cache, _cache_curves(question), question, end)
        _draw(work, _flops_curves(question), question, end)
        shape, settings = question.model.shape, question.settings
        each = f" on each of {settings.tensor_parallel_size} GPUs" if settings.tensor_parallel_size > 1 else ""
        cache.set_title(f"Cache a sequence holds while it decodes{each}", loc="left", fontsize=11)
        work.set_title("FLOPs to process it, whole model", loc="left", fontsize=11)
        figure.suptitle(
            f"{_model_name(question)}: {shape.layers} layers, {shape.heads} heads, "
            f"{shape.kv_heads} key/value heads, {settings.dtype}; window {question.configs[0].window:,} "
            f"+ {question.configs[0].sinks:,} sinks",
            x=0.01,
            ha="left",
            fontsize=10,
            color="#606060",
        )
        try:
            figure.savefig(file, dpi=150)
        except OSError as error:
            raise AHNError(f"--plot is {file}, which cannot be written ({error.strerror})") from None
        finally:
            pyplot.close(figure)


def _model_name(question: Question) -> str:
    path = pathlib.Path(question.model.name)
    return path.stem if path.suffix == ".json" else path.name


def _cache_curves(question: Question) -> list[Curve]:
    shape, settings = question.model.shape, question.settings

    def held(allocate: Callable[[int], Allocation]) -> Callable[[int], float]:
        return lambda length: float(allocate(length).held_bytes)

    curves: list[Curve] = [
        (
            f"full attention, {settings.dtype}",
            FULL,
            held(lambda length: full_attention(shape, settings, length, settings.dtype)),
        ),
        ("full attention, fp8", FP8_CACHE, held(lambda length: full_attention(shape, settings, length, FP8))),
    ]
    for name, colour, config in _rows(question.configs):

        def allocate(length: int, config: AHNConfig = config) -> Allocation:
            return ahn_attention(shape, settings, length, config)

        curves.append((name, colour, held(allocate)))
    return curves


def _flops_curves(question: Question) -> list[Curve]:
    shape = question.model.shape
    curves: list[Curve] = [("full attention", FULL, lambda length: flops.model_flops(shape, length, None))]
    for name, colour, config in _rows(question.configs):

        def work(length: int, config: AHNConfig = config) -> float:
            return flops.model_flops(shape, length, config)

        curves.append((name, colour, work))
    return curves


def _rows(configs: Sequence[AHNConfig]) -> list[tuple[str, str, AHNConfig]]:
    rows = [("sinks + window", WINDOW, configs[0])]
    return rows + [(f"AHN, {config.memory}", AHN, config) for config in configs[1:2]]


def _draw(axes: Any, curves: Sequence[Curve], question: Question, end: int) -> None:
    capacity = question.configs[0].capacity
    step = max(1, end // 128)
    lengths = sorted({*range(step, end + 1, step), capacity, capacity + 1, end, *question.lengths})
    values = [[value(length) for length in lengths] for _, _, value in curves]
    unit, per = _unit(max(map(max, values)), is_cache=len(curves) > 1 and "fp8" in curves[1][0])
    thousand = 1000
    ends = []
    for (label, colour, _), column in zip(curves, values, strict=True):
        xs, ys = [length / thousand for length in lengths], [value / per for value in column]
        axes.plot(xs, ys, color=colour, linewidth=2)
        ends.append((ys[-1], label, colour))
    top = max(y for y, _, _ in ends)
    for y, (value, label, colour) in spread(ends, 0.11 * top):
        axes.text(end / thousand * 1.02, y, f"{label}\n{value:.3g} {unit}", color=colour, va="center", linespacing=1.15)
    for row, length in enumerate(sorted(set(question.lengths))):
        index, x = lengths.index(length), length / thousand
        full, last = values[0][index], values[-1][index]
        axes.axvline(x, color="#d0d0d0", linewidth=1, zorder=0)
        axes.plot(x, last / per, "o", color=curves[-1][1], markersize=5)
        # Above all curves, which are low wherever a length that was asked for can be; one under the other.
        axes.annotate(
            f"{length:,} tokens:\n{100 * last / full:.0f} % of full",
            (x, 1 - 0.13 * row),
            (-4 if x > 0.25 * end / thousand else 4, 0),
            xycoords=axes.get_xaxis_transform(),
            textcoords="offset points",
            ha="right" if x > 0.25 * end / thousand else "left",
            va="top",
            color=curves[-1][1],
            fontsize=9,
        )
    axes.set_xlim(0, end / thousand)
    axes.set_ylim(0, top * 1.04)
    axes.set_xlabel("tokens of the sequence, thousands")
    axes.set_ylabel(unit)


def _unit(most: float, is_cache: bool) -> tuple[str, float]:
    units: Sequence[tuple[str, float]] = (
        (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10))
        if is_cache
        else (("PFLOP", 1e15), ("TFLOP", 1e12), ("GFLOP", 1e9))
    )
    return next((unit for unit in units if most >= unit[1] / 2), units[-1])
