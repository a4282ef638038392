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
from vllm_ahn.kernels.cache_write import write_window_pages
from vllm_ahn.kernels.decode import decode_memory, decode_reads
from vllm_ahn.kernels.pages import StatePageLayout, StatePages, WindowPageLayout, WindowPages
from vllm_ahn.kernels.prefill import chunk_stretches, prefill_memory
from vllm_ahn.kernels.prefill_gather import gather_states, gather_stretches, scatter_states
from vllm_ahn.kernels.prefill_plan import PrefillPlan, Stretch, plan_prefill
from vllm_ahn.kernels.read_out import gated_squares, read_out
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
    """Pages of some requests, each of which holds the same blocks of its sequence and, with a memory, a state.

    Both memories are views of the same bytes, and blocks lie anywhere. Table entries of blocks that a request does not
    hold name block 0, which is full of NaN.

    Args:
        setting: sizes.
        model: whose layer.
        memory: its memory; None for a layer without, whose pages hold no gates.
        requests: how many.
        blocks: numbers of the blocks that each request holds.
        random: fill all other pages with random keys, values, gates and states; else with NaN, for a caller that writes
            what may be read.
        vast: put pages so far apart that offsets of elements do not fit 32 bits.

    Attributes:
        cache: ``[num_blocks, Hkv, block_size, content]``, all pages.
        window: their keys, values and gates.
        state: the same pages as states.
        window_table, state_table: ``[requests, width]`` int32, as wide as the longest sequence.
    """

    def __init__(
        self,
        setting: Setting,
        model: Model,
        memory: MemorySpec | None,
        requests: int,
        blocks: Sequence[int],
        *,
        random: bool = True,
        vast: bool = False,
    ) -> None:
        self.block_size, self.heads, device = setting.block_size, model.heads, setting.device
        gates = memory.num_gates * model.group if memory else 0
        layout = WindowPageLayout(model.kv_heads, model.head_size, gates, self.block_size, setting.dtype)
        states = StatePageLayout(model.heads, model.head_size, layout.page_bytes, setting.state_dtype)
        self.state_pages = states.num_pages if memory else 0
        held = len(blocks) + self.state_pages
        total = 1 + requests * held
        page = (model.kv_heads, self.block_size, layout.content_elements)
        apart = VAST // (total * math.prod(page)) + 1 if vast else 1
        self.cache = torch.empty((total, apart, *page), dtype=setting.dtype, device=device)[:, -1]
        self.window, self.state = WindowPages(self.cache, layout), StatePages(self.cache, states)
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
        self.state_table = torch.zeros_like(self.window_table)
        self.window_table[:, torch.tensor(blocks, device=device)] = ids[:, : len(blocks)]
        self.state_table[:, : self.state_pages] = ids[:, len(blocks) :]

    @property
    def planes(self) -> tuple[torch.Tensor, ...]:
        """Keys, values and gates, ``[num_blocks, Hkv, block_size, ...]``."""
        return self.window.keys, self.window.values, self.window.gates

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

    def states(self, requests: torch.Tensor) -> torch.Tensor:
        """Return states ``[n, H, D_k, D_v]``, float32."""
        return self.state.gather(self.state_table[requests, : self.state_pages].long())

    def put_states(self, requests: torch.Tensor, states: torch.Tensor) -> None:
        """Write states ``[n, H, D_k, D_v]``."""
        self.state.scatter(self.state_table[requests, : self.state_pages].long(), states)

    def other_pages(self, requests: torch.Tensor) -> torch.Tensor:
        """Return the bytes of all pages but those of the states of some requests."""
        others = torch.ones(len(self.cache), dtype=torch.bool, device=self.cache.device)
        others[self.state_table[requests, : self.state_pages].long().flatten()] = False
        return self.cache[others].view(torch.uint8)


