"""Random paged memories for kernel tests: pages full of NaN but for what belongs to a request."""

import math
import mmap
from dataclasses import dataclass, replace

import torch

from vllm_ahn.kernels.pages import StatePageLayout, StatePages, WindowPageLayout, WindowPages
from vllm_ahn.kernels.settled import GRANULARITY
from vllm_ahn.memory.spec import MEMORIES, MemorySpec

NUM_GATES = {"GatedDeltaNet": 2, "DeltaNet": 1, "Mamba2": 1}

MAP_NORESERVE = 0x4000  # Linux; Python's mmap names it from 3.13 on


def poisoned(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.full(shape, math.nan, dtype=dtype)


@dataclass(frozen=True)
class Shape:
    """Sizes of one layer."""

    heads: int
    kv_heads: int
    head_size: int
    block_size: int
    memory: str
    dtype: torch.dtype = torch.float32
    state_dtype: torch.dtype = torch.float32

    @property
    def group(self) -> int:
        return self.heads // self.kv_heads

    @property
    def spec(self) -> MemorySpec:
        return MEMORIES[self.memory]

    @property
    def num_gates(self) -> int:
        return NUM_GATES[self.memory]

    @property
    def delta(self) -> bool:
        return self.memory != "Mamba2"

    @property
    def scale(self) -> float:
        return 1.0 if self.memory == "Mamba2" else self.head_size**-0.5

    @property
    def window_layout(self) -> WindowPageLayout:
        return WindowPageLayout(self.kv_heads, self.head_size, self.num_gates * self.group, self.block_size, self.dtype)

    @property
    def state_layout(self) -> StatePageLayout:
        kept = GRANULARITY if self.delta else 0
        return StatePageLayout(self.heads, self.head_size, self.window_layout.page_bytes, self.state_dtype, kept)


class WithoutDelta(Shape):
    """Of a memory that is not in the table: as GatedDeltaNet, but for the delta rule. Kernels know flags, no names."""

    spec = replace(MEMORIES["GatedDeltaNet"], delta=False)
    delta = False


class PagedCase:
    """One layer's pool, cut by both groups, with random block tables.

    As in vLLM, both memories are views of the same bytes, a block belongs to one request at most, and what tables hold
    behind a request's end is others' business: those entries name blocks of NaN, or none at all.
    """

    def __init__(
        self, shape: Shape, num_requests: int, tokens: int, *, slots: int = 1, apart: int = 1, vast: bool = False
    ) -> None:
        """``tokens`` is the most a request has; ``apart`` puts other layers' pages between those of this one.

        ``vast`` puts them a GiB apart, so that offsets do not fit 32 bits; then the pool holds zeros instead of NaN.
        """
        self.shape = shape
        window, state = shape.window_layout, shape.state_layout
        per_request = -(-tokens // shape.block_size)
        state_pages = slots * state.num_pages
        first = 9 if vast else 1  # block 0 is vLLM's null block: no request's
        total = num_requests * (per_request + state_pages) + first + 2
        content = window.content_elements
        page = (shape.kv_heads, shape.block_size, content)
        if vast:
            # Address space, of which only what is touched becomes memory.
            flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_NORESERVE
            raw = torch.frombuffer(mmap.mmap(-1, total << 30, flags=flags), dtype=shape.dtype)
            cache = raw.view(total, -1)[:, : math.prod(page)].unflatten(1, page)
        else:
            cache = poisoned(total, apart, *page, dtype=shape.dtype)[:, apart - 1]
        self.cache = cache
        self.window = WindowPages(cache, window)
        self.state = StatePages(cache, state)
        ids = torch.randperm(total - first)[: num_requests * (per_request + state_pages)].int() + first
        ids = ids.view(num_requests, per_request + state_pages)
        self.window_table = torch.zeros(num_requests, per_request + 2, dtype=torch.int32)
        self.window_table[:, :per_request] = ids[:, :per_request]
        self.state_table = torch.zeros(num_requests, state_pages + 2, dtype=torch.int32)
        self.state_table[:, :state_pages] = ids[:, per_request:]

    def slots(self, requests: int | torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """Slots of tokens at positions of a request, or of as many requests, int64."""
        size = self.shape.block_size
        return self.window_table[requests, positions // size].long() * size + positions % size

    def put_tokens(self, slots: torch.Tensor, k: torch.Tensor, v: torch.Tensor, gates: torch.Tensor | None) -> None:
        """Write ``k``, ``v`` ``[n, Hkv, D]`` and ``gates [n, H, num_gates]`` to ``slots [n]`` with plain indexing."""
        blocks, offsets = slots // self.shape.block_size, slots % self.shape.block_size
        self.window.keys[blocks, :, offsets] = k.to(self.shape.dtype)
        self.window.values[blocks, :, offsets] = v.to(self.shape.dtype)
        if gates is not None:
            by_kv_head = gates.unflatten(1, (self.shape.kv_heads, self.shape.group)).flatten(2)
            self.window.gates[blocks, :, offsets] = by_kv_head.to(self.shape.dtype)

    def put_state(self, request: int, state: torch.Tensor, slot: int = 0) -> None:
        """Write ``state [H, Dk, Dv]``."""
        self.state.scatter(self.state_pages(request, slot), state[None])

    def get_state(self, request: int, slot: int = 0) -> torch.Tensor:
        return self.state.gather(self.state_pages(request, slot))[0]

    def state_pages(self, request: int, slot: int = 0) -> torch.Tensor:
        """``[1, num_pages]`` int64."""
        pages = self.shape.state_layout.num_pages
        return self.state_table[request, slot * pages : (slot + 1) * pages].long()[None]


def random_gates(shape: Shape, *batch: int) -> torch.Tensor:
    """Gates as projections make them, ``[*batch, H, num_gates]`` float32."""
    step = torch.nn.functional.softplus(torch.randn(*batch, shape.heads) - 1)
    rate = torch.rand(*batch, shape.heads)
    if shape.memory == "GatedDeltaNet":
        return torch.stack((-step, rate), -1)
    return (step if shape.memory == "Mamba2" else rate).unsqueeze(-1)


def decay_and_rate(shape: Shape, gates: torch.Tensor, A_log: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """``g`` and ``b``, from the table of what each memory computes."""
    if shape.memory == "GatedDeltaNet":
        return gates[..., 0], gates[..., 1]
    if shape.memory == "DeltaNet":
        return torch.zeros_like(gates[..., 0]), gates[..., 0]
    return -A_log.exp() * gates[..., 0], gates[..., 0]
