"""Decode memory and read-out: against flash-linear-attention's recurrent kernels, and against a plain copy."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch

from kernel_cases import oracles
from kernel_cases.layer import Step
from kernel_cases.oracles import compare, untouched, verify_memory
from kernel_cases.setting import Model, Row, Setting
from report import Aim, Mismatch
from vllm_ahn.kernels.settled import GRANULARITY
from vllm_ahn.memory.spec import MemorySpec

SPREAD = 32
"""Evicted tokens lie in so many positions after the sinks."""


def _from_32(sizes: dict[str, int]) -> bool:
    return sizes["batch"] >= 32


AIMS = [
    ("decode memory from batch 32 up, % of copy bandwidth", Aim(">=", 85), "% of copy", _from_32),
    ("decode memory, times as fast as flash-linear-attention on pages", Aim(">=", 1), "fla on pages/memory", None),
]


def state_bytes(memory: MemorySpec, head_size: int, element: int = 4) -> float:
    """Return bytes of state and kept updates that a decode moves for a head, on average over the steps to a boundary.

    The state is read in every step and written in one of them; of the updates those since the boundary are read and one
    is written.
    """
    rows = head_size * (1 + 1 / GRANULARITY) + (((GRANULARITY - 1) / 2 + 1) if memory.delta else 0)
    return element * head_size * rows


def _step(
    setting: Setting, model: Model, memory: MemorySpec, lengths: list[int], new: list[int] | None = None, **pages: Any
) -> Step:
    blocks = range(setting.sinks // setting.block_size, (setting.sinks + SPREAD) // setting.block_size + 1)
    return Step(setting, model, memory, lengths, new or [1] * len(lengths), blocks, **pages)


def _past(setting: Setting, requests: int) -> list[int]:
    """Return lengths past ``W + S``, at which requests have a state."""
    return (setting.capacity + 2 + torch.randint(SPREAD - 2, (requests,))).tolist()


def verify(setting: Setting, model: Model, memory: MemorySpec) -> None:
    """Verify batches of odd sizes, and the yardstick.

    In a batch requests decode past ``W + S``, enter the memory, are inside the window, bring two tokens, and pad the
    batch; what none of them is to read is NaN.
    """
    batches = [(requests, False) for requests in setting.verified_batches]
    for requests, vast in [*batches, (3, True)] if setting.on_gpu else batches:
        kinds = sorted((i % 5 if requests > 1 else 0 for i in range(requests)), key=lambda kind: kind == 4)
        inside = torch.randint(2, setting.capacity + 1, (requests,)).tolist()
        past = _past(setting, requests)
        lengths = [(past[i], setting.capacity + 1, inside[i], past[i], 0)[kind] for i, kind in enumerate(kinds)]
        new = [(1, 1, 1, 2, 0)[kind] for kind in kinds]
        step = _step(setting, model, memory, lengths, new, random=False, vast=vast)
        _verify(step, [i for i, kind in enumerate(kinds) if kind < 2])
    step = _step(setting, model, memory, _past(setting, max(setting.verified_batches)))
    fla = step.recurrent(on_pages=True)
    verify_memory("flash-linear-attention", step, list(step.reading), fla, mean=1e-2, most=3e-2)


def _verify(step: Step, decodes: list[int]) -> None:
    step.plan_decode()
    expected = torch.full_like(step.rows, -1)
    expected[decodes] = step.starts[decodes]
    if not torch.equal(step.rows, expected):
        raise Mismatch(f"find_steps, {step}: {step.rows.tolist()}, expected {expected.tolist()}")
    o = verify_memory("absorb_and_read_steps", step, decodes, step.decode, settled=True, mean=1e-5, most=1e-4)
    if not bool(o[expected < 0].isnan().all()):
        raise Mismatch(f"absorb_and_read_steps, {step}: wrote reads of requests that have nothing to read")

    rows = step.rows[decodes].long()
    wanted = step.output[rows].double() + oracles.read_out(step, rows, o[decodes])
    beside = torch.ones(len(step.output), dtype=torch.bool, device=rows.device).index_fill(0, rows, False)
    before = step.output[beside].clone()
    step.read_out(o, step.rows)
    compare(f"read_out, {step}", step.output[rows], wanted, mean=1e-2, most=3e-2)
    untouched(f"attention of tokens that read nothing, {step}", step.output[beside], before)


def _both(step: Step) -> None:
    step.decode()
    step.read_out(step.o, step.rows)


def measure(setting: Setting, model: Model, memory: MemorySpec) -> Iterator[Row]:
    """Time batches of decodes."""
    timer = setting.timer
    calls = {
        "memory": lambda step: step.decode,
        "read out": lambda step: partial(step.read_out, torch.randn_like(step.o), step.rows),
        "both": lambda step: partial(_both, step),
        "fla alone": lambda step: step.recurrent(on_pages=False),
        "fla on pages": lambda step: step.recurrent(on_pages=True),
    }
    heads, size = model.heads, model.head_size
    # State, keys, values and gates, query and read.
    request_bytes = heads * state_bytes(memory, size) + 2 * heads * 3 * size
    request_bytes += 2 * (GRANULARITY + 1) / 2 * (2 * model.kv_heads * size + heads * memory.num_gates)
    for requests in setting.decode_batches:
        moved = int(requests * request_bytes)
        # Weights, reads, gates, attention in and out.
        read_out_bytes = 2 * heads * size**2 + requests * heads * (8 * size + 4)
        steps = [_step(setting, model, memory, _past(setting, requests)) for _ in range(timer.sets(moved))]
        for step in steps:
            step.plan_decode()
        row = Row("decode", model.name, memory.name, {"batch": requests, "bytes": moved})
        row.times = {name: timer.graph([make(step) for step in steps]) for name, make in calls.items()}
        row.times["copy"] = timer.copy(moved)
        row.ratios = {
            "% of copy": timer.percent_of_copy(moved, row.microseconds("memory")),
            "read out, % of copy": timer.percent_of_copy(read_out_bytes, row.microseconds("read out")),
            **{f"{name}/memory": row.faster(name, "memory") for name in ("copy", "fla on pages", "fla alone")},
        }
        del step, steps  # before the next ones, which may take half the device
        yield row
