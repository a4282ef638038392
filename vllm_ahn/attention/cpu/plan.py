"""What a step's batch asks of AHN layers on a CPU, worked out once for all layers."""

from dataclasses import dataclass, field

import numpy as np
import torch
from vllm.v1.attention.backend import CommonAttentionMetadata

from vllm_ahn.attention.paged import PagedAttention
from vllm_ahn.attention.paged.cpu import MASKED_QUERIES
from vllm_ahn.attention.plan import AttentionSpans, StepRequests, cut_into_spans
from vllm_ahn.attention.window import compact_tables, span_limits
from vllm_ahn.cache.specs import AHNWindowSpec
from vllm_ahn.kernels.prefill_plan import Stretch


@dataclass
class Decodes:
    """One new token each of ``R`` requests, all beyond ``W + S``: each absorbs one token and reads."""

    tokens: torch.Tensor
    """``[R]`` int64, where in the batch they are."""
    requests: torch.Tensor
    """``[R]`` int64, their rows in the block tables."""
    positions: torch.Tensor
    """``[R]`` int64, ``t``."""
    fresh: torch.Tensor
    """``[R]`` bool: ``t = W + S``, the state is zero and its pages hold nothing yet."""
    evicted_blocks: torch.Tensor
    evicted_offsets: torch.Tensor
    """``[R]`` int64 each: where token ``t - W`` lies."""


@dataclass
class Chunk:
    """Several new tokens of one request, the last of them beyond ``W + S``."""

    stretch: Stretch
    """What it absorbs, and the tokens that read after it."""
    fresh: bool
    """No token was absorbed before this step: the state is zero and its pages hold nothing yet."""
    evicted_blocks: torch.Tensor
    """``[num_blocks]`` int64, the blocks of the absorbed tokens."""
    evicted_offset: int
    """Offset of the first of them in the first block."""

    @property
    def tokens(self) -> slice:
        """The reading tokens in the batch."""
        return slice(self.stretch.first_token, self.stretch.first_token + self.stretch.length)

    def positions(self) -> torch.Tensor:
        """``[length]`` int64, positions of the reading tokens."""
        return self.stretch.first_position + torch.arange(self.stretch.length)


@dataclass
class CPUPlan:
    """One step's work."""

    spec: AHNWindowSpec
    num_tokens: int
    slot_mapping: torch.Tensor
    """``[num_tokens]`` int64, where the new tokens' keys, values and gates go."""
    blocks: torch.Tensor
    offsets: torch.Tensor
    """``[num_tokens]`` int64 each: the same, as blocks and offsets in them."""
    new_blocks: torch.Tensor | None
    """``[n]`` int64, window blocks that this step begins and does not fill; None if there are none."""
    attention: PagedAttention
    causal: AttentionSpans | None
    """Plain causal attention of all requests, where a layer wants it."""
    windowed: list[AttentionSpans]
    """Sinks and window of all requests."""
    decodes: Decodes | None = None
    chunks: list[Chunk] = field(default_factory=list)


