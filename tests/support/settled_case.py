"""Random requests over paged memories, stepped with rejected drafts, against the naive recurrence in float64."""

import math
import random
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

import torch

from vllm_ahn.kernels import l2_normalize, naive_recurrence
from vllm_ahn.kernels.pages import StatePageLayout, StatePages, WindowPageLayout, WindowPages
from vllm_ahn.kernels.recurrence.gates import decay_and_rate
from vllm_ahn.kernels.settled import GRANULARITY, Settling
from vllm_ahn.kernels.steps import Steps
from vllm_ahn.memory.spec import MEMORIES, MemorySpec


@dataclass
class SettledCase:
    """One layer with requests of ``num_tokens`` each, whose keys, values and gates all lie in the window's pages.

    Pages that hold nothing yet are NaN, and so are entries of block tables behind a request's own, as they may name
    other requests' pages: they name block 0, which is all NaN.
    """

    rule: Settling
    memory: str = "GatedDeltaNet"
    heads: int = 4
    kv_heads: int = 2
    head_size: int = 16
    block_size: int = 16
    dtype: torch.dtype = torch.float32
    state_dtype: torch.dtype = torch.float32
    num_requests: int = 3
    num_tokens: int = 150
    decay: float = 1.0
    """Factor on ``g``."""
    transposed: bool = True
    """Keys are stored as vLLM's CPU kernels do."""

    def __post_init__(self) -> None:
        spec, group = self.spec, self.heads // self.kv_heads
        window = WindowPageLayout(self.kv_heads, self.head_size, spec.num_gates * group, self.block_size, self.dtype)
        kept = GRANULARITY if spec.delta else 0
        state = StatePageLayout(self.heads, self.head_size, window.page_bytes, self.state_dtype, kept)
        blocks = -(-self.num_tokens // self.block_size)
        pages = self.rule.num_slots * state.num_pages
        total = 1 + self.num_requests * (blocks + pages)
        cache = torch.full((total, self.kv_heads, self.block_size, window.content_elements), math.nan, dtype=self.dtype)
        self.window, self.state = WindowPages(cache, window), StatePages(cache, state)
        ids = (torch.randperm(total - 1) + 1).int().view(self.num_requests, -1)
        spare = ids.new_zeros((self.num_requests, 3))
        self.window_table = torch.cat((ids[:, :blocks], spare), 1)
        self.state_table = torch.cat((ids[:, blocks:], spare), 1)
        self._fill()

    @property
    def spec(self) -> MemorySpec:
        return MEMORIES[self.memory]

    @property
    def scale(self) -> float:
        return self.spec.scale(self.head_size)

    def _fill(self) -> None:
        """Make up tokens, write them, and run the naive recurrence over what the pages then hold."""
        size = (self.num_requests, self.num_tokens)
        k, v = torch.randn(2, *size, self.kv_heads, self.head_size).to(self.dtype)
        self.A_log = torch.randn(self.heads) if self.spec.decay_from_rate else None
        gates = torch.rand(*size, self.heads, self.spec.num_gates)
        if self.spec.keeps_decay:
            gates[..., 0] = -self.decay * gates[..., 0]
        gates = gates.to(self.dtype)
        self.query = torch.randn(*size, self.heads, self.head_size).to(self.dtype)
        position = torch.arange(self.num_tokens)
        blocks, offsets = self.window_table[:, position // self.block_size].long(), position % self.block_size
        keys = self.window.keys_transposed.transpose(-1, -2) if self.transposed else self.window.keys
        keys[blocks, :, offsets] = k
        self.window.values[blocks, :, offsets] = v
        self.window.gates[blocks, :, offsets] = gates.unflatten(2, (self.kv_heads, -1)).flatten(3)
        absorbed = slice(self.rule.sinks, self.num_tokens - self.rule.window)
        g, b = decay_and_rate(self.spec, gates[:, absorbed].double(), self.A_log)
        self.wanted, _ = naive_recurrence(  # of the query at W + S and those after it
            l2_normalize(self.query[:, self.rule.capacity :].double()),
            l2_normalize(k[:, absorbed].double()),
            v[:, absorbed].double(),
            g,
            b,
            self.scale,
            self.spec.delta,
        )

    def run(
        self,
        step: Callable[["SettledCase", torch.Tensor, Steps], torch.Tensor],
        drafts: int,
        seed: int,
        rejects: bool = True,
    ) -> float:
        """Step all requests to their ends; returns the largest error of what is read.

        Args:
            step: absorbs and reads, given the batch's queries ``[num_tokens, H, D]``.
            drafts: a step has so many queries and one, of which any number but the first may be rejected.
            seed: of what is drawn.
            rejects: drafts are rejected at all. How many of a full step were not is counted in ``accepted``.
        """
        rng, worst = random.Random(seed), 0.0
        self.accepted: Counter[int] = Counter()
        computed = [self.rule.capacity] * self.num_requests
        while running := [r for r in range(self.num_requests) if computed[r] < self.num_tokens]:
            chosen = [r for r in running if rng.random() < 0.8] or running
            lens = [
                min(rng.choice((1, 1 + drafts, rng.randint(1, 1 + drafts))), self.num_tokens - computed[r])
                for r in chosen
            ]
            # Between the queries lie others', which do not step.
            gaps = [rng.randint(0, 2) for _ in chosen]
            firsts = [sum(lens[:i]) + sum(gaps[: i + 1]) for i in range(len(chosen))]
            query = torch.full((sum(lens) + sum(gaps), self.heads, self.head_size), math.nan, dtype=self.dtype)
            for request, first, length in zip(chosen, firsts, lens, strict=True):
                query[first : first + length] = self.query[request, computed[request] : computed[request] + length]
            o = step(self, query, Steps(*map(torch.tensor, (chosen, firsts, lens, [computed[r] for r in chosen]))))
            wanted = torch.cat(
                [
                    self.wanted[r, computed[r] - self.rule.capacity : computed[r] - self.rule.capacity + length]
                    for r, length in zip(chosen, lens, strict=True)
                ]
            )
            assert o.shape == wanted.shape
            error = (o.double() - wanted).abs()
            worst = max(worst, float(error.nan_to_num(math.inf).max()))
            for request, length in zip(chosen, lens, strict=True):
                rare = [taken for taken in range(1, length + 1) if not self.accepted[taken - 1]]
                taken = rng.choice(rare or range(1, length + 1)) if rejects else length
                computed[request] += taken
                if length == 1 + drafts:
                    self.accepted[taken - 1] += 1
        return worst
