"""What a step's batch asks of AHN layers on a GPU, worked out once for all layers.

Nothing here waits for the device. Lengths that the host knows are bounds while drafts are in flight, so for requests
with no more new tokens than a step of drafts has, the device decides: which of their queries step, and what they see.
Only how prompts are cut is read from the host's copies, which for those are exact. A step in which every request has as
many new tokens takes all it needs from tensors that stay in place, so that a CUDA graph may replay it: what is computed
here goes to buffers of the planner, the rest are vLLM's own.
"""

from dataclasses import dataclass

import numpy as np
import torch
from vllm.utils.math_utils import round_up
from vllm.utils.torch_utils import async_tensor_h2d
from vllm.v1.attention.backend import CommonAttentionMetadata

from vllm_ahn.attention.paged import PagedAttention
from vllm_ahn.attention.plan import AttentionSpans, StepRequests, cut_into_spans
from vllm_ahn.attention.window import span_limits
from vllm_ahn.cache.specs import AHNWindowSpec
from vllm_ahn.kernels.prefill_plan import PrefillPlan, plan_prefill
from vllm_ahn.kernels.settled import GRANULARITY
from vllm_ahn.kernels.steps_triton import find_steps
from vllm_ahn.kernels.tables import TILE_BLOCKS, compact_block_table, compact_width

MASKED_QUERIES = 1024
"""Queries of a span under a mask for sinks. vLLM's kernel then visits all keys of a span for each of its queries, those
after the query and those that have left its window included; a chunk cut into spans makes few such visits. With a
sliding window over a rearranged table it makes none, and spans are as long as the window allows."""


@dataclass
class GPUSteps:
    """Queries that step, of ``E`` requests, at most ``Q`` each."""

    requests: torch.Tensor | None
    """``[E]`` int32, which requests; None for all."""
    first_tokens: torch.Tensor
    """``[E]`` int32, where in the batch their first queries are."""
    counts: torch.Tensor
    """``[E]`` int32, how many they are."""
    tokens: torch.Tensor
    """``[E, Q]`` int32, where in the batch all of them are; -1 for none."""
    positions: torch.Tensor
    """``[E, Q]`` int64, their positions; for none some position at ``W + S`` or past it."""


@dataclass
class GPUPlan:
    """One step's work, the same for all layers."""

    spec: AHNWindowSpec
    num_tokens: int
    """Tokens in the batch, those included that pad it for a CUDA graph."""
    seq_lens: torch.Tensor
    """``[num_requests]`` int32, with the step's tokens."""
    block_table: torch.Tensor
    """``[num_requests, width]`` int32, the window group's."""
    slot_mapping: torch.Tensor
    """``[num_tokens]`` int64, where the new tokens' keys, values and gates go; -1 for tokens that pad the batch."""
    attention: PagedAttention
    causal: AttentionSpans
    """Plain causal attention of all requests, for layers of full attention."""
    windowed: list[AttentionSpans]
    """Sinks and window of all requests."""
    passes: list[PrefillPlan]
    """What chunks absorb, one after another."""
    steps: list[GPUSteps]
    """What steps after that: requests with few new tokens, and the last queries of chunks."""


