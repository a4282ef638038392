"""What a step's batch asks of an AHN layer on a GPU, worked out once for all layers.

Nothing here waits for the device. Which requests decode and which bring chunks, and how long they are, is read from the
host copies that vLLM keeps; as speculation is refused, these are exact. A step in which every request has one token
takes all it needs from tensors that stay in place, so that a CUDA graph may replay it: what is computed here goes to
buffers of the planner, the rest are vLLM's own.

Everything is decided by position. What a block table holds below the window, or behind a request's end, is other
requests' business.
"""

from dataclasses import dataclass

import numpy as np
import torch
from vllm.config import VllmConfig
from vllm.utils.math_utils import next_power_of_2
from vllm.utils.torch_utils import async_tensor_h2d
from vllm.v1.attention.backend import AttentionCGSupport, AttentionMetadataBuilder, CommonAttentionMetadata
from vllm.v1.kv_cache_interface import AttentionSpec

from vllm_ahn.cache.specs import AHNWindowSpec
from vllm_ahn.kernels.compaction import TILE_BLOCKS, compact_block_table, compact_width
from vllm_ahn.kernels.decode_memory import decode_rows
from vllm_ahn.kernels.prefill_plan import PrefillPlan, Stretch, plan_prefill
from vllm_ahn.plugin.compat import can_split_attention

QUERIES_PER_ROW = 1024
"""Queries that share a compacted table. vLLM's kernel visits all keys of a row for each of its queries, those after the
query and those that have left its window included; a chunk cut into rows makes few such visits."""

SEGMENTS = 16
"""Parts of a sequence that a decode works on at the same time."""

MIN_PROGRAMS = 128
"""Decodes with fewer (sequence, KV head) pairs than this are split into segments to occupy the device."""


@dataclass
class AttentionRows:
    """Queries for vLLM's paged attention, and the keys they may see."""

    query_start_loc: torch.Tensor
    """``[R + 1]`` int32."""
    lens: torch.Tensor
    """``[R]`` int32, tokens in the row's table."""
    block_table: torch.Tensor
    """``[R, width]`` int32."""
    max_query_len: int
    max_len: int
    """Upper bounds, known to the host."""
    window: int | None
    """``W``; None for plain causal attention over whole sequences."""
    sinks: torch.Tensor | None
    """``[R]`` int32, ``S`` in every row; None if there are no sinks beside the window."""


@dataclass
class Segments:
    """Where the attention kernel leaves parts of a decode before it adds them up."""

    max_rows: int
    """Most rows for which it does so."""
    output: torch.Tensor
    """``[max_rows, num_heads, SEGMENTS, head size, rounded up to a power of 2]`` float32."""
    max: torch.Tensor
    sum: torch.Tensor
    """``[max_rows, num_heads, SEGMENTS]`` float32 each."""


@dataclass
class AHNGpuMetadata:
    """One step's work, the same for all layers."""

    num_tokens: int
    """Tokens in the batch, those included that pad it for a CUDA graph."""
    query_start_loc: torch.Tensor
    """``[num_requests + 1]`` int32. Requests that pad the batch have no tokens."""
    seq_lens: torch.Tensor
    """``[num_requests]`` int32, with the step's tokens."""
    block_table: torch.Tensor
    """``[num_requests, width]`` int32, the window group's."""
    slot_mapping: torch.Tensor
    """``[num_tokens]`` int64, where the new tokens' keys, values and gates go; -1 for tokens that pad the batch."""
    causal: AttentionRows
    """Plain causal attention of all requests: right if none is past ``W + S``, and for layers without memory."""
    windowed: AttentionRows | None
    """Sinks and window of all requests; None if no request is past ``W + S``."""
    segments: Segments
    decode_rows: torch.Tensor | None
    """``[num_requests]`` int32, rows of requests past ``W + S`` with a single new token, -1 for others; None if there
    are none."""
    prefill: PrefillPlan | None
    """What requests with several new tokens absorb, the last of which is past ``W + S``; None if there are none."""


