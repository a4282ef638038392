"""What a step's batch asks of AHN layers on a CPU, worked out once for all layers."""

from dataclasses import dataclass

import numpy as np
import torch
from vllm.v1.attention.backend import CommonAttentionMetadata

from vllm_ahn.attention.paged import PagedAttention
from vllm_ahn.attention.paged.cpu import MASKED_QUERIES
from vllm_ahn.attention.plan import AttentionSpans, StepRequests, cut_into_spans
from vllm_ahn.attention.window import compact_tables, span_limits
from vllm_ahn.cache.specs import AHNWindowSpec
from vllm_ahn.kernels.prefill_plan import Stretch
from vllm_ahn.kernels.settled import Settling
from vllm_ahn.kernels.steps import Steps

PADDED_READS = 64
"""Stretches are absorbed together if the longest has at most so many reads more than the shortest, and a quarter."""


@dataclass
class Pass:
    """Stretches that are absorbed together, many tokens at a time; those that are none are at the end of each."""

    stretches: list[Stretch]
    """``R`` of them, of similar length."""
    requests: torch.Tensor
    """``[R]`` int64, their rows in the block tables."""
    sources: torch.Tensor
    targets: torch.Tensor
    """``[R]`` int64 each, the boundaries whose states are read and written."""
    fresh: torch.Tensor
    """``[R]`` bool: no token was absorbed before, and the pages of the state hold nothing yet."""
    absorbed: torch.Tensor
    """``[R, T]`` int64, positions of the absorbed tokens."""
    valid: torch.Tensor
    """``[R, T]`` bool."""
    rows: torch.Tensor | slice
    """``[N]`` int64, the place in ``[R * T]`` of the absorbed token after which a query reads. A slice where one will
    do, since that copies nothing."""
    tokens: torch.Tensor | slice
    """``[N]`` int64, where in the batch the queries are; likewise."""
    positions: torch.Tensor
    """``[N]`` int64, their positions in their requests."""

    @classmethod
    def of(cls, stretches: list[Stretch], settling: Settling) -> "Pass":
        """Lay stretches out."""

        def field(name: str) -> torch.Tensor:
            return torch.tensor([getattr(stretch, name) for stretch in stretches])

        sources, targets = field("source"), field("target")
        first, reads, first_position = settling.absorbed(sources), field("num_reads"), field("first_position")
        lengths = targets - settling.window - first
        places = torch.arange(int(lengths.max()))
        owners = torch.arange(len(stretches)).repeat_interleave(reads)
        index = torch.arange(len(owners)) - (reads.cumsum(0) - reads)[owners]
        rows = owners * len(places) + (lengths - reads)[owners] + index
        tokens = field("first_token")[owners] + index
        return cls(
            stretches,
            requests=field("request"),
            sources=sources,
            targets=targets,
            fresh=first == settling.sinks,
            absorbed=first.unsqueeze(-1) + places,
            valid=places < lengths.unsqueeze(-1),
            rows=_as_slice(rows) if len(stretches) == 1 else rows,
            tokens=_as_slice(tokens) if len(stretches) == 1 else tokens,
            positions=first_position[owners] + index,
        )


@dataclass
class CPUPlan:
    """One step's work."""

    spec: AHNWindowSpec
    num_tokens: int
    block_table: torch.Tensor
    """``[num_requests, width]`` int32, the window group's."""
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
    passes: list[Pass]
    """What chunks absorb, one after another."""
    steps: Steps | None
    """The queries that step after that; None if there are none."""


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
            block_table=common.block_table_tensor,
            slot_mapping=slot_mapping,
            blocks=blocks,
            offsets=offsets,
            new_blocks=self._partly_new_blocks(blocks, offsets),
            attention=self.attention,
            causal=causal,
            windowed=windowed,
            passes=[
                Pass.of(similar, spec.settling)
                for stretches in requests.passes
                for similar in _of_similar_length(stretches)
            ],
            steps=_steps(requests),
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
        single = requests.query_lens == 1
        for some in (requests.beyond_window & single, requests.beyond_window & ~single):
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


def _steps(requests: StepRequests) -> Steps | None:
    """The last queries of each request, as many as step."""
    stepping = requests.num_steps.nonzero()[0]
    if not len(stepping):
        return None
    lens = torch.from_numpy(requests.num_steps[stepping]).long()
    return Steps(
        requests=torch.from_numpy(stepping),
        first_tokens=torch.from_numpy(requests.starts[stepping + 1]).long() - lens,
        lens=lens,
        computed=torch.from_numpy(requests.seq_lens[stepping]).long() - lens,
    )


def _as_slice(consecutive: torch.Tensor) -> slice:
    return slice(int(consecutive[0]), int(consecutive[-1]) + 1)


def _of_similar_length(stretches: list[Stretch]) -> list[list[Stretch]]:
    """Cut what is absorbed together such that it is not mostly padding."""
    groups: list[list[Stretch]] = []
    for stretch in sorted(stretches, key=lambda stretch: stretch.num_reads):
        if not groups or stretch.num_reads > PADDED_READS + groups[-1][0].num_reads * 5 // 4:
            groups.append([])
        groups[-1].append(stretch)
    return groups


def _select(starts: torch.Tensor, ends: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """``query_start_loc [n + 1]`` int32 and the tokens, int64, of consecutive ranges ``[n]`` of a batch."""
    lens = ends - starts
    query_start_loc = torch.nn.functional.pad(lens.cumsum(0), (1, 0))
    tokens = torch.arange(int(lens.sum())) + (starts - query_start_loc[:-1]).repeat_interleave(lens)
    return query_start_loc.int(), tokens
