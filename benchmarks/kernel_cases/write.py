"""Cache write: keys, values and gates of new tokens into their pages, against a plain copy."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from kernel_cases.layer import Step
from kernel_cases.oracles import untouched
from kernel_cases.setting import Model, Row, Setting
from vllm_ahn.memory.spec import MemorySpec

CHUNK = 1024
"""So many tokens or more are one request's, which fill blocks; fewer are one each of many requests."""


def _step(setting: Setting, model: Model, memory: MemorySpec, tokens: int, vast: bool = False) -> Step:
    size = setting.block_size
    if tokens >= CHUNK:
        length = int(torch.randint(3 * size, ())) + tokens  # a chunk begins anywhere in a block
        return Step(setting, model, memory, [length], [tokens], range(-(-length // size)), vast=vast)
    lengths = (1 + torch.randint(size, (tokens,))).tolist()
    return Step(setting, model, memory, lengths, [1] * tokens, range(1), vast=vast)


def verify(setting: Setting, model: Model, memory: MemorySpec) -> None:
    """Compare odd and timed numbers of tokens with plain indexing, some of them padding that holds NaN."""
    numbers = [(number, False) for number in (*setting.verified_batches, *setting.written)]
    for number, vast in [*numbers, (33, True)] if setting.on_gpu else numbers:
        step = _step(setting, model, memory, number, vast)
        cache = step.pool.cache
        padding = torch.rand(number, device=setting.device) < 0.2
        padding[0] = False
        step.key[padding] = torch.nan
        step.slots[padding] = -1
        before, tokens = cache.clone(), (step.owners, step.positions, step.key, step.value, step.gates)
        step.pool.put_tokens(*(x[~padding] for x in tokens))
        wanted = cache.clone()
        cache.copy_(before)
        step.write()
        untouched(f"pages after write_window_pages, {step}", cache, wanted)


def measure(setting: Setting, model: Model, memory: MemorySpec) -> Iterator[Row]:
    """Time writes of so many tokens."""
    timer = setting.timer
    for number in setting.written:
        kept = 2 * model.kv_heads * model.head_size
        gates = model.heads * memory.num_gates
        moved = number * (2 * kept + 4 * gates + 8 + 2 * kept + 2 * gates)
        steps = [_step(setting, model, memory, number) for _ in range(timer.sets(moved))]
        row = Row("write", model.name, memory.name, {"tokens": number, "bytes": moved})
        row.times = {"write": timer.graph([step.write for step in steps]), "copy": timer.copy(moved)}
        row.ratios["% of copy"] = timer.percent_of_copy(moved, row.microseconds("write"))
        row.ratios["copy/write"] = row.faster("copy", "write")
        yield row
