"""A layer's pages on a device, with random block tables: as vLLM hands them to kernels."""

import math
from collections.abc import Sequence

import torch

from kernel_cases.setting import Model, Setting
from vllm_ahn.kernels.pages import StatePageLayout, StatePages, WindowPageLayout, WindowPages
from vllm_ahn.memory.spec import MEMORIES

VAST = 1 << 32
"""Elements: twice what 32 bits count with a sign."""


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
        window: their planes, with a memory.
        planes: keys, values and gates, as kernels take them.
        state: the same pages as states, with a memory.
        window_table, state_table: ``[requests, width]`` int32, as wide as the longest sequence.
    """

    def __init__(
        self,
        setting: Setting,
        model: Model,
        memory: str | None,
        requests: int,
        blocks: Sequence[int],
        *,
        random: bool = True,
        vast: bool = False,
    ) -> None:
        group = model.heads // model.kv_heads
        gates = MEMORIES[memory].num_gates * group if memory else 0
        layout = WindowPageLayout(model.kv_heads, model.head_size, gates, setting.block_size, setting.dtype)
        device = setting.device
        self.block_size = setting.block_size
        self.state_layout = StatePageLayout(model.heads, model.head_size, layout.page_bytes)
        self.num_state_pages = self.state_layout.num_pages if memory else 0
        held = len(blocks) + self.num_state_pages
        total = 1 + requests * held
        page = (model.kv_heads, self.block_size, layout.content_elements)
        apart = VAST // (total * math.prod(page)) + 1 if vast else 1
        self.cache = torch.empty((total, apart, *page), dtype=setting.dtype, device=device)[:, -1]
        if random:
            self.cache.normal_()  # states too: two random halves make a random number in float32
        else:
            self.cache.fill_(math.nan)
        self.window = WindowPages(self.cache, layout)
        self.planes = (self.window.keys, self.window.values, self.window.gates)
        if memory:
            self.state = StatePages(self.cache, self.state_layout)
            if random:
                self.window.gates.uniform_()
                if memory == "GatedDeltaNet":
                    self.window.gates[..., ::2].neg_()
        self.cache[0] = math.nan
        width = -(-setting.context // self.block_size) + 3 & ~3  # rows begin at multiples of 16 bytes
        ids = torch.randperm(total - 1, device=device).add_(1).int().view(requests, held)
        self.window_table = torch.zeros((requests, width), dtype=torch.int32, device=device)
        self.state_table = torch.zeros_like(self.window_table)
        self.window_table[:, torch.tensor(blocks, device=device)] = ids[:, : len(blocks)]
        self.state_table[:, : self.num_state_pages] = ids[:, len(blocks) :]

    def places(self, requests: torch.Tensor, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Blocks and offsets of tokens, int64, of requests and positions ``[n]`` int64."""
        return self.window_table[requests, positions // self.block_size].long(), positions % self.block_size

    def slots(self, requests: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """The same in one number, as vLLM has it."""
        blocks, offsets = self.places(requests, positions)
        return blocks * self.block_size + offsets

    def tokens(self, requests: torch.Tensor, positions: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Keys and values ``[n, Hkv, D]`` and gates ``[n, H, num_gates]`` of tokens, by plain indexing."""
        blocks, offsets = self.places(requests, positions)
        keys, values, gates = (plane[blocks, :, offsets] for plane in self.planes)
        return keys, values, gates.reshape(len(blocks), self.state_layout.num_heads, -1)

    def put_tokens(
        self, requests: torch.Tensor, positions: torch.Tensor, k: torch.Tensor, v: torch.Tensor, gates: torch.Tensor
    ) -> None:
        """Write tokens, shaped as :meth:`tokens` returns them, by plain indexing."""
        blocks, offsets = self.places(requests, positions)
        for plane, x in zip(self.planes, (k, v, gates), strict=True):
            plane[blocks, :, offsets] = x.reshape(len(blocks), plane.shape[1], -1).to(plane.dtype)

    def states(self, requests: torch.Tensor) -> torch.Tensor:
        """``[n, H, D_k, D_v]`` float32."""
        return self.state.gather(self._state_pages(requests))

    def put_states(self, requests: torch.Tensor, states: torch.Tensor) -> None:
        """Write ``[n, H, D_k, D_v]``."""
        self.state.scatter(self._state_pages(requests), states)

    def other_pages(self, requests: torch.Tensor) -> torch.Tensor:
        """Bytes of all pages but those of the states of some requests."""
        others = torch.ones(len(self.cache), dtype=torch.bool, device=self.cache.device)
        others[self._state_pages(requests).flatten()] = False
        return self.cache[others].view(torch.uint8)

    def _state_pages(self, requests: torch.Tensor) -> torch.Tensor:
        return self.state_table[requests, : self.num_state_pages].long()
