"""Cache write: keys, values and gates of new tokens into their pages, against a plain copy."""

from functools import partial

import torch

from kernel_cases.checks import untouched
from kernel_cases.pool import Pool
from kernel_cases.results import Aim, Row
from kernel_cases.setting import Model, Setting
from kernel_cases.timing import Call
from support.paged_case import random_gates
from vllm_ahn.kernels.cache_write import write_window_pages
from vllm_ahn.kernels.pages import WindowPages
from vllm_ahn.memory.spec import MEMORIES

CHUNK = 1024
"""So many tokens or more are a chunk, which fills blocks; fewer are one each of many requests."""


class Tokens:
    """New tokens, as a layer's projections leave them, and where in a pool they go."""

    def __init__(self, setting: Setting, model: Model, memory: str, number: int, pool: Pool) -> None:
        self.pool = pool
        with torch.device(setting.device):
            qkv = torch.randn(number, model.heads + 2 * model.kv_heads, model.head_size).to(setting.dtype)
            _, self.key, self.value = qkv.split((model.heads, model.kv_heads, model.kv_heads), dim=1)
            self.gates = random_gates(setting.shape(model, memory), number)
            size = pool.block_size
            free = (len(pool.cache) - 1) * size  # block 0 is nobody's
            if number >= CHUNK:
                start = size * int(torch.randint((free - number) // size, ()))
                self.slots = size + start + torch.arange(number)
            else:
                self.slots = size + torch.randperm(free)[:number]

    def write(self, slots: torch.Tensor) -> Call:
        return partial(write_window_pages, self.key, self.value, self.gates, slots, self.pool.window)


def _pool(setting: Setting, model: Model, memory: str, tokens: int, vast: bool = False) -> Pool:
    blocks = range(min(4 * tokens, setting.context) // setting.block_size + 4)
    return Pool(setting, model, memory, 1, blocks, vast=vast)


def verify(setting: Setting, model: Model, memory: str) -> None:
    """Odd and timed numbers of tokens against plain indexing, some of them padding that holds NaN."""
    numbers = [(number, False) for number in (*setting.verified_batches, *setting.written)]
    if setting.on_gpu:
        numbers.append((33, True))
    for number, vast in numbers:
        pool = _pool(setting, model, memory, number, vast)
        tokens = Tokens(setting, model, memory, number, pool)
        padding = torch.rand(number, device=setting.device) < (0.2 if number > 1 else 0)
        tokens.key[padding] = torch.nan
        wanted = WindowPages(pool.cache.clone(), pool.window.layout)
        blocks, offsets = (x[~padding] for x in (tokens.slots // pool.block_size, tokens.slots % pool.block_size))
        for plane, x in zip(
            (wanted.keys, wanted.values, wanted.gates), (tokens.key, tokens.value, tokens.gates), strict=True
        ):
            plane[blocks, :, offsets] = x[~padding].reshape(len(blocks), model.kv_heads, -1).to(setting.dtype)
        tokens.write(tokens.slots.masked_fill(padding, -1))()
        untouched(f"pages after write_window_pages, {model.name} {memory}, {number} tokens", pool.cache, wanted.pages)


def measure(setting: Setting, model: Model, memory: str) -> list[Row]:
    timer = setting.timer
    assert timer is not None
    rows = []
    for number in setting.written:
        kept = 2 * model.kv_heads * model.head_size
        gates = model.heads * MEMORIES[memory].num_gates
        moved = number * (2 * kept + 4 * gates + 8 + 2 * kept + 2 * gates)
        pool = _pool(setting, model, memory, number)
        sets = [Tokens(setting, model, memory, number, pool) for _ in range(timer.sets(moved))]
        row = Row("write", model.name, memory, {"tokens": number, "bytes": moved})
        row.times = {"write": timer.graph([tokens.write(tokens.slots) for tokens in sets]), "copy": timer.copy(moved)}
        row.ratios = {
            "% of copy": timer.percent_of_copy(moved, row.times["write"].median),
            "copy/write": row.times["copy"].median / row.times["write"].median,
        }
        rows.append(row)
    return rows


def aims(rows: list[Row]) -> list[Aim]:
    return []
