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
from vllm.utils.math_utils import round_up
from vllm.utils.torch_utils import async_tensor_h2d
from vllm.v1.attention.backend import AttentionCGSupport, AttentionMetadataBuilder, CommonAttentionMetadata
from vllm.v1.kv_cache_interface import AttentionSpec

from vllm_ahn.attention.gpu.backend import choose_attention
from vllm_ahn.attention.gpu.rows import AttentionRows, PagedAttention, cut_into_rows
from vllm_ahn.cache.specs import AHNWindowSpec
from vllm_ahn.kernels.decode import decode_reads
from vllm_ahn.kernels.prefill_plan import PrefillPlan, Stretch, plan_prefill
from vllm_ahn.kernels.tables import TILE_BLOCKS, compact_block_table, compact_width

QUERIES_PER_ROW = 1024
"""Queries that share a compacted table under a mask for sinks. vLLM's kernel then visits all keys of a row for each of
its queries, those after the query and those that have left its window included; a chunk cut into rows makes few such
visits. With a sliding window over a rearranged table it makes none, and rows are as long as the window allows."""


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
    """Plain causal attention of all requests: right if none is past ``W + S``, and for layers of full attention."""
    windowed: AttentionRows | None
    """Sinks and window of all requests; None if no request is past ``W + S``."""
    attention: PagedAttention
    decode_rows: torch.Tensor | None
    """``[num_requests]`` int32, rows of requests past ``W + S`` with a single new token, -1 for others; None if there
    are none."""
    prefill: PrefillPlan | None
    """What requests with several new tokens absorb, the last of which is past ``W + S``; None if there are none."""


class AHNGpuMetadataPlanner:
    """Turns vLLM's batch into :class:`AHNGpuMetadata`.

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
        size = spec.block_size
        # Rearranged rows are counted from the start of a block, and short enough for a window that is.
        self.row_cuts = (spec.window // size * size, size) if spec.rearrangeable else (QUERIES_PER_ROW, 1)
        self.max_row_len = min(self.row_cuts[0], max_tokens)
        on_device = {"dtype": torch.int32, "device": device}
        # What decodes use stays in place for CUDA graphs, which are of decodes only.
        self.decode_table = torch.zeros((max_requests, self._table_width(1)), **on_device)
        self.decode_lens = torch.zeros(max_requests, **on_device)
        self.decode_rows = torch.full((max_requests,), -1, **on_device)
        self.sinks: torch.Tensor | None = None
        if not spec.rearrangeable:
            self.sinks = torch.full((max_requests + max_tokens // QUERIES_PER_ROW,), spec.sinks, **on_device)

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
            windowed = self._windowed(
                common,
                None,
                common.query_start_loc,
                common.seq_lens,
                table=self.decode_table[: len(query_lens)],
                lens=self.decode_lens[: len(query_lens)],
                max_query_len=1,
            )
            decode_rows = self._decode_rows(common)
        elif past.any():
            requests, row_starts, row_lens = cut_into_rows(starts, seq_lens, *self.row_cuts)
            on_device = self._upload(requests, row_starts, row_lens)
            windowed = self._windowed(
                common,
                *on_device,
                table=common.block_table_tensor.new_zeros((len(requests), self._table_width(self.max_row_len))),
                lens=torch.empty_like(on_device[2]),
                max_query_len=int(np.diff(row_starts).max()),
            )
            decode_rows = self._decode_rows(common) if has_decodes else None
        self.attention.schedule(windowed or causal)
        return AHNGpuMetadata(
            num_tokens=common.num_actual_tokens,
            query_start_loc=common.query_start_loc,
            seq_lens=common.seq_lens,
            block_table=common.block_table_tensor,
            slot_mapping=common.slot_mapping[: common.num_actual_tokens],
            causal=causal,
            windowed=windowed if for_capture or past.any() else None,
            attention=self.attention,
            decode_rows=decode_rows if has_decodes else None,
            prefill=self._prefill_plan(common, starts, seq_lens, chunks) if chunks.any() else None,
        )

    def _decode_rows(self, common: CommonAttentionMetadata) -> torch.Tensor:
        rows = self.decode_rows[: len(common.seq_lens)]
        decode_reads(common.query_start_loc, common.seq_lens, self.spec.capacity, rows)
        return rows

    def _table_width(self, max_queries: int) -> int:
        spec = self.spec
        width = compact_width(spec.window, spec.sinks, spec.block_size, max_queries) + TILE_BLOCKS
        return round_up(width, 16)  # Triton compiles kernels anew for strides that are not a multiple of 16

    def _windowed(
        self,
        common: CommonAttentionMetadata,
        requests: torch.Tensor | None,
        query_start_loc: torch.Tensor,
        seq_lens: torch.Tensor,
        *,
        table: torch.Tensor,
        lens: torch.Tensor,
        max_query_len: int,
    ) -> AttentionRows:
        """Sinks and window of ``R`` rows, by ``table [R, width]`` and ``lens [R]``, which are written."""
        spec = self.spec
        compact_block_table(
            common.block_table_tensor,
            requests,
            query_start_loc,
            seq_lens,
            spec.window,
            spec.sinks,
            spec.block_size,
            spec.rearrangeable,
            table,
            lens,
        )
        return AttentionRows(
            query_start_loc,
            lens,
            table,
            max_query_len,
            max_len=(table.shape[1] - TILE_BLOCKS) * spec.block_size,
            window=spec.capacity if spec.rearrangeable else spec.window,
            sinks=None if self.sinks is None else self.sinks[: len(lens)],
        )

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
            choose_attention(kv_cache_spec, vllm_config, device),
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
