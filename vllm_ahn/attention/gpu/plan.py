"""What a step's batch asks of AHN layers on a GPU, worked out once for all layers.

Nothing here waits for the device. Which requests decode and which bring chunks, and how long they are, is read from the
host copies that vLLM keeps; as speculation is refused, these are exact. A step in which every request has one token
takes all it needs from tensors that stay in place, so that a CUDA graph may replay it: what is computed here goes to
buffers of the planner, the rest are vLLM's own.
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
from vllm_ahn.kernels.decode import decode_reads
from vllm_ahn.kernels.prefill_plan import PrefillPlan, plan_prefill
from vllm_ahn.kernels.tables import TILE_BLOCKS, compact_block_table, compact_width

MASKED_QUERIES = 1024
"""Queries of a span under a mask for sinks. vLLM's kernel then visits all keys of a span for each of its queries, those
after the query and those that have left its window included; a chunk cut into spans makes few such visits. With a
sliding window over a rearranged table it makes none, and spans are as long as the window allows."""


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
    decode_tokens: torch.Tensor | None
    """``[num_requests]`` int32, where in the batch the token of a decode beyond ``W + S`` is, -1 for other requests;
    None if there are none."""
    prefill: PrefillPlan | None
    """What chunks absorb; None if there are none."""


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
        on_device = {"dtype": torch.int32, "device": device}
        # What decodes use stays in place for CUDA graphs, which are of decodes only.
        self.decode_table = torch.zeros((max_requests, self._table_width(1)), **on_device)
        self.decode_lens = torch.zeros(max_requests, **on_device)
        self.decode_tokens = torch.full((max_requests,), -1, **on_device)
        self.sinks: torch.Tensor | None = None
        if not spec.rearrangeable:
            self.sinks = torch.full((max_requests + max_tokens // MASKED_QUERIES,), spec.sinks, **on_device)

    def plan(self, common: CommonAttentionMetadata, for_capture: bool = False) -> GPUPlan:
        """See :meth:`Planner.plan`."""
        starts = common.query_start_loc_cpu.numpy()
        assert common.seq_lens_cpu_upper_bound is not None
        seq_lens = common.seq_lens_cpu_upper_bound.numpy()[: len(starts) - 1]
        requests = StepRequests(starts, seq_lens, self.spec.capacity)
        any_beyond = bool(requests.beyond_window.any())
        causal = AttentionSpans(
            common.query_start_loc,
            common.seq_lens,
            common.block_table_tensor,
            common.max_query_len,
            common.max_seq_len,
        )
        windowed = causal
        has_decodes = for_capture or bool(requests.decodes.any())
        if common.max_query_len <= 1:
            # Even if no request is beyond W + S, since a CUDA graph may be about to read the buffers.
            single = self._single_tokens(common)
            self._find_decodes(common)
            if for_capture or any_beyond:
                windowed = single
            self.attention.schedule(single)
        else:
            if any_beyond:
                windowed = self._spans(common, requests)
            if has_decodes:
                self._find_decodes(common)
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
            decode_tokens=self.decode_tokens[: len(common.seq_lens)] if has_decodes else None,
            prefill=self._prefill_plan(common, requests) if requests.chunks.any() else None,
        )

    def _find_decodes(self, common: CommonAttentionMetadata) -> None:
        tokens = self.decode_tokens[: len(common.seq_lens)]
        decode_reads(common.query_start_loc, common.seq_lens, self.spec.capacity, tokens)

    def _table_width(self, max_queries: int) -> int:
        spec = self.spec
        width = compact_width(spec.window, spec.sinks, spec.block_size, max_queries) + TILE_BLOCKS
        return round_up(width, 16)  # Triton compiles kernels anew for strides that are not a multiple of 16

    def _single_tokens(self, common: CommonAttentionMetadata) -> AttentionSpans:
        """Sinks and window of a batch in which every request has one token, in buffers that stay in place."""
        requests = len(common.seq_lens)
        return self._compact(
            common,
            None,
            common.query_start_loc,
            common.seq_lens,
            table=self.decode_table[:requests],
            lens=self.decode_lens[:requests],
            max_query_len=1,
        )

    def _spans(self, common: CommonAttentionMetadata, requests: StepRequests) -> AttentionSpans:
        """Sinks and window of any batch."""
        owners, span_starts, span_lens = cut_into_spans(requests, *self.span_limits)
        on_device = self._upload(owners, span_starts, span_lens)
        return self._compact(
            common,
            *on_device,
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

    def _prefill_plan(self, common: CommonAttentionMetadata, requests: StepRequests) -> PrefillPlan:
        spec = self.spec
        return plan_prefill(
            requests.stretches(),
            common.block_table_tensor,
            window=spec.window,
            sinks=spec.sinks,
            block_size=spec.block_size,
        )

    def _upload(self, *arrays: np.ndarray) -> tuple[torch.Tensor, ...]:
        """New int32 tensors on the device, by one copy that the host does not wait for."""
        # Each begins at a multiple of 16 bytes: Triton compiles kernels anew for other addresses.
        padded = [np.pad(array, (0, -len(array) % 4)) for array in arrays]
        pieces = async_tensor_h2d(np.concatenate(padded).astype(np.int32), device=self.device).split(
            [len(array) for array in padded]
        )
        return tuple(piece[: len(array)] for piece, array in zip(pieces, arrays, strict=True))
