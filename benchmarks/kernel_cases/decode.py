"""Decode memory and read-out: against flash-linear-attention's recurrent kernels, and against a plain copy."""

from collections.abc import Callable
from functools import partial

import torch

from kernel_cases import oracles
from kernel_cases.checks import Mismatch, compare, untouched
from kernel_cases.pool import Pool
from kernel_cases.results import Aim, Row
from kernel_cases.setting import Model, Setting
from kernel_cases.timing import Call
from support.paged_case import poisoned, random_gates
from vllm_ahn.kernels.decode import decode_memory, decode_reads
from vllm_ahn.kernels.prefill_gather import gather_states, gather_stretches, scatter_states
from vllm_ahn.kernels.prefill_plan import Stretch, plan_prefill
from vllm_ahn.kernels.read_out import gated_squares, read_out
from vllm_ahn.memory.spec import MEMORIES

SPREAD = 32
"""Evicted tokens lie in so many positions after the sinks."""


class ReadOut:
    """Weights of a memory's read-out, several times over, as a model has them in every layer."""

    def __init__(self, setting: Setting, model: Model, memory: str, copies: int = 1) -> None:
        heads, size = model.heads, model.head_size
        on_device = {"dtype": setting.dtype, "device": setting.device}
        self.memory = memory
        self.norm = 1 + 0.1 * torch.randn(heads * size if memory == "Mamba2" else size, **on_device)
        self.o_proj = torch.randn((copies, heads, size, size), **on_device) * size**-0.5

    def __call__(
        self, o: torch.Tensor, z: torch.Tensor, rows: torch.Tensor, output: torch.Tensor, copy: int = 0
    ) -> None:
        o_proj = self.o_proj[copy % len(self.o_proj)]
        if self.memory != "Mamba2":
            read_out(o, z, rows, self.norm, o_proj, output)
            return
        squares = torch.empty(len(rows), device=o.device)
        gated_squares(o, z, rows, squares)
        read_out(o, z, rows, self.norm, o_proj, output, squares=squares, norm_size=o[0].numel())


def verify(setting: Setting, model: Model, memory: str) -> None:
    """Batches of odd sizes in which requests decode past ``W + S``, enter the memory, are inside the window, bring two
    tokens, and pad the batch; what none of them is to read is NaN."""
    for requests in setting.verified_batches:
        _verify(setting, model, memory, requests)
    if setting.on_gpu:
        _verify(setting, model, memory, 3, vast=True)
    _verify_recurrent(setting, model, memory)


def _verify(setting: Setting, model: Model, memory: str, requests: int, vast: bool = False) -> None:
    shape, device = setting.shape(model, memory), setting.device
    kinds = [i % 5 if requests > 1 else 0 for i in range(requests)]
    kinds.sort(key=lambda kind: kind == 4)
    new = torch.tensor([(1, 1, 1, 2, 0)[kind] for kind in kinds])
    past = setting.capacity + 2 + torch.randint(SPREAD - 2, (requests,))
    inside = torch.randint(1, setting.capacity + 1, (requests,))
    lens = torch.tensor(
        [(int(past[i]), setting.capacity + 1, int(inside[i]), int(past[i]), 0)[k] for i, k in enumerate(kinds)]
    )
    starts = torch.cat((torch.zeros(1, dtype=torch.int64), new.cumsum(0)))
    reads = torch.tensor([i for i, kind in enumerate(kinds) if kind < 2], device=device)
    with torch.device(device):
        pool = _pool(setting, model, memory, requests, random=False, vast=vast)
        A_log = torch.randn(model.heads)
        q = torch.randn(int(new.sum()) + 2, model.heads, model.head_size).to(setting.dtype)
        tokens = (
            *torch.randn(2, len(reads), model.kv_heads, model.head_size).to(setting.dtype),
            random_gates(shape, len(reads)).to(setting.dtype),
        )
        states = torch.randn(len(reads), model.heads, model.head_size, model.head_size)
        o = poisoned(requests, model.heads, model.head_size)
        rows = torch.full((requests,), -7, dtype=torch.int32)
        z = torch.randn(len(q), model.heads)
        attention = torch.randn(len(q), model.heads, model.head_size).to(setting.dtype)
    lens, starts = lens.int().to(device), starts.int().to(device)
    pool.put_tokens(reads, lens[reads].long() - 1 - setting.window, *tokens)
    old = lens[reads] > setting.capacity + 1
    pool.put_states(reads[old], states[old])
    states[~old] = 0
    before = pool.other_pages(reads).clone()

    decode_reads(starts, lens, setting.capacity, rows)
    wanted_rows = torch.full_like(rows, -1)
    wanted_rows[reads] = starts[reads]
    if not torch.equal(rows, wanted_rows):
        raise Mismatch(f"decode_reads of {requests} requests: {rows.tolist()}, expected {wanted_rows.tolist()}")
    _memory(setting, memory, pool, slice(None), q, rows, lens, o, A_log)()
    read_rows = rows[reads].long()
    wanted, new_states = oracles.step(shape, q[read_rows], tokens, A_log, states)
    where = f"{model.name} {memory}, {requests} requests"
    compare(f"decode_memory's reads, {where}", o[reads], wanted, mean=1e-5, most=1e-4)
    compare(f"decode_memory's states, {where}", pool.states(reads), new_states, mean=1e-5, most=1e-4)
    untouched(f"pages beside states, {where}", pool.other_pages(reads), before)
    unread = torch.ones(requests, dtype=torch.bool, device=device)
    unread[reads] = False
    if not bool(o[unread].isnan().all()):
        raise Mismatch(f"decode_memory, {where}: wrote reads of requests that have nothing to read")

    weights = ReadOut(setting, model, memory)
    wanted = attention.double()
    wanted[read_rows] += oracles.read_out(memory, o[reads], z[read_rows], weights.norm, weights.o_proj[0])
    others = torch.ones(len(attention), dtype=torch.bool, device=device)
    others[read_rows] = False
    before = attention[others].clone()
    weights(o, z, rows, attention)
    compare(f"read_out, {where}", attention[read_rows], wanted[read_rows], mean=1e-2, most=3e-2)
    untouched(f"attention of tokens that read nothing, {where}", attention[others], before)