class CPUPlanner:
    """Turns vLLM's batch into a :class:`CPUPlan`.

    Args:
        spec: the window group's spec.
        attention: the kernel that attends.
    """

    def __init__(self, spec: AHNWindowSpec, attention: PagedAttention) -> None:
        self.spec = spec
        self.attention = attention

    def plan(self, common: CommonAttentionMetadata, for_capture: bool = False) -> CPUPlan:
        """Plan a step; ``common`` is the window group's, its tensors live on the CPU."""
        assert not for_capture
        spec = self.spec
        requests = StepRequests(common.query_start_loc_cpu.numpy(), common.seq_lens.numpy(), spec.settling)
        slot_mapping = common.slot_mapping[: common.num_actual_tokens]
        blocks, offsets = slot_mapping // spec.block_size, slot_mapping % spec.block_size
        any_beyond = bool(requests.beyond_window.any())
        causal, windowed = None, []
        if spec.retain_all or not any_beyond:
            causal = self._causal(common, None)
            windowed = [causal]
        if any_beyond:
            windowed = self._windowed(common, requests)
        return CPUPlan(
            spec=spec,
            num_tokens=common.num_actual_tokens,
            slot_mapping=slot_mapping,
            blocks=blocks,
            offsets=offsets,
            new_blocks=self._partly_new_blocks(blocks, offsets),
            attention=self.attention,
            causal=causal,
            windowed=windowed,
            decodes=self._decodes(common, requests) if requests.decodes.any() else None,
            chunks=[self._chunk(common, stretch) for stretch in requests.stretches()],
        )

    def _partly_new_blocks(self, blocks: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor | None:
        begun, filled = blocks[offsets == 0], blocks[offsets == self.spec.block_size - 1]
        if len(begun) and len(filled):
            begun = begun[torch.isin(begun, filled, invert=True)]
        return begun if len(begun) else None

    def _causal(self, common: CommonAttentionMetadata, chosen: np.ndarray | None) -> AttentionSpans:
        """Plain causal attention of the requests ``chosen [n]``, or of all."""
        spans = AttentionSpans(
            common.query_start_loc,
            common.seq_lens,
            common.block_table_tensor,
            common.max_query_len,
            common.max_seq_len,
        )
        if chosen is not None:
            owners = torch.from_numpy(chosen)
            starts = common.query_start_loc_cpu.long()
            spans.query_start_loc, spans.tokens = _select(starts[owners], starts[owners + 1])
            spans.lens, spans.block_table = spans.lens[owners], spans.block_table[owners]
        self.attention.schedule(spans)
        return spans

    def _windowed(self, common: CommonAttentionMetadata, requests: StepRequests) -> list[AttentionSpans]:
        """Sinks and window of all requests, some of which are beyond ``W + S``."""
        if self.spec.rearrangeable:
            return [self._compact(common, requests, None)]
        # Keys are gathered under a mask, which is slower: only for those that need it, and decodes as one batch.
        within = ((requests.query_lens > 0) & ~requests.beyond_window).nonzero()[0]
        groups = [self._causal(common, within)] if len(within) else []
        for some in (requests.decodes, requests.chunks):
            if some.any():
                groups.append(self._compact(common, requests, some))
        return groups

    def _compact(
        self, common: CommonAttentionMetadata, requests: StepRequests, some: np.ndarray | None
    ) -> AttentionSpans:
        """Spans over compacted tables, of all requests or of ``some [num_requests]`` bool."""
        spec = self.spec
        owners, bounds, lens = cut_into_spans(requests, *span_limits(spec, MASKED_QUERIES))
        starts, ends = torch.from_numpy(bounds[:-1]).long(), torch.from_numpy(bounds[1:]).long()
        chosen = torch.from_numpy(owners), torch.from_numpy(lens).long()
        tokens, query_start_loc = None, torch.from_numpy(bounds).int()
        if some is not None:
            keep = torch.from_numpy(some[owners])
            starts, ends, chosen = starts[keep], ends[keep], tuple(part[keep] for part in chosen)
            query_start_loc, tokens = _select(starts, ends)
        span_owners, span_ends = chosen
        query_lens = ends - starts
        tables, compact_lens = compact_tables(
            spec, common.block_table_tensor[span_owners], span_ends - query_lens, span_ends
        )
        spans = AttentionSpans(
            query_start_loc,
            compact_lens,
            tables,
            max_query_len=int(query_lens.max()),
            max_len=int(compact_lens.max()),
            sliding_window=spec.capacity if spec.rearrangeable else spec.window,
            sinks=None if spec.rearrangeable else torch.full_like(compact_lens, spec.sinks),
            tokens=tokens,
        )
        self.attention.schedule(spans)
        return spans

    def _decodes(self, common: CommonAttentionMetadata, requests: StepRequests) -> Decodes:
        spec = self.spec
        owners = torch.from_numpy(requests.decodes.nonzero()[0])
        positions = common.seq_lens[owners].long() - 1
        evicted = positions - spec.window
        tables = common.block_table_tensor[owners].long()
        return Decodes(
            tokens=common.query_start_loc_cpu[owners].long(),
            requests=owners,
            positions=positions,
            fresh=positions == spec.capacity,
            evicted_blocks=tables.gather(1, (evicted // spec.block_size).unsqueeze(-1)).squeeze(-1),
            evicted_offsets=evicted % spec.block_size,
        )

    def _chunk(self, common: CommonAttentionMetadata, stretch: Stretch) -> Chunk:
        spec = self.spec
        first = stretch.first_position - spec.window
        blocks = slice(first // spec.block_size, (first + stretch.length - 1) // spec.block_size + 1)
        return Chunk(
            stretch,
            fresh=stretch.first_position == spec.capacity,
            evicted_blocks=common.block_table_tensor[stretch.request, blocks].long(),
            evicted_offset=first % spec.block_size,
        )


def _select(starts: torch.Tensor, ends: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """``query_start_loc [n + 1]`` int32 and the tokens, int64, of consecutive ranges ``[n]`` of a batch."""
    lens = ends - starts
    query_start_loc = torch.nn.functional.pad(lens.cumsum(0), (1, 0))
    tokens = torch.arange(int(lens.sum())) + (starts - query_start_loc[:-1]).repeat_interleave(lens)
    return query_start_loc.int(), tokens