class AHNGpuMetadataPlanner:
    """Turns vLLM's batch into :class:`AHNGpuMetadata`.

    Args:
        spec: the window group's spec.
        num_heads: query heads of a layer on this rank.
        max_requests: most requests in a batch, padding included.
        max_tokens: most tokens in a batch.
        device: where the step runs.
    """

    def __init__(
        self, spec: AHNWindowSpec, *, num_heads: int, max_requests: int, max_tokens: int, device: torch.device
    ) -> None:
        self.spec = spec
        self.device = device
        max_rows = max_requests + max_tokens // QUERIES_PER_ROW
        width = compact_width(spec.window, spec.sinks, spec.block_size, min(QUERIES_PER_ROW, max_tokens))
        on_device = {"dtype": torch.int32, "device": device}
        self.compact_table = torch.zeros((max_rows, width + TILE_BLOCKS), **on_device)
        self.compact_lens = torch.zeros(max_rows, **on_device)
        self.sinks = torch.full((max_rows,), spec.sinks, **on_device)
        self.decode_rows = torch.full((max_requests,), -1, **on_device)
        max_split = MIN_PROGRAMS // spec.num_kv_heads if can_split_attention(spec.block_size) else 0
        scores = (max_split, num_heads, SEGMENTS)
        self.segments = Segments(
            max_split,
            torch.empty((*scores, next_power_of_2(spec.head_size)), device=device),
            torch.empty(scores, device=device),
            torch.empty(scores, device=device),
        )

    def plan(self, common: CommonAttentionMetadata, for_capture: bool = False) -> AHNGpuMetadata:
        """Plan a step.

        Args:
            common: the window group's batch.
            for_capture: a CUDA graph of the step will be replayed for other batches of as many requests with one new
                token each, so that it has to do all that any of them needs.
        """
        starts = common.query_start_loc_cpu.numpy()
        query_lens = np.diff(starts)
        assert common.seq_lens_cpu_upper_bound is not None
        seq_lens = common.seq_lens_cpu_upper_bound.numpy()[: len(query_lens)]
        past = (seq_lens > self.spec.capacity) & (query_lens > 0)
        chunks = past & (query_lens > 1)
        causal = AttentionRows(
            common.query_start_loc,
            common.seq_lens,
            common.block_table_tensor,
            common.max_query_len,
            common.max_seq_len,
            window=None,
            sinks=None,
        )
        has_decodes = for_capture or bool((past & ~chunks).any())
        windowed, decode_rows = None, None
        if common.max_query_len <= 1:
            # Even if no request is past W + S, since a CUDA graph may be about to read the buffers.
            windowed = self._windowed(common, None, common.query_start_loc, common.seq_lens, max_query_len=1)
            decode_rows = self._decode_rows(common)
        elif past.any():
            requests, row_starts, row_lens = cut_into_rows(starts, seq_lens, QUERIES_PER_ROW)
            on_device = self._upload(requests, row_starts, row_lens)
            windowed = self._windowed(common, *on_device, max_query_len=int(np.diff(row_starts).max()))
            decode_rows = self._decode_rows(common) if has_decodes else None
        return AHNGpuMetadata(
            num_tokens=common.num_actual_tokens,
            query_start_loc=common.query_start_loc,
            seq_lens=common.seq_lens,
            block_table=common.block_table_tensor,
            slot_mapping=common.slot_mapping[: common.num_actual_tokens],
            causal=causal,
            windowed=windowed if for_capture or past.any() else None,
            segments=self.segments,
            decode_rows=decode_rows if has_decodes else None,
            prefill=self._prefill_plan(common, starts, seq_lens, chunks) if chunks.any() else None,
        )

    def _decode_rows(self, common: CommonAttentionMetadata) -> torch.Tensor:
        rows = self.decode_rows[: len(common.seq_lens)]
        decode_rows(common.query_start_loc, common.seq_lens, self.spec.capacity, rows)
        return rows

    def _windowed(
        self,
        common: CommonAttentionMetadata,
        requests: torch.Tensor | None,
        query_start_loc: torch.Tensor,
        seq_lens: torch.Tensor,
        *,
        max_query_len: int,
    ) -> AttentionRows:
        spec = self.spec
        num_rows = len(seq_lens)
        table, lens = self.compact_table[:num_rows], self.compact_lens[:num_rows]
        compact_block_table(
            common.block_table_tensor,
            requests,
            query_start_loc,
            seq_lens,
            spec.window,
            spec.sinks,
            spec.block_size,
            table,
            lens,
        )
        max_len = (table.shape[1] - TILE_BLOCKS) * spec.block_size
        sinks = self.sinks[:num_rows] if spec.sinks else None
        return AttentionRows(query_start_loc, lens, table, max_query_len, max_len, spec.window, sinks)

    def _prefill_plan(
        self, common: CommonAttentionMetadata, starts: np.ndarray, seq_lens: np.ndarray, chunks: np.ndarray
    ) -> PrefillPlan:
        stretches = []
        for request in chunks.nonzero()[0].tolist():
            end, seq_len = int(starts[request + 1]), int(seq_lens[request])
            first_position = max(seq_len - (end - int(starts[request])), self.spec.capacity)
            num_reads = seq_len - first_position
            stretches.append(Stretch(request, end - num_reads, first_position, num_reads))
        return plan_prefill(
            stretches,
            common.block_table_tensor,
            window=self.spec.window,
            sinks=self.spec.sinks,
            block_size=self.spec.block_size,
        )

    def _upload(self, *arrays: np.ndarray) -> tuple[torch.Tensor, ...]:
        """New int32 tensors on the device, by one copy that the host does not wait for."""
        # Each begins at a multiple of 16 bytes: Triton compiles kernels anew for other addresses.
        padded = [np.pad(array, (0, -len(array) % 4)) for array in arrays]
        pieces = async_tensor_h2d(np.concatenate(padded).astype(np.int32), device=self.device).split(
            [len(array) for array in padded]
        )
        return tuple(piece[: len(array)] for piece, array in zip(pieces, arrays, strict=True))