def _verify_recurrent(setting: Setting, model: Model, memory: str) -> None:
    """The yardstick computes the same thing."""
    shape, requests = setting.shape(model, memory), max(setting.verified_batches)
    batch = Batch(setting, model, memory, requests, sets=1)
    tokens = batch.pool.tokens(batch.requests, batch.evicted)
    wanted, states = oracles.step(shape, batch.q, tokens, batch.A_log, batch.pool.states(batch.requests))
    where = f"{model.name} {memory}, {requests} requests"
    o = batch.recurrent_on_pages(0)()
    compare(f"flash-linear-attention's read, {where}", o, wanted, mean=1e-2, most=3e-2)
    compare(f"its state, {where}", batch.pool.states(batch.requests), states, mean=1e-2, most=3e-2)


class Batch:
    """A batch of decodes past ``W + S``, several sets of them, and the calls that are timed."""

    def __init__(self, setting: Setting, model: Model, memory: str, requests: int, sets: int) -> None:
        self.setting, self.model, self.memory = setting, model, memory
        self.size, self.sets = requests, sets
        with torch.device(setting.device):
            self.pool = _pool(setting, model, memory, requests * sets, random=True)
            self.requests = torch.arange(requests)
            self.evicted = setting.sinks + 1 + torch.randint(SPREAD - 1, (requests,))
            self.lens = (self.evicted + setting.window + 1).int()
            self.rows = torch.arange(requests, dtype=torch.int32)
            self.A_log = torch.randn(model.heads)
            self.q = torch.randn(requests, model.heads, model.head_size).to(setting.dtype)
            self.z = torch.randn(requests, model.heads)
            self.o = torch.randn(requests, model.heads, model.head_size)
            self.output = torch.zeros(requests, model.heads, model.head_size).to(setting.dtype)
            self.states = torch.randn(requests * sets, model.heads, model.head_size, model.head_size)
        copies = max(1, min(sets, 1 + (128 << 20) // (2 * model.heads * model.head_size**2)))
        self.weights = ReadOut(setting, model, memory, copies)
        stretches = [Stretch(i, i, n - 1, 1) for i, n in enumerate(self.lens.tolist())]
        sizes = {"window": setting.window, "sinks": setting.sinks, "block_size": setting.block_size}
        self.plan = plan_prefill(stretches, self.pool.window_table, **sizes)
        self.ready = gather_stretches(self.q, self.pool.window, self.plan, memory=MEMORIES[memory], A_log=self.A_log)

    def part(self, number: int) -> slice:
        return slice(number * self.size, (number + 1) * self.size)

    def memory_call(self, number: int) -> Call:
        return _memory(
            self.setting, self.memory, self.pool, self.part(number), self.q, self.rows, self.lens, self.o, self.A_log
        )

    def read_out_call(self, number: int) -> Call:
        return partial(self.weights, self.o, self.z, self.rows, self.output, number)

    def both(self, number: int) -> Call:
        first, second = self.memory_call(number), self.read_out_call(number)

        def call() -> None:
            first()
            second()

        return call

    def recurrent(self, number: int) -> Call:
        """flash-linear-attention's kernel, on tensors that lie ready."""
        return partial(_recurrent, self.memory, *self.ready, self.states[self.part(number)])

    def recurrent_on_pages(self, number: int) -> Callable[[], torch.Tensor]:
        """The same, with states gathered from pages before and scattered to them after."""
        table = self.pool.state_table[self.part(number)]
        pages = self.pool.state

        def call() -> torch.Tensor:
            states = gather_states(pages, table, self.plan)
            o, states = _recurrent(self.memory, *self.ready, states)
            scatter_states(states, pages, table, self.plan)
            return o

        return call


def num_bytes(model: Model, memory: str) -> int:
    """Bytes that a request's decode has to move: state in and out, key, value, gates, query, read."""
    heads, size = model.heads, model.head_size
    state = 2 * heads * size**2 * 4
    return (
        state + 2 * (2 * model.kv_heads * size + heads * MEMORIES[memory].num_gates + heads * size) + 4 * heads * size
    )


def read_out_bytes(model: Model, requests: int) -> int:
    """Bytes that the read-out of a batch has to move: weights, reads, gates, attention in and out."""
    heads, size = model.heads, model.head_size
    return 2 * heads * size**2 + requests * heads * (4 * size + 4 + 4 * size)


def measure(setting: Setting, model: Model, memory: str) -> list[Row]:
    timer = setting.timer
    assert timer is not None
    rows = []
    for requests in setting.decode_batches:
        moved = requests * num_bytes(model, memory)
        batch = Batch(setting, model, memory, requests, timer.sets(moved))
        numbers = range(batch.sets)
        row = Row("decode", model.name, memory, {"batch": requests, "bytes": moved})
        for name, make in (
            ("memory", batch.memory_call),
            ("read out", batch.read_out_call),
            ("both", batch.both),
            ("fla alone", batch.recurrent),
            ("fla on pages", batch.recurrent_on_pages),
        ):
            row.times[name] = timer.graph([make(number) for number in numbers])
        row.times["copy"] = timer.copy(moved)
        row.ratios = {
            "% of copy": timer.percent_of_copy(moved, row.times["memory"].median),
            "read out, % of copy": timer.percent_of_copy(read_out_bytes(model, requests), row.times["read out"].median),
            "copy/memory": row.times["copy"].median / row.times["memory"].median,
            "fla on pages/memory": row.times["fla on pages"].median / row.times["memory"].median,
            "fla alone/memory": row.times["fla alone"].median / row.times["memory"].median,
        }
        rows.append(row)
        del batch
    return rows


def aims(rows: list[Row]) -> list[Aim]:
    large = [row for row in rows if row.sizes["batch"] >= 32]
    return [
        Aim.least("decode memory from batch 32 up, % of copy bandwidth", 85, large, "% of copy"),
        Aim.least(
            "decode memory, times as fast as flash-linear-attention on pages",
            1,
            rows,
            "fla on pages/memory",
        ),
    ]


def _pool(setting: Setting, model: Model, memory: str, requests: int, *, random: bool, vast: bool = False) -> Pool:
    first, last = setting.sinks, setting.sinks + SPREAD
    blocks = range(first // setting.block_size, last // setting.block_size + 1)
    return Pool(setting, model, memory, requests, blocks, random=random, vast=vast)


def _memory(
    setting: Setting,
    memory: str,
    pool: Pool,
    part: slice,
    q: torch.Tensor,
    rows: torch.Tensor,
    lens: torch.Tensor,
    o: torch.Tensor,
    A_log: torch.Tensor,
) -> Call:
    return partial(
        decode_memory,
        q,
        pool.window,
        pool.window_table[part],
        pool.state,
        pool.state_table[part],
        rows,
        lens,
        o,
        memory=MEMORIES[memory],
        window=setting.window,
        sinks=setting.sinks,
        scale=1.0 if memory == "Mamba2" else q.shape[2] ** -0.5,
        A_log=A_log if memory == "Mamba2" else None,
    )


def _recurrent(
    memory: str,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor,
    b: torch.Tensor,
    states: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Reads ``[n, H, D]`` and new states ``[n, H, D_v, D_k]``, from what :func:`gather_stretches` returns."""
    settings = {"initial_state": states, "output_final_state": True, "state_v_first": True}
    q, k, v, g, b = (x.unsqueeze(1) for x in (q, k, v, g, b))
    if memory == "Mamba2":
        from fla.ops.simple_gla import fused_recurrent_simple_gla

        o, states = fused_recurrent_simple_gla(q, k, v, g, scale=1.0, **settings)
    else:
        from fla.ops.gated_delta_rule import fused_recurrent_gated_delta_rule

        decay = g if memory == "GatedDeltaNet" else None
        o, states = fused_recurrent_gated_delta_rule(q, k, v, decay, beta=b, scale=q.shape[3] ** -0.5, **settings)
    return o.squeeze(1), states
