"""Prefill memory: from pages and back, against flash-linear-attention's chunk kernels alone."""

from functools import partial

import torch

from kernel_cases import oracles
from kernel_cases.checks import compare, untouched
from kernel_cases.decode import ReadOut
from kernel_cases.pool import Pool
from kernel_cases.results import Aim, Row
from kernel_cases.setting import Model, Setting
from kernel_cases.timing import Call
from support.paged_case import random_gates
from vllm_ahn.kernels.prefill import chunk_stretches, prefill_memory
from vllm_ahn.kernels.prefill_gather import gather_states, gather_stretches
from vllm_ahn.kernels.prefill_plan import Stretch, plan_prefill
from vllm_ahn.memory.spec import MEMORIES

MEAN, MOST = 1.5e-2, 5e-2
"""Errors allowed in half precision: queries, keys, values and what the chunk kernels keep between them are rounded."""


class Prefill:
    """Requests that absorb some tokens each; every other one enters the memory, and the others have a state."""

    def __init__(
        self,
        setting: Setting,
        model: Model,
        memory: str,
        lengths: tuple[int, ...],
        *,
        random: bool = True,
        vast: bool = False,
    ) -> None:
        self.setting, self.model, self.memory, self.lengths = setting, model, memory, lengths
        self.shape = setting.shape(model, memory)
        size = setting.block_size
        blocks = range(setting.sinks // size, (setting.sinks + 1 + max(lengths)) // size + 1)
        with torch.device(setting.device):
            self.pool = Pool(setting, model, memory, len(lengths), blocks, random=random, vast=vast)
            self.A_log = torch.randn(model.heads)
            query = torch.randn(sum(lengths), model.heads, model.head_size)
            self.query = query.to(setting.dtype)
            self.z = torch.randn(sum(lengths), model.heads)
            self.output = torch.zeros_like(self.query)
        self.evicted = [
            torch.arange(length, device=setting.device) + setting.sinks + (i + 1) % 2
            for i, length in enumerate(lengths)
        ]
        stretches, row = [], 0
        for i, length in enumerate(lengths):
            stretches.append(Stretch(i, row, int(self.evicted[i][0]) + setting.window, length))
            row += length
        sizes = {"window": setting.window, "sinks": setting.sinks, "block_size": size}
        self.plan = plan_prefill(stretches, self.pool.window_table, **sizes)
        self.weights = ReadOut(setting, model, memory)

    def memory_call(self) -> Call:
        return partial(
            prefill_memory,
            self.query,
            self.pool.window,
            self.pool.state,
            self.pool.state_table,
            self.plan,
            A_log=self.A_log,
            memory=MEMORIES[self.memory],
            scale=self.shape.scale,
        )

    def chunks_call(self) -> Call:
        """flash-linear-attention's kernels, on tensors that lie ready."""
        ready = gather_stretches(
            self.query, self.pool.window, self.plan, memory=MEMORIES[self.memory], A_log=self.A_log
        )
        states = gather_states(self.pool.state, self.pool.state_table, self.plan)
        return partial(chunk_stretches, *ready, states, self.plan, memory=MEMORIES[self.memory], scale=self.shape.scale)

    def read_out_call(self) -> Call:
        o = torch.randn_like(self.query)
        return partial(self.weights, o, self.z, self.plan.reads, self.output)

    def oracle(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Reads ``[N, H, D]`` and new states ``[R, H, D, D]``, from what pages hold now."""
        reads, states = [], []
        for i, (q, evicted) in enumerate(zip(self.query.split(self.lengths), self.evicted, strict=True)):
            request = torch.full_like(evicted, i)
            state = self.pool.states(request[:1])[0]
            if int(evicted[0]) == self.setting.sinks:
                state = torch.zeros_like(state)
            o, state = oracles.stretch(self.shape, q, self.pool.tokens(request, evicted), self.A_log, state)
            reads.append(o)
            states.append(state)
        return torch.cat(reads), torch.stack(states)


def verify(setting: Setting, model: Model, memory: str) -> None:
    """Odd lengths in pages of NaN, and the lengths that are timed."""
    for lengths in setting.verified_stretches:
        prefill = Prefill(setting, model, memory, lengths, random=False)
        pool, device = prefill.pool, setting.device
        for i, evicted in enumerate(prefill.evicted):
            with torch.device(device):
                k, v = torch.randn(2, len(evicted), model.kv_heads, model.head_size)
                gates = random_gates(prefill.shape, len(evicted))
                request = torch.full_like(evicted, i)
                pool.put_tokens(request, evicted, k, v, gates)
                if int(evicted[0]) > setting.sinks:
                    pool.put_states(request[:1], torch.randn(1, model.heads, model.head_size, model.head_size))
        _verify(prefill)
    for lengths in setting.stretches:
        _verify(Prefill(setting, model, memory, lengths))
    if setting.on_gpu:
        _verify(Prefill(setting, model, memory, setting.verified_stretches[-1], vast=True))


def _verify(prefill: Prefill) -> None:
    pool = prefill.pool
    requests = torch.arange(len(prefill.lengths), device=pool.cache.device)
    wanted, states = prefill.oracle()
    before = pool.other_pages(requests).clone()
    o = prefill.memory_call()()
    where = f"{prefill.model.name} {prefill.memory}, {prefill.lengths} tokens"
    compare(f"prefill_memory's reads, {where}", o, wanted, mean=MEAN, most=MOST)
    compare(f"prefill_memory's states, {where}", pool.states(requests), states, mean=MEAN, most=MOST)
    untouched(f"pages beside states, {where}", pool.other_pages(requests), before)


def measure(setting: Setting, model: Model, memory: str) -> list[Row]:
    timer = setting.timer
    assert timer is not None
    rows = []
    for lengths in setting.stretches:
        prefill = Prefill(setting, model, memory, lengths)
        row = Row("prefill", model.name, memory, {"requests": len(lengths), "tokens": sum(lengths)})
        row.times = {
            "memory": timer.stream(prefill.memory_call()),
            "fla alone": timer.stream(prefill.chunks_call()),
            "read out": timer.stream(prefill.read_out_call()),
        }
        whole = row.times["memory"].median
        row.ratios = {
            "memory/fla alone": whole / row.times["fla alone"].median,
            "million tokens/s": sum(lengths) / whole,
            "host, us": row.times["memory"].host or 0.0,
        }
        rows.append(row)
    return rows


def aims(rows: list[Row]) -> list[Aim]:
    return []
