"""Turns vLLM's batch into the work of an AHN layer, once a step for all layers.

A step gives every request some new tokens. The tokens of requests that still fit ``W + S`` are plain causal attention,
done together by vLLM's own kernel. The others are past the lossless memory, wholly or in part; they fall into

* **decodes**: one new token, past ``W + S``. All of them are handled as one batch.
* **chunks**: several new tokens, the last of which is past ``W + S``.

Everything is decided by position. What a block table holds below the window, or behind a request's end, is other
requests' business.
"""

import torch
from vllm.config import VllmConfig
from vllm.v1.attention.backend import AttentionMetadataBuilder, CommonAttentionMetadata
from vllm.v1.kv_cache_interface import AttentionSpec

from vllm_ahn.attention.cpu import lossless
from vllm_ahn.attention.cpu.batch import AHNMetadata, Chunk, DecodeBatch, PagedBatch
from vllm_ahn.cache.specs import AHNWindowSpec


class AHNPlanner:
    """Plans steps for the layers of a window group.

    Args:
        spec: the group's spec.
        num_heads: query heads of a layer on this rank.
        dtype: dtype of queries, keys and values.
    """

    def __init__(self, spec: AHNWindowSpec, *, num_heads: int, dtype: torch.dtype) -> None:
        self.spec = spec
        self.num_heads = num_heads
        self.dtype = dtype

    def plan(self, common: CommonAttentionMetadata) -> AHNMetadata:
        """Plan a step. ``common`` is the window group's; its tensors live on the CPU."""
        slot_mapping = common.slot_mapping[: common.num_actual_tokens]
        blocks, offsets = slot_mapping // self.spec.block_size, slot_mapping % self.spec.block_size
        past = common.seq_lens > self.spec.capacity
        everything = self._natural(common, None) if self.spec.retain_all else None
        metadata = AHNMetadata(
            num_tokens=common.num_actual_tokens,
            slot_mapping=slot_mapping,
            blocks=blocks,
            offsets=offsets,
            new_blocks=self._partly_new_blocks(blocks, offsets),
            everything=everything,
            inside=None,
        )
        if not past.any():
            metadata.inside = everything or self._natural(common, None)
            return metadata
        if not past.all():
            metadata.inside = self._natural(common, (~past).nonzero().flatten())
        if self.spec.rearrangeable:
            metadata.past = self._rearranged(common, past.nonzero().flatten())
        single = common.query_start_loc_cpu.diff() == 1
        decoding = (past & single).nonzero().flatten()
        if len(decoding):
            metadata.decodes = self._decode_batch(common, decoding)
        metadata.chunks = [self._chunk(common, int(request)) for request in (past & ~single).nonzero()]
        return metadata

    def _partly_new_blocks(self, blocks: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor | None:
        begun, filled = blocks[offsets == 0], blocks[offsets == self.spec.block_size - 1]
        if len(begun) and len(filled):
            begun = begun[torch.isin(begun, filled, invert=True)]
        return begun if len(begun) else None

    def _natural(self, common: CommonAttentionMetadata, requests: torch.Tensor | None) -> PagedBatch:
        """Plain causal attention of the given requests, or of all."""
        if requests is None:
            return self._paged(None, common.query_start_loc, common.seq_lens, common.block_table_tensor, -1)
        starts, lengths = _query_ranges(common, requests)
        seq_lens, tables = common.seq_lens[requests], common.block_table_tensor[requests]
        return self._paged(_rows(starts, lengths), _start_loc(lengths), seq_lens, tables, -1)

    def _rearranged(self, common: CommonAttentionMetadata, requests: torch.Tensor) -> PagedBatch:
        """Attention of requests past ``W + S``: a sliding window over rearranged tables."""
        starts, lengths = _query_ranges(common, requests)
        ends = common.seq_lens[requests].long()
        rows = None if len(requests) == common.num_reqs else _rows(starts, lengths)
        runs = [
            (request, *run)
            for request, start, end in zip(requests.tolist(), (ends - lengths).tolist(), ends.tolist(), strict=True)
            for run in lossless.segments(self.spec, start, end)
        ]
        owners, run_starts, run_ends = torch.tensor(runs).unbind(-1)
        tables, seq_lens = lossless.rearranged_tables(
            self.spec, common.block_table_tensor[owners], run_starts, run_ends
        )
        return self._paged(rows, _start_loc(run_ends - run_starts), seq_lens, tables, self.spec.capacity)

    def _paged(
        self,
        rows: torch.Tensor | None,
        query_start_loc: torch.Tensor,
        seq_lens: torch.Tensor,
        block_table: torch.Tensor,
        sliding_window: int,
    ) -> PagedBatch:
        return lossless.paged_batch(
            self.spec,
            num_heads=self.num_heads,
            dtype=self.dtype,
            rows=rows,
            query_start_loc=query_start_loc,
            seq_lens=seq_lens,
            block_table=block_table,
            sliding_window=sliding_window,
        )

    def _decode_batch(self, common: CommonAttentionMetadata, requests: torch.Tensor) -> DecodeBatch:
        tables = common.block_table_tensor[requests].long()
        positions = common.seq_lens[requests].long() - 1
        evicted = positions - self.spec.window
        return DecodeBatch(
            rows=common.query_start_loc_cpu[requests].long(),
            requests=requests,
            positions=positions,
            first_read=positions == self.spec.capacity,
            evicted_blocks=tables.gather(1, (evicted // self.spec.block_size).unsqueeze(-1)).squeeze(-1),
            evicted_offsets=evicted % self.spec.block_size,
            keys=None if self.spec.rearrangeable else lossless.decode_keys(self.spec, tables, positions),
        )

    def _chunk(self, common: CommonAttentionMetadata, request: int) -> Chunk:
        spec = self.spec
        table = common.block_table_tensor[request].long()
        first_row, last_row = (int(row) for row in common.query_start_loc_cpu[request : request + 2])
        end = int(common.seq_lens[request])
        start = end - (last_row - first_row)
        first_read = max(start, spec.capacity)
        evicted = first_read - spec.window
        last_evicted = end - 1 - spec.window
        return Chunk(
            request=request,
            first_row=first_row + first_read - start,
            last_row=last_row,
            first_position=first_read,
            first_read=first_read == spec.capacity,
            evicted_blocks=table[evicted // spec.block_size : last_evicted // spec.block_size + 1],
            evicted_offset=evicted % spec.block_size,
            keys=[] if self.spec.rearrangeable else lossless.chunk_keys(spec, table, first_row, start, end),
        )


class AHNMetadataBuilder(AttentionMetadataBuilder[AHNMetadata]):
    """Builds :class:`AHNMetadata` once a step, for all layers of the window group."""

    def __init__(
        self, kv_cache_spec: AttentionSpec, layer_names: list[str], vllm_config: VllmConfig, device: torch.device
    ) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        assert isinstance(kv_cache_spec, AHNWindowSpec)
        self.planner = AHNPlanner(
            kv_cache_spec,
            num_heads=vllm_config.model_config.get_num_attention_heads(vllm_config.parallel_config),
            dtype=vllm_config.model_config.dtype,
        )

    def build(
        self, common_prefix_len: int, common_attn_metadata: CommonAttentionMetadata, fast_build: bool = False
    ) -> AHNMetadata:
        return self.planner.plan(common_attn_metadata)


def _query_ranges(common: CommonAttentionMetadata, requests: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """First rows and numbers of rows of requests, ``[n]`` int64 each."""
    starts = common.query_start_loc_cpu[requests].long()
    return starts, common.query_start_loc_cpu[requests + 1].long() - starts


def _rows(starts: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
    """Rows of consecutive ranges, ``[sum of lengths]`` int64."""
    offsets = starts - (lengths.cumsum(0) - lengths)
    return torch.arange(int(lengths.sum())) + offsets.repeat_interleave(lengths)


def _start_loc(lengths: torch.Tensor) -> torch.Tensor:
    """``query_start_loc`` of queries of these lengths, ``[n + 1]`` int32."""
    return torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).int()
