"""Decode memory and read-out: against flash-linear-attention's recurrent kernels, and against a plain copy."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch

from kernel_cases import oracles
from kernel_cases.layer import Layer, Step
from kernel_cases.oracles import compare, untouched
from kernel_cases.setting import Model, Row, Setting
from kernel_cases.timing import Call
from report import Aim, Mismatch
from vllm_ahn.memory.spec import MemorySpec

SPREAD = 32
"""Evicted tokens lie in so many positions after the sinks."""


def _from_32(sizes: dict[str, int]) -> bool:
    return sizes["batch"] >= 32


AIMS = [
    ("decode memory from batch 32 up, % of copy bandwidth", Aim(">=", 85), "% of copy", _from_32),
    ("decode memory, times as fast as flash-linear-attention on pages", Aim(">=", 1), "fla on pages/memory", None),
]


def _blocks(setting: Setting) -> range:
    return range(setting.sinks // setting.block_size, (setting.sinks + SPREAD) // setting.block_size + 1)


def _past(setting: Setting, requests: int) -> list[int]:
    """Return lengths past ``W + S``, at which requests have a state."""
    return (setting.capacity + 2 + torch.randint(SPREAD - 2, (requests,))).tolist()


def verify(setting: Setting, model: Model, memory: MemorySpec) -> None:
    """Verify batches of odd sizes, and the yardstick.

    In a batch requests decode past ``W + S``, enter the memory, are inside the window, bring two tokens, and pad the
    batch; what none of them is to read is NaN.
    """
    for requests in setting.verified_batches:
        _verify(setting, model, memory, requests)
    if setting.on_gpu:
        _verify(setting, model, memory, 3, vast=True)
    _verify_recurrent(setting, model, memory)


def _verify(setting: Setting, model: Model, memory: MemorySpec, requests: int, vast: bool = False) -> None:
    kinds = sorted((i % 5 if requests > 1 else 0 for i in range(requests)), key=lambda kind: kind == 4)
    inside = torch.randint(2, setting.capacity + 1, (requests,)).tolist()
    entering = [setting.capacity + 1] * requests
    past = _past(setting, requests)
    lens = [(past, entering, inside, past, [0] * requests)[kind][i] for i, kind in enumerate(kinds)]
    new = [(1, 1, 1, 2, 0)[kind] for kind in kinds]
    layer = Layer(setting, model, memory, lens, new, _blocks(setting), random=False, vast=vast)
    step, pool = layer.step(), layer.pool
    decodes = [i for i, kind in enumerate(kinds) if kind < 2]
    where = f"{model.name} {memory.name}, {requests} requests"

    step.plan_decode()
    expected = torch.full_like(step.rows, -1)
    expected[decodes] = step.starts[decodes]
    if not torch.equal(step.rows, expected):
        raise Mismatch(f"decode_reads of {requests} requests: {step.rows.tolist()}, expected {expected.tolist()}")
    wanted, states = oracles.memory_reads(step, decodes)
    reads = step.requests[decodes]
    before = pool.other_pages(reads).clone()
    o = step.decode()
    compare(f"decode_memory's reads, {where}", o[decodes], wanted, mean=1e-5, most=1e-4)
    compare(f"decode_memory's states, {where}", pool.states(reads), states, mean=1e-5, most=1e-4)
    untouched(f"pages beside states, {where}", pool.other_pages(reads), before)
    others = [i for i in range(requests) if i not in decodes]
    if not bool(o[others].isnan().all()):
        raise Mismatch(f"decode_memory, {where}: wrote reads of requests that have nothing to read")

    rows = step.rows[decodes].long()
    output = step.output.double()
    output[rows] += oracles.read_out(step, rows, o[decodes])
    beside = torch.ones(len(output), dtype=torch.bool, device=setting.device)
    beside[rows] = False
    before = step.output[beside].clone()
    step.read_out(o, step.rows)
    compare(f"read_out, {where}", step.output[rows], output[rows], mean=1e-2, most=3e-2)
    untouched(f"attention of tokens that read nothing, {where}", step.output[beside], before)


def _batches(setting: Setting, model: Model, memory: MemorySpec, requests: int, sets: int) -> list[Step]:
    """Return sets of decodes past ``W + S``, with data of their own."""
    copies = max(1, min(sets, 1 + (128 << 20) // (2 * model.heads * model.head_size**2)))
    lens, new = _past(setting, requests * sets), [1] * requests * sets
    steps = Layer(setting, model, memory, lens, new, _blocks(setting), copies=copies).steps(requests)
    for step in steps:
        step.plan_decode()
    return steps


def _verify_recurrent(setting: Setting, model: Model, memory: MemorySpec) -> None:
    """Verify that the yardstick computes the same thing."""
    requests = max(setting.verified_batches)
    (step,) = _batches(setting, model, memory, requests, 1)
    wanted, states = oracles.memory_reads(step, list(range(requests)))
    where = f"{model.name} {memory.name}, {requests} requests"
    o = step.recurrent(on_pages=True)()
    compare(f"flash-linear-attention's read, {where}", o, wanted, mean=1e-2, most=3e-2)
    compare(f"its state, {where}", step.layer.pool.states(step.requests), states, mean=1e-2, most=3e-2)


def num_bytes(model: Model, memory: MemorySpec) -> int:
    """Return what a request's decode has to move: state in and out, key, value, gates, query, read."""
    heads, size = model.heads, model.head_size
    state = 2 * heads * size**2 * 4
    return state + 2 * (2 * model.kv_heads * size + heads * memory.num_gates + heads * size) + 4 * heads * size


def read_out_bytes(model: Model, requests: int) -> int:
    """Return what the read-out of a batch has to move: weights, reads, gates, attention in and out."""
    heads, size = model.heads, model.head_size
    return 2 * heads * size**2 + requests * heads * (4 * size + 4 + 4 * size)


def _both(step: Step) -> None:
    step.decode()
    step.read_out(step.o, step.rows)


def measure(setting: Setting, model: Model, memory: MemorySpec) -> list[Row]:
    """Time batches of decodes."""
    timer, rows = setting.measures, []
    calls: dict[str, Callable[[Step], Call]] = {
        "memory": lambda step: step.decode,
        "read out": lambda step: partial(step.read_out, torch.randn_like(step.o), step.rows),
        "both": lambda step: partial(_both, step),
        "fla alone": lambda step: step.recurrent(on_pages=False),
        "fla on pages": lambda step: step.recurrent(on_pages=True),
    }
    for requests in setting.decode_batches:
        moved = requests * num_bytes(model, memory)
        steps = _batches(setting, model, memory, requests, timer.sets(moved))
        row = Row("decode", model.name, memory.name, {"batch": requests, "bytes": moved})
        row.times = {name: timer.graph([make(step) for step in steps]) for name, make in calls.items()}
        row.times["copy"] = timer.copy(moved)
        row.ratios = {
            "% of copy": timer.percent_of_copy(moved, row.microseconds("memory")),
            "read out, % of copy": timer.percent_of_copy(read_out_bytes(model, requests), row.microseconds("read out")),
            **{f"{name}/memory": row.faster(name, "memory") for name in ("copy", "fla on pages", "fla alone")},
        }
        rows.append(row)
        del steps
    return rows
