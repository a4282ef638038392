"""Prefill memory: from pages and back, against flash-linear-attention's chunk kernels alone."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch

from kernel_cases.layer import Step
from kernel_cases.oracles import verify_memory
from kernel_cases.setting import Model, Row, Setting
from vllm_ahn.memory.spec import MemorySpec

ALLOWED = {"mean": 1.5e-2, "most": 5e-2}
"""Errors in half precision: queries, keys, values and what the chunk kernels keep between them are rounded."""


def _step(setting: Setting, model: Model, memory: MemorySpec, absorbed: Sequence[int], **pages: Any) -> Step:
    """Return requests that absorb some tokens each; every other one enters the memory, and the others have a state."""
    lengths = [setting.capacity + (i + 1) % 2 + tokens for i, tokens in enumerate(absorbed)]
    size = setting.block_size
    blocks = range(setting.sinks // size, (setting.sinks + 1 + max(absorbed)) // size + 1)
    return Step(setting, model, memory, lengths, absorbed, blocks, **pages)


def verify(setting: Setting, model: Model, memory: MemorySpec) -> None:
    """Verify odd lengths in pages of NaN, and the lengths that are timed."""
    some = [(absorbed, {"random": False}) for absorbed in setting.verified_stretches]
    some += [(absorbed, {}) for absorbed in setting.stretches]
    if setting.on_gpu:
        some.append((setting.verified_stretches[-1], {"vast": True}))
    for absorbed, pages in some:
        step = _step(setting, model, memory, absorbed, **pages)
        verify_memory("prefill_memory", step, list(step.reading), step.prefill, **ALLOWED)


def measure(setting: Setting, model: Model, memory: MemorySpec) -> Iterator[Row]:
    """Time what some requests absorb together."""
    timer = setting.timer
    for absorbed in setting.stretches:
        step = _step(setting, model, memory, absorbed)
        row = Row("prefill", model.name, memory.name, {"requests": len(absorbed), "tokens": sum(absorbed)})
        row.times = {
            "memory": timer.stream(step.prefill),
            "fla alone": timer.stream(step.chunks()),
            "read out": timer.stream(partial(step.read_out, torch.randn_like(step.query), step.prefill_plan.reads)),
        }
        row.ratios = {
            "memory/fla alone": row.faster("memory", "fla alone"),
            "million tokens/s": sum(absorbed) / row.microseconds("memory"),
            "host, us": row.times["memory"].host or 0.0,
        }
        yield row
