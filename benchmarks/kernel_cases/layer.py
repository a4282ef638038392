"""One layer's pages, inputs and weights, and the kernels that work on them: all calls of them are here.

Pages and block tables are as vLLM hands them to kernels.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from functools import cached_property, partial

import torch

from kernel_cases.setting import Model, Setting
from kernel_cases.timing import Call
from vllm_ahn.kernels import l2_normalize
from vllm_ahn.kernels.cache_write import write_window_pages
from vllm_ahn.kernels.pages import StatePageLayout, StatePages, WindowPageLayout, WindowPages
from vllm_ahn.kernels.prefill import chunk_stretches, prefill_memory
from vllm_ahn.kernels.prefill_gather import gather_states, gather_stretches, scatter_states
from vllm_ahn.kernels.prefill_plan import PrefillPlan, Stretch, plan_prefill
from vllm_ahn.kernels.read_out import gated_squares, read_out
from vllm_ahn.kernels.recurrence.gates import decay_and_rate
from vllm_ahn.kernels.settled import GRANULARITY
from vllm_ahn.kernels.steps_triton import absorb_and_read_steps, find_steps
from vllm_ahn.memory.spec import MemorySpec

VAST = 1 << 32
"""Elements: twice what 32 bits count with a sign."""


def random_gates(memory: MemorySpec, *shape: int) -> torch.Tensor:
    """Return gates as projections make them, ``[*shape, num_gates]`` float32."""
    step, rate = torch.nn.functional.softplus(torch.randn(shape) - 1), torch.rand(shape)
    if memory.keeps_decay:
        return torch.stack((-step, rate), -1)
    return (step if memory.decay_from_rate else rate).unsqueeze(-1)


class Pool:
    """Pages of some requests, each of which holds the same ``blocks`` of its sequence and, with a memory, a state.

    Both memories are views of the same bytes, and blocks lie anywhere. Table entries of blocks that a request does not
    hold name block 0, which is full of NaN. The other arguments are those of `Step`.

    Attributes:
        cache: ``[num_blocks, Hkv, block_size, content]``, all pages.
        window, state: the same pages as keys, values and gates, and as states.
        window_table, state_table: ``[requests, width]`` int32, as wide as the longest sequence.
    """

    def __init__(self, step: Step, requests: int, blocks: Sequence[int], random: bool, vast: bool) -> None:
        setting, model, memory = step.setting, step.model, step.memory
        self.block_size, self.heads, device = setting.block_size, model.heads, setting.device
        gates = memory.num_gates * model.group if memory else 0
        layout = WindowPageLayout(model.kv_heads, model.head_size, gates, self.block_size, setting.dtype)
        kept = GRANULARITY if memory and memory.delta else 0
        states = StatePageLayout(model.heads, model.head_size, layout.page_bytes, setting.state_dtype, kept)
        self.state_pages = states.num_pages if memory else 0
        held = len(blocks) + self.state_pages
        total = 1 + requests * held
        page = (model.kv_heads, self.block_size, layout.content_elements)
        apart = VAST // (total * math.prod(page)) + 1 if vast else 1
        self.cache = torch.empty((total, apart, *page), dtype=setting.dtype, device=device)[:, -1]
        self.window, self.state = WindowPages(self.cache, layout), StatePages(self.cache, states)
        self.planes = (self.window.keys, self.window.values, self.window.gates)
        if random:
            self.cache.normal_()  # states too: two random halves make a random number in float32
            if memory:
                self.window.gates.uniform_()
                if memory.keeps_decay:
                    self.window.gates[..., ::2].neg_()
        else:
            self.cache.fill_(math.nan)
        self.cache[0] = math.nan
        width = -(-setting.context // self.block_size) + 3 & ~3  # rows begin at multiples of 16 bytes
        ids = torch.randperm(total - 1, device=device).add_(1).int().view(requests, held)
        self.window_table = torch.zeros((requests, width), dtype=torch.int32, device=device)
        self.state_table = torch.zeros((requests, max(width, self.state_pages)), dtype=torch.int32, device=device)
        self.window_table[:, torch.tensor(blocks, device=device)] = ids[:, : len(blocks)]
        self.state_table[:, : self.state_pages] = ids[:, len(blocks) :]

    def places(self, requests: torch.Tensor, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return blocks and offsets of tokens, int64, of requests and positions ``[n]`` int64."""
        return self.window_table[requests, positions // self.block_size].long(), positions % self.block_size

    def tokens(self, requests: torch.Tensor, positions: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Return keys and values ``[n, Hkv, D]`` and gates ``[n, H, num_gates]`` of tokens, by plain indexing."""
        blocks, offsets = self.places(requests, positions)
        keys, values, gates = (plane[blocks, :, offsets] for plane in self.planes)
        return keys, values, gates.reshape(len(blocks), self.heads, -1)

    def put_tokens(self, requests: torch.Tensor, positions: torch.Tensor, *tokens: torch.Tensor) -> None:
        """Write tokens, shaped as `tokens` returns them, by plain indexing."""
        blocks, offsets = self.places(requests, positions)
        for plane, x in zip(self.planes, tokens, strict=True):
            plane[blocks, :, offsets] = x.reshape(len(blocks), plane.shape[1], -1).to(plane.dtype)

    def pages_of_states(self, requests: torch.Tensor) -> torch.Tensor:
        """Return the blocks ``[n, state_pages]`` int64 that hold the states of requests."""
        return self.state_table[requests, : self.state_pages].long()

    def states(self, requests: torch.Tensor) -> torch.Tensor:
        """Return states ``[n, H, D_k, D_v]``, float32."""
        return self.state.gather(self.pages_of_states(requests))

    def other_pages(self, requests: torch.Tensor) -> torch.Tensor:
        """Return the bytes of all pages but those of the states of some requests."""
        others = torch.ones(len(self.cache), dtype=torch.bool, device=self.cache.device)
        others[self.pages_of_states(requests).flatten()] = False
        return self.cache[others].view(torch.uint8)


class Step:
    """What a layer does for a batch of requests with new tokens, one request after another.

    Args:
        setting: sizes.
        model: whose layer.
        memory: None: without.
        lengths: tokens of each request, with the new ones.
        new: new tokens of each request.
        blocks: numbers of the blocks that each request holds.
        random: fill pages with random keys, values, gates and states; else with NaN, but for the tokens that leave the
            window now and the states that are to exist by then.
        vast: put pages so far apart that offsets of elements do not fit 32 bits.

    Attributes:
        requests: ``[R]`` int64.
        starts, lens: ``[R + 1]`` and ``[R]`` int32, where tokens of requests begin, and how many they have by the end.
        owners, positions, slots: ``[T]`` int64, request, position and slot of the new tokens.
        query, output, z: ``[T, H, ...]``, the layer's for these tokens.
        reading: the tokens past ``W + S`` of each request that has any.
        rows, o: what a decode reads: ``[R]`` int32 the batch's row or -1, and ``[R, H, D]`` float32.
        counts: ``[R]`` int32, 1 where a decode reads.
    """

    def __init__(
        self,
        setting: Setting,
        model: Model,
        memory: MemorySpec | None,
        lengths: Sequence[int],
        new: Sequence[int],
        blocks: Sequence[int],
        *,
        random: bool = True,
        vast: bool = False,
    ) -> None:
        self.setting, self.model, self.memory, self.new = setting, model, memory, new
        heads, kv_heads, size, tokens = model.heads, model.kv_heads, model.head_size, sum(new)
        starts = [0, *itertools.accumulate(new)]
        self.reading: dict[int, slice] = {}
        self.stretches: list[Stretch] = []
        for i, (length, count) in enumerate(zip(lengths, new, strict=True)):
            position = max(length - count, setting.capacity)
            if length > position:
                row = starts[i] + position - (length - count)
                self.reading[i] = slice(row, starts[i + 1])
                # As if the state were settled right there: chunk kernels do not mind where boundaries are.
                self.stretches.append(Stretch(i, row, position, length - position, position, length))
        self.pool = Pool(self, len(lengths), blocks, random, vast)
        with torch.device(setting.device):
            self.requests = torch.arange(len(lengths))
            self.starts, self.lens = (torch.tensor(x, dtype=torch.int32) for x in (starts, lengths))
            self.owners = torch.tensor([i for i, count in enumerate(new) for _ in range(count)])
            positions = [range(length - count, length) for length, count in zip(lengths, new, strict=True)]
            self.positions = torch.tensor([*itertools.chain(*positions)])
            qkv = torch.randn(tokens, heads + 2 * kv_heads, size).to(setting.dtype)
            self.query, self.key, self.value = qkv.split((heads, kv_heads, kv_heads), dim=1)
            self.gates = random_gates(memory, tokens, heads) if memory else None
            self.z, self.A_log = torch.randn(tokens, heads), torch.randn(heads)
            self.output = torch.randn(tokens, heads, size).to(setting.dtype)
            self.norm = 1 + 0.1 * torch.randn(heads * size if memory and memory.norm_all_heads else size)
            self.norm = self.norm.to(setting.dtype)
            self.o_proj = (torch.randn(heads, size, size) * size**-0.5).to(setting.dtype)
            self.rows = torch.full((len(lengths),), -1, dtype=torch.int32)
            self.first_rows, self.counts = torch.zeros_like(self.rows), torch.zeros_like(self.rows)
            self.read_positions = torch.zeros(len(lengths), dtype=torch.int64)
            self.o = torch.full((len(lengths), heads, size), math.nan)
            if memory and not random:
                self._fill(memory)
        blocks_of, offsets = self.pool.places(self.owners, self.positions)
        self.slots = blocks_of * setting.block_size + offsets
        self.scale = memory.scale(size) if memory else 0.0

    def since_boundary(self, request: int) -> torch.Tensor:
        """Return positions of the tokens that a request has absorbed since its boundary, before its new ones."""
        rule, computed = self.setting.rule, int(self.positions[self.reading[request]][0])
        first = rule.absorbed(rule.boundary(computed))
        return torch.arange(first, computed - self.setting.window, device=self.setting.device)

    def _fill(self, memory: MemorySpec) -> None:
        heads, size = self.model.heads, self.model.head_size
        for request, rows in self.reading.items():
            pending = self.since_boundary(request)
            owners = torch.full_like(pending, request)
            evicted = torch.cat((pending, self.positions[rows] - self.setting.window))
            keys, values = torch.randn(2, len(evicted), self.model.kv_heads, size)
            gates = random_gates(memory, len(evicted), heads)
            self.pool.put_tokens(torch.cat((owners, self.owners[rows])), evicted, keys, values, gates)
            pages, computed = (
                self.pool.pages_of_states(self.requests[request : request + 1]),
                int(self.positions[rows][0]),
            )
            state = torch.zeros(1, heads, size, size, device=self.setting.device)
            if computed > self.setting.capacity:
                self.pool.state.scatter(pages, state.normal_())
        self.keep_updates()

    def keep_updates(self) -> None:
        """Keep the updates of tokens since the boundary, as earlier steps would have left them."""
        if self.memory is None or not self.memory.delta:
            return
        for request in self.reading:
            pending = self.since_boundary(request)
            if len(pending):
                who = self.requests[request : request + 1]
                state = self.pool.states(who)[0]
                if int(pending[0]) == self.setting.sinks:
                    state = torch.zeros_like(state)
                self._keep(
                    self.memory, self.pool.pages_of_states(who), state, torch.full_like(pending, request), pending
                )

    def _keep(
        self, memory: MemorySpec, pages: torch.Tensor, state: torch.Tensor, owners: torch.Tensor, pending: torch.Tensor
    ) -> None:
        """Write the updates of pending tokens, token by token as the formula has them."""
        keys, values, gates = self.pool.tokens(owners, pending)
        g, b = decay_and_rate(memory, gates.float(), self.A_log)
        group, updates = self.model.group, []
        k = l2_normalize(keys).repeat_interleave(group, 1)
        v = values.float().repeat_interleave(group, 1)
        for i in range(len(pending)):
            state = g[i].exp()[:, None, None] * state
            updates.append(b[i][:, None] * (v[i] - torch.einsum("hkv,hk->hv", state, k[i])))
            state = state + torch.einsum("hk,hv->hkv", k[i], updates[-1])
        rows = torch.arange(len(pending), device=pending.device)
        self.pool.state.scatter_kept(pages.expand(len(pending), -1), torch.stack(updates), rows)

    def __str__(self) -> str:
        memory = self.memory.name if self.memory else "no memory"
        return f"{self.model.name} {memory}, {len(self.new)} requests, {sum(self.new)} tokens"

    @cached_property
    def prefill_plan(self) -> PrefillPlan:
        """What the batch absorbs."""
        setting = self.setting
        return plan_prefill(self.stretches, self.pool.window_table, setting.rule, block_size=setting.block_size)

    def plan_decode(self) -> None:
        """Find what reads."""
        found = (self.first_rows, self.counts, self.rows[:, None], self.read_positions[:, None])
        find_steps(self.starts, self.lens, self.setting.capacity, *found)

    def write(self) -> None:
        """Write the new tokens to their pages."""
        write_window_pages(self.key, self.value, self.gates, self.slots, self.pool.window)

    def decode(self, queries: int = 1) -> torch.Tensor:
        """Absorb and read one token of each request; return `o`. With more ``queries`` there is room for drafts."""
        pool, o = self.pool, self.o[:, None]
        pages = (pool.window, pool.window_table, pool.state, pool.state_table)
        keywords = {"memory": self.memory, "scale": self.scale, "A_log": self.A_log, "settling": self.setting.rule}
        if queries > 1:
            o = o.new_empty((len(o), queries, *o.shape[2:]))
        absorb_and_read_steps(self.query, *pages, self.first_rows, self.counts, self.lens, o, **keywords)
        return self.o

    def prefill(self) -> torch.Tensor:
        """Absorb and read all tokens past ``W + S``; return what is read, ``[N, H, D]``."""
        pages = (self.pool.window, self.pool.state, self.pool.state_table)
        keywords = {"memory": self.memory, "scale": self.scale, "A_log": self.A_log}
        return prefill_memory(self.query, *pages, self.prefill_plan, **keywords)

    def read_out(self, o: torch.Tensor, rows: torch.Tensor, router: torch.Tensor | None = None) -> None:
        """Add what was read to the output."""
        sums = {}
        if self.memory.norm_all_heads:
            sums = {"squares": torch.empty(len(rows), device=o.device), "norm_size": o[0].numel()}
            gated_squares(o, self.z, rows, sums["squares"])
        read_out(o, self.z, rows, self.norm, self.o_proj, self.output, **sums, router=router)

    def gather(self) -> tuple[torch.Tensor, ...]:
        """Return what flash-linear-attention's kernels take, gathered from pages."""
        return gather_stretches(self.query, self.pool.window, self.prefill_plan, memory=self.memory, A_log=self.A_log)

    def gather_states(self) -> torch.Tensor:
        """Return the states ``[R, H, D_v, D_k]``."""
        return gather_states(self.pool.state, self.pool.state_table, self.prefill_plan)

    def scatter_states(self, states: torch.Tensor) -> None:
        """Write the states back."""
        scatter_states(states, self.pool.state, self.pool.state_table, self.prefill_plan)

    def chunks(self) -> Call:
        """Return flash-linear-attention's chunk kernels, on tensors that lie ready."""
        ready = (*self.gather(), self.gather_states(), self.prefill_plan)
        return partial(chunk_stretches, *ready, memory=self.memory, scale=self.scale)

    def recurrent(self, *, on_pages: bool) -> Callable[[], torch.Tensor]:
        """Return flash-linear-attention's recurrent kernel for one token a request, which returns what is read.

        Its inputs lie ready. States are gathered ``on_pages`` before and scattered after, or lie ready as well.
        """
        from fla.ops.gated_delta_rule import fused_recurrent_gated_delta_rule
        from fla.ops.simple_gla import fused_recurrent_simple_gla

        q, k, v, g, b = (x.unsqueeze(1) for x in self.gather()[:5])
        settings = {"output_final_state": True, "state_v_first": True, "scale": self.scale}
        if self.memory.delta:
            g = g if self.memory.has_decay else None
            kernel = partial(fused_recurrent_gated_delta_rule, q, k, v, g, beta=b, **settings)
        else:
            kernel = partial(fused_recurrent_simple_gla, q, k, v, g, **settings)
        ready = None if on_pages else self.gather_states()

        def call() -> torch.Tensor:
            o, states = kernel(initial_state=self.gather_states() if on_pages else ready)
            if on_pages:
                self.scatter_states(states)
            return o.squeeze(1)

        return call