class Layer:
    """A layer and requests with new tokens, one after another in a batch.

    Args:
        setting: sizes.
        model: whose layer.
        memory: None: without.
        lens: tokens of each request, with the new ones.
        new: new tokens of each request.
        blocks: see `Pool`, as are ``random`` and ``vast``. Where pages are not random, the tokens that leave the
            window now and the states that are to exist by then are.
        copies: of the read-out's projection, as a model has one in every layer.
    """

    def __init__(
        self,
        setting: Setting,
        model: Model,
        memory: MemorySpec | None,
        lens: Sequence[int],
        new: Sequence[int],
        blocks: Sequence[int],
        *,
        random: bool = True,
        vast: bool = False,
        copies: int = 1,
    ) -> None:
        self.setting, self.model, self.memory, self.lens, self.new = setting, model, memory, lens, new
        heads, kv_heads, size, tokens = model.heads, model.kv_heads, model.head_size, sum(new)
        self.pool = Pool(setting, model, memory, len(lens), blocks, random=random, vast=vast)
        with torch.device(setting.device):
            qkv = torch.randn(tokens, heads + 2 * kv_heads, size).to(setting.dtype)
            self.query, self.key, self.value = qkv.split((heads, kv_heads, kv_heads), dim=1)
            self.gates = random_gates(memory, tokens, heads) if memory else None
            self.z, self.A_log = torch.randn(tokens, heads), torch.randn(heads)
            self.output = torch.randn(tokens, heads, size).to(setting.dtype)
            self.norm = 1 + 0.1 * torch.randn(heads * size if memory and memory.norm_all_heads else size)
            self.norm = self.norm.to(setting.dtype)
            self.o_proj = (torch.randn(copies, heads, size, size) * size**-0.5).to(setting.dtype)
        if memory and not random:
            self._fill()

    def _fill(self) -> None:
        assert self.memory is not None
        step, heads, kv_heads = self.step(), self.model.heads, self.model.kv_heads
        with torch.device(self.setting.device):
            for request, rows in step.reading.items():
                evicted = step.positions[rows] - self.setting.window
                requests = torch.full_like(evicted, request)
                keys, values = torch.randn(2, len(evicted), kv_heads, self.model.head_size)
                self.pool.put_tokens(requests, evicted, keys, values, random_gates(self.memory, len(evicted), heads))
                if int(evicted[0]) > self.setting.sinks:
                    self.pool.put_states(requests[:1], torch.randn(1, heads, *(2 * [self.model.head_size])))

    def step(self, first: int = 0, number: int | None = None) -> Step:
        """Return a batch of ``number`` requests, all by default."""
        return Step(self, first, len(self.lens) if number is None else number)

    def steps(self, number: int) -> list[Step]:
        """Return batches of ``number`` requests each."""
        return [self.step(first, number) for first in range(0, len(self.lens), number)]


