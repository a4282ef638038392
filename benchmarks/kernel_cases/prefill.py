"""Prefill memory: from pages and back, against flash-linear-attention's chunk kernels alone."""

from __future__ import annotations

from functools import partial

import torch

from kernel_cases import oracles
from kernel_cases.layer import Layer, Step
from kernel_cases.oracles import compare, untouched
from kernel_cases.setting import Model, Row, Setting
from vllm_ahn.memory.spec import MemorySpec

MEAN, MOST = 1.5e-2, 5e-2
"""Errors allowed in half precision: queries, keys, values and what the chunk kernels keep between them are rounded."""


def _step(
    setting: Setting,
    model: Model,
    memory: MemorySpec,
    lengths: tuple[int, ...],
    *,
    random: bool = True,
    vast: bool = False,
) -> Step:
    """Return requests that absorb some tokens each; every other one enters the memory, and the others have a state."""
    lens = [setting.capacity + (i + 1) % 2 + length for i, length in enumerate(lengths)]
    size = setting.block_size
    blocks = range(setting.sinks // size, (setting.sinks + 1 + max(lengths)) // size + 1)
    return Layer(setting, model, memory, lens, lengths, blocks, random=random, vast=vast).step()


def verify(setting: Setting, model: Model, memory: MemorySpec) -> None:
    """Verify odd lengths in pages of NaN, and the lengths that are timed."""
    for lengths in setting.verified_stretches:
        _verify(_step(setting, model, memory, lengths, random=False))
    for lengths in setting.stretches:
        _verify(_step(setting, model, memory, lengths))
    if setting.on_gpu:
        _verify(_step(setting, model, memory, setting.verified_stretches[-1], vast=True))


def _verify(step: Step) -> None:
    pool = step.layer.pool
    wanted, states = oracles.memory_reads(step, list(step.reading))
    before = pool.other_pages(step.requests).clone()
    o = step.prefill()
    where = f"{step.layer.model.name} {step.memory.name}, {step.layer.new} tokens"
    compare(f"prefill_memory's reads, {where}", o, wanted, mean=MEAN, most=MOST)
    compare(f"prefill_memory's states, {where}", pool.states(step.requests), states, mean=MEAN, most=MOST)
    untouched(f"pages beside states, {where}", pool.other_pages(step.requests), before)


def measure(setting: Setting, model: Model, memory: MemorySpec) -> list[Row]:
    """Time what some requests absorb together."""
    timer, rows = setting.measures, []
    for lengths in setting.stretches:
        step = _step(setting, model, memory, lengths)
        row = Row("prefill", model.name, memory.name, {"requests": len(lengths), "tokens": sum(lengths)})
        row.times = {
            "memory": timer.stream(step.prefill),
            "fla alone": timer.stream(step.chunks()),
            "read out": timer.stream(partial(step.read_out, torch.randn_like(step.query), step.prefill_plan.reads)),
        }
        row.ratios = {
            "memory/fla alone": row.faster("memory", "fla alone"),
            "million tokens/s": sum(lengths) / row.microseconds("memory"),
            "host, us": row.times["memory"].host or 0.0,
        }
        rows.append(row)
    return rows