class GPUPlanner:
    """Turns vLLM's batch into a :class:`GPUPlan`.

    Args:
        spec: the window group's spec.
        attention: the kernel that attends.
        max_requests: most requests in a batch, padding included.
        max_tokens: most tokens in a batch.
        device: where the step runs.
    """

    def __init__(
        self,
        spec: AHNWindowSpec,
        attention: PagedAttention,
        *,
        max_requests: int,
        max_tokens: int,
        device: torch.device,
    ) -> None:
        self.spec = spec
        self.attention = attention
        self.device = device
        self.span_limits = span_limits(spec, MASKED_QUERIES)
        self.max_span_len = min(self.span_limits[0], max_tokens)
        self.step_queries = 1 + spec.max_drafts
        """New tokens of a request up to which the device decides."""
        assert self.step_queries <= GRANULARITY <= spec.block_size
        on_device = {"dtype": torch.int32, "device": device}
        # What steps use stays in place for CUDA graphs, which are of steps only.
        self.step_table = torch.zeros((max_requests, self._table_width(self.step_queries)), **on_device)
        self.step_lens = torch.zeros(max_requests, **on_device)
        self.first_tokens = torch.zeros(max_requests, **on_device)
        self.counts = torch.zeros(max_requests, **on_device)
        self.tokens = torch.full((max_requests, self.step_queries), -1, **on_device)
        self.positions = torch.full_like(self.tokens, spec.capacity, dtype=torch.int64)
        self.sinks: torch.Tensor | None = None
        if not spec.rearrangeable:
            self.sinks = torch.full((max_requests + max_tokens // MASKED_QUERIES,), spec.sinks, **on_device)

    def plan(self, common: CommonAttentionMetadata, for_capture: bool = False) -> GPUPlan:
        """See :meth:`Planner.plan`."""
        starts = common.query_start_loc_cpu.numpy()
        assert common.seq_lens_cpu_upper_bound is not None
        seq_lens = common.seq_lens_cpu_upper_bound.numpy()[: len(starts) - 1]
        requests = StepRequests(starts, seq_lens, self.spec.settling)
        short = requests.query_lens <= self.step_queries
        any_beyond = bool(requests.beyond_window.any())
        causal = AttentionSpans(
            common.query_start_loc,
            common.seq_lens,
            common.block_table_tensor,
            common.max_query_len,
            common.max_seq_len,
        )
        windowed = causal
        steps = []
        if common.max_query_len <= self.step_queries:
            # Even if no request is beyond W + S, since a CUDA graph may be about to read the buffers.
            single = self._spans_in_place(common)
            found = self._find_steps(common)
            if for_capture or any_beyond:
                windowed = single
                steps.append(found)
            self.attention.schedule(single)
        else:
            if any_beyond:
                windowed = self._spans(common, requests, short)
                if (requests.beyond_window & short).any():
                    steps.append(self._find_steps(common))
                steps += self._tails(requests, short)
            self.attention.schedule(windowed)
        return GPUPlan(
            spec=self.spec,
            num_tokens=common.num_actual_tokens,
            seq_lens=common.seq_lens,
            block_table=common.block_table_tensor,
            slot_mapping=common.slot_mapping[: common.num_actual_tokens],
            attention=self.attention,
            causal=causal,
            windowed=[windowed],
            passes=[
                plan_prefill(stretches, common.block_table_tensor, self.spec.settling, block_size=self.spec.block_size)
                for stretches in requests.passes
            ],
            steps=steps,
        )

    def _find_steps(self, common: CommonAttentionMetadata) -> GPUSteps:
        """The queries that step of requests with few new tokens, in buffers that stay in place."""
        requests = len(common.seq_lens)
        steps = GPUSteps(
            None,
            self.first_tokens[:requests],
            self.counts[:requests],
            self.tokens[:requests],
            self.positions[:requests],
        )
        find_steps(
            common.query_start_loc,
            common.seq_lens,
            self.spec.capacity,
            steps.first_tokens,
            steps.counts,
            steps.tokens,
            steps.positions,
        )
        return steps

    def _tails(self, requests: StepRequests, short: np.ndarray) -> list[GPUSteps]:
        """The last queries of chunks, as one entry of the list if there are any."""
        chosen = ((requests.num_steps > 0) & ~short).nonzero()[0]
        if not len(chosen):
            return []
        counts, ends = requests.num_steps[chosen], requests.starts[chosen + 1]
        query = np.arange(GRANULARITY)
        first = (ends - counts)[:, None]
        steps = query < counts[:, None]
        positions = np.where(steps, (requests.seq_lens[chosen] - counts)[:, None] + query, self.spec.capacity)
        owners, firsts, lens, tokens, positions = self._upload(
            chosen, ends - counts, counts, np.where(steps, first + query, -1).ravel(), positions.ravel()
        )
        shape = (-1, GRANULARITY)
        return [GPUSteps(owners, firsts, lens, tokens.view(shape), positions.view(shape).long())]

    def _table_width(self, max_queries: int) -> int:
        spec = self.spec
        width = compact_width(spec.window, spec.sinks, spec.block_size, max_queries) + TILE_BLOCKS
        return round_up(width, 16)  # Triton compiles kernels anew for strides that are not a multiple of 16

    def _spans_in_place(self, common: CommonAttentionMetadata) -> AttentionSpans:
        """Sinks and window of a batch in which every request has few tokens, in buffers that stay in place."""
        requests = len(common.seq_lens)
        return self._compact(
            common,
            None,
            common.query_start_loc,
            common.seq_lens,
            table=self.step_table[:requests],
            lens=self.step_lens[:requests],
            max_query_len=common.max_query_len,
        )

    def _spans(self, common: CommonAttentionMetadata, requests: StepRequests, short: np.ndarray) -> AttentionSpans:
        """Sinks and window of any batch. A request with few new tokens is one span."""
        seq_lens = np.where(short, requests.query_lens, requests.seq_lens)
        cut = StepRequests(requests.starts, seq_lens, requests.settling)
        owners, span_starts, span_lens = cut_into_spans(cut, *self.span_limits)
        # How far a span's end is from its request's: by that the device knows where it ends.
        behind = seq_lens[owners] - span_lens
        on_device = self._upload(owners, span_starts, behind)
        return self._compact(
            common,
            on_device[0],
            on_device[1],
            common.seq_lens[on_device[0]] - on_device[2],
            table=common.block_table_tensor.new_zeros((len(owners), self._table_width(self.max_span_len))),
            lens=torch.empty_like(on_device[2]),
            max_query_len=int(np.diff(span_starts).max()),
        )

    def _compact(
        self,
        common: CommonAttentionMetadata,
        owners: torch.Tensor | None,
        query_start_loc: torch.Tensor,
        seq_lens: torch.Tensor,
        *,
        table: torch.Tensor,
        lens: torch.Tensor,
        max_query_len: int,
    ) -> AttentionSpans:
        """Sinks and window of ``R`` spans, by ``table [R, width]`` and ``lens [R]``, which are written."""
        spec = self.spec
        compact_block_table(
            common.block_table_tensor,
            owners,
            query_start_loc,
            seq_lens,
            spec.window,
            spec.sinks,
            spec.block_size,
            spec.rearrangeable,
            table,
            lens,
        )
        return AttentionSpans(
            query_start_loc,
            lens,
            table,
            max_query_len,
            max_len=(table.shape[1] - TILE_BLOCKS) * spec.block_size,
            sliding_window=spec.capacity if spec.rearrangeable else spec.window,
            sinks=None if self.sinks is None else self.sinks[: len(lens)],
        )

    def _upload(self, *arrays: np.ndarray) -> tuple[torch.Tensor, ...]:
        """New int32 tensors on the device, by one copy that the host does not wait for."""
        # Each begins at a multiple of 16 bytes: Triton compiles kernels anew for other addresses.
        padded = [np.pad(array, (0, -len(array) % 4)) for array in arrays]
        pieces = async_tensor_h2d(np.concatenate(padded).astype(np.int32), device=self.device).split(
            [len(array) for array in padded]
        )
        return tuple(piece[: len(array)] for piece, array in zip(pieces, arrays, strict=True))