class Step:
    """What a layer does for a batch of its requests.

    Attributes:
        requests: ``[R]`` int64.
        starts, lens: ``[R + 1]`` and ``[R]`` int32, where tokens of requests begin, and how many they have by the end.
        owners, positions, slots: ``[T]`` int64, request, position and slot of the new tokens.
        query, output, z: ``[T, H, ...]``, the layer's for these tokens.
        reading: the tokens past ``W + S`` of each request that has any, by its number in the layer.
        rows, o: what a decode reads: ``[R]`` int32 the batch's row or -1, and ``[R, H, D]`` float32.
    """

    def __init__(self, layer: Layer, first: int, number: int) -> None:
        setting, device = layer.setting, layer.setting.device
        self.layer, self.number = layer, first // max(number, 1)
        part = slice(first, first + number)
        lens, new = layer.lens[part], layer.new[part]
        before = sum(layer.new[:first])
        tokens = slice(before, before + sum(new))
        self.query, self.key, self.value = layer.query[tokens], layer.key[tokens], layer.value[tokens]
        self.gates = layer.gates[tokens] if layer.gates is not None else None
        self.z, self.output = layer.z[tokens], layer.output[tokens]
        self.window_table, self.state_table = layer.pool.window_table[part], layer.pool.state_table[part]
        starts = [0, *itertools.accumulate(new)]
        self.reading: dict[int, slice] = {}
        self.stretches: list[Stretch] = []
        for i, (length, count) in enumerate(zip(lens, new, strict=True)):
            position = max(length - count, setting.capacity)
            if length > position:
                row = starts[i] + position - (length - count)
                self.reading[first + i] = slice(row, starts[i + 1])
                self.stretches.append(Stretch(i, row, position, length - position))
        owners = [first + i for i, count in enumerate(new) for _ in range(count)]
        positions = [p for length, count in zip(lens, new, strict=True) for p in range(length - count, length)]
        with torch.device(device):
            self.requests = torch.arange(first, first + number)
            self.starts = torch.tensor(starts, dtype=torch.int32)
            self.lens = torch.tensor(lens, dtype=torch.int32)
            self.owners, self.positions = torch.tensor(owners), torch.tensor(positions)
            self.rows = torch.full((number,), -1, dtype=torch.int32)
            self.o = torch.full((number, layer.model.heads, layer.model.head_size), math.nan)
        blocks, offsets = layer.pool.places(self.owners, self.positions)
        self.slots = blocks * setting.block_size + offsets

    @property
    def memory(self) -> MemorySpec:
        """The layer's, which has to be there."""
        assert self.layer.memory is not None
        return self.layer.memory

    @property
    def scale(self) -> float:
        """The factor on what is read."""
        return self.memory.scale(self.layer.model.head_size)

    @cached_property
    def prefill_plan(self) -> PrefillPlan:
        """What the batch absorbs."""
        setting = self.layer.setting
        sizes = {"window": setting.window, "sinks": setting.sinks, "block_size": setting.block_size}
        return plan_prefill(self.stretches, self.window_table, **sizes)

    def plan_decode(self) -> None:
        """Find what reads."""
        decode_reads(self.starts, self.lens, self.layer.setting.capacity, self.rows)

    def write(self) -> None:
        """Write the new tokens to their pages."""
        write_window_pages(self.key, self.value, self.gates, self.slots, self.layer.pool.window)

    def decode(self) -> torch.Tensor:
        """Absorb and read one token of each request; return `o`."""
        layer, setting = self.layer, self.layer.setting
        decode_memory(
            self.query,
            layer.pool.window,
            self.window_table,
            layer.pool.state,
            self.state_table,
            self.rows,
            self.lens,
            self.o,
            memory=self.memory,
            window=setting.window,
            sinks=setting.sinks,
            scale=self.scale,
            A_log=layer.A_log,
        )
        return self.o

    def prefill(self) -> torch.Tensor:
        """Absorb and read all tokens past ``W + S``; return what is read, ``[N, H, D]``."""
        layer, pool = self.layer, self.layer.pool
        keywords = {"memory": self.memory, "scale": self.scale, "A_log": layer.A_log}
        return prefill_memory(self.query, pool.window, pool.state, self.state_table, self.prefill_plan, **keywords)

    def read_out(self, o: torch.Tensor, rows: torch.Tensor, router: torch.Tensor | None = None) -> None:
        """Add what was read to the output, by the weights of one of the layer's copies."""
        layer = self.layer
        weights = (layer.norm, layer.o_proj[self.number % len(layer.o_proj)])
        if not self.memory.norm_all_heads:
            read_out(o, self.z, rows, *weights, self.output, router=router)
            return
        squares = torch.empty(len(rows), device=o.device)
        gated_squares(o, self.z, rows, squares)
        sums = {"squares": squares, "norm_size": o[0].numel()}
        read_out(o, self.z, rows, *weights, self.output, **sums, router=router)

    def gather(self) -> tuple[torch.Tensor, ...]:
        """Return what flash-linear-attention's kernels take, gathered from pages."""
        keywords = {"memory": self.memory, "A_log": self.layer.A_log}
        return gather_stretches(self.query, self.layer.pool.window, self.prefill_plan, **keywords)

    def gather_states(self) -> torch.Tensor:
        """Return the states ``[R, H, D_v, D_k]``."""
        return gather_states(self.layer.pool.state, self.state_table, self.prefill_plan)

    def scatter_states(self, states: torch.Tensor) -> None:
        """Write the states back."""
        scatter_states(states, self.layer.pool.state, self.state_table, self.prefill_plan)

    def chunks(self) -> Call:
        """Return flash-linear-attention's chunk kernels, on tensors that lie ready."""
        keywords = {"memory": self.memory, "scale": self.scale}
        return partial(chunk_stretches, *self.gather(), self.gather_states(), self.prefill_plan, **keywords)

    def recurrent(self, *, on_pages: bool) -> Callable[[], torch.Tensor]:
        """Return flash-linear-attention's recurrent kernel for one token a request, which returns what is read.

        Its inputs lie ready. States are gathered ``on_pages`` before and scattered after, or lie ready as well.
        """
        ready, states = self.gather(), None if on_pages else self.gather_states()

        def call() -> torch.Tensor:
            if states is not None:
                return _recurrent(self.memory, self.scale, *ready, states)[0]
            o, new_states = _recurrent(self.memory, self.scale, *ready, self.gather_states())
            self.scatter_states(new_states)
            return o

        return call


def _recurrent(memory: MemorySpec, scale: float, *inputs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return reads ``[n, H, D]`` and new states, from what `gather_stretches` returns and states."""
    q, k, v, g, b = (x.unsqueeze(1) for x in inputs[:5])
    settings = {"initial_state": inputs[5], "output_final_state": True, "state_v_first": True, "scale": scale}
    if memory.delta:
        from fla.ops.gated_delta_rule import fused_recurrent_gated_delta_rule

        o, states = fused_recurrent_gated_delta_rule(q, k, v, g if memory.has_decay else None, beta=b, **settings)
    else:
        from fla.ops.simple_gla import fused_recurrent_simple_gla

        o, states = fused_recurrent_simple_gla(q, k, v, g, **settings)
    return o.squeeze(1), states
