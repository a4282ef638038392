"""Cache write: keys, values and gates of new tokens into their pages, against a plain copy."""

from __future__ import annotations

import torch

from kernel_cases.layer import Layer
from kernel_cases.oracles import untouched
from kernel_cases.setting import Model, Row, Setting
from vllm_ahn.memory.spec import MemorySpec

CHUNK = 1024
"""So many tokens or more are one request's, which fill blocks; fewer are one each of many requests."""


def _layer(setting: Setting, model: Model, memory: MemorySpec, tokens: int, vast: bool = False) -> Layer:
    size = setting.block_size
    if tokens >= CHUNK:
        first = int(torch.randint(3 * size, ()))  # a chunk begins anywhere in a block
        blocks = range(-(-(first + tokens) // size))
        return Layer(setting, model, memory, [first + tokens], [tokens], blocks, vast=vast)
    lens = (1 + torch.randint(size, (tokens,))).tolist()
    return Layer(setting, model, memory, lens, [1] * tokens, range(1), vast=vast)


def verify(setting: Setting, model: Model, memory: MemorySpec) -> None:
    """Compare odd and timed numbers of tokens with plain indexing, some of them padding that holds NaN."""
    numbers = [(number, False) for number in (*setting.verified_batches, *setting.written)]
    for number, vast in [*numbers, (33, True)] if setting.on_gpu else numbers:
        layer = _layer(setting, model, memory, number, vast)
        step, pool = layer.step(), layer.pool
        padding = torch.rand(number, device=setting.device) < (0.2 if number > 1 else 0)
        step.key[padding] = torch.nan
        step.slots[padding] = -1
        before, kept = pool.cache.clone(), ~padding
        assert step.gates is not None
        pool.put_tokens(step.owners[kept], step.positions[kept], step.key[kept], step.value[kept], step.gates[kept])
        wanted = pool.cache.clone()
        pool.cache.copy_(before)
        step.write()
        untouched(f"pages after write_window_pages, {model.name} {memory.name}, {number} tokens", pool.cache, wanted)


def measure(setting: Setting, model: Model, memory: MemorySpec) -> list[Row]:
    """Time writes of so many tokens."""
    timer, rows = setting.measures, []
    for number in setting.written:
        kept = 2 * model.kv_heads * model.head_size
        gates = model.heads * memory.num_gates
        moved = number * (2 * kept + 4 * gates + 8 + 2 * kept + 2 * gates)
        sets = [_layer(setting, model, memory, number).step() for _ in range(timer.sets(moved))]
        row = Row("write", model.name, memory.name, {"tokens": number, "bytes": moved})
        row.times = {"write": timer.graph([step.write for step in sets]), "copy": timer.copy(moved)}
        row.ratios = {
            "% of copy": timer.percent_of_copy(moved, row.microseconds("write")),
            "copy/write": row.faster("copy", "write"),
        }
        rows.append(row)
    return rows