class AHNGpuMetadataBuilder(AttentionMetadataBuilder[AHNGpuMetadata]):
    """Builds :class:`AHNGpuMetadata` once a step, for all layers of the window group."""

    _cudagraph_support = AttentionCGSupport.UNIFORM_SINGLE_TOKEN_DECODE

    def __init__(
        self, kv_cache_spec: AttentionSpec, layer_names: list[str], vllm_config: VllmConfig, device: torch.device
    ) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        assert isinstance(kv_cache_spec, AHNWindowSpec)
        self.planner = AHNGpuMetadataPlanner(
            kv_cache_spec,
            num_heads=vllm_config.model_config.get_num_attention_heads(vllm_config.parallel_config),
            max_requests=vllm_config.scheduler_config.max_num_seqs,
            max_tokens=vllm_config.scheduler_config.max_num_batched_tokens,
            device=device,
        )

    def build(
        self, common_prefix_len: int, common_attn_metadata: CommonAttentionMetadata, fast_build: bool = False
    ) -> AHNGpuMetadata:
        return self.planner.plan(common_attn_metadata)

    def build_for_cudagraph_capture(self, common_attn_metadata: CommonAttentionMetadata) -> AHNGpuMetadata:
        return self.planner.plan(common_attn_metadata, for_capture=True)


def cut_into_rows(
    starts: np.ndarray, seq_lens: np.ndarray, queries_per_row: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Cut the requests of a batch into rows of at most ``queries_per_row`` queries.

    Args:
        starts: ``[num_requests + 1]``, where the requests' new tokens begin in the batch.
        seq_lens: ``[num_requests]``, their tokens, with the new ones.
        queries_per_row: at least 1.

    Returns:
        ``requests [R]``, the request of each row; ``row_starts [R + 1]``, where the rows begin in the batch; and
        ``row_lens [R]``, tokens of the request up to and with the row's last query. Requests without new tokens have
        no row.
    """
    query_lens = np.diff(starts)
    num_rows = -(-query_lens // queries_per_row)
    requests = np.arange(len(query_lens)).repeat(num_rows)
    index_in_request = np.arange(len(requests)) - (num_rows.cumsum() - num_rows).repeat(num_rows)
    row_starts = starts[:-1][requests] + index_in_request * queries_per_row
    row_ends = np.minimum(row_starts + queries_per_row, starts[1:][requests])
    row_lens = seq_lens[requests] - (starts[1:][requests] - row_ends)
    return requests, np.concatenate((row_starts, starts[-1:])), row_lens
