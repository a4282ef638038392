"""What a step's batch asks of an AHN layer on the CPU, worked out once for all layers.

A step gives every request some new tokens. The tokens of requests that still fit ``W + S`` are plain causal attention,
done together by vLLM's own kernel. The others are past the lossless memory, wholly or in part; they fall into

* **decodes**: one new token, past ``W + S``. All of them are handled as one batch.
* **chunks**: several new tokens, the last of which is past ``W + S``. Each is handled by itself.

Everything is decided by position. What a block table holds below the window, or behind a request's end, is other
requests' business.
"""

from dataclasses import dataclass

import torch
from vllm import _custom_ops as ops
from vllm import envs
from vllm.config import VllmConfig
from vllm.utils.math_utils import cdiv
from vllm.v1.attention.backend import AttentionMetadataBuilder, CommonAttentionMetadata
from vllm.v1.kv_cache_interface import AttentionSpec

from vllm_ahn.attention.cpu_isa import attention_isa
from vllm_ahn.cache.specs import AHNWindowSpec

QUERY_BLOCK = 512
"""Queries of a chunk that attend together: bounds the mask and the keys that only some of them see."""


@dataclass
class CausalBatch:
    """Requests for vLLM's paged causal attention: everything that its CPU kernel takes."""

    rows: torch.Tensor | None
    """``[num_rows]`` int64, the batch's rows of these requests; None for all rows."""
    query_start_loc: torch.Tensor
    seq_lens: torch.Tensor
    block_table: torch.Tensor
    scheduler_metadata: torch.Tensor


@dataclass
class DecodeBatch:
    """One new token each of ``R`` requests, all past ``W + S``."""

    rows: torch.Tensor
    """``[R]`` int64, their rows in the batch."""
    requests: torch.Tensor
    """``[R]`` int64, their rows in the block tables."""
    positions: torch.Tensor
    """``[R]`` int64, ``t``."""
    first_read: torch.Tensor
    """``[R]`` bool: ``t = W + S``, the state is zero and its pages hold nothing yet."""
    key_blocks: torch.Tensor
    """``[R, num_blocks]`` int64, the blocks of sinks and window."""
    visible: torch.Tensor
    """``[R, num_blocks * block_size]`` bool, which of their tokens the query sees."""
    evicted_blocks: torch.Tensor
    evicted_offsets: torch.Tensor
    """``[R]`` int64 each: where token ``t - W`` lies."""


@dataclass
class QueryBlock:
    """Consecutive queries of one chunk, and the keys that any of them sees."""

    start: int
    end: int
    """Rows in the batch."""
    key_blocks: torch.Tensor
    """``[num_blocks]`` int64."""
    visible: torch.Tensor
    """``[end - start, num_blocks * block_size]`` bool."""


@dataclass
class Chunk:
    """Several new tokens of one request, the last past ``W + S``."""

    request: int
    """Its row in the block tables."""
    query_blocks: list[QueryBlock]
    first_row: int
    """Row in the batch of its first token that reads the memory; it and those after it each absorb one token first."""
    last_row: int
    """Row after its last token."""
    first_position: int
    """Position of ``first_row``."""
    first_read: bool
    """No token was absorbed before this step: the state is zero and its pages hold nothing yet."""
    evicted_blocks: torch.Tensor
    """``[num_blocks]`` int64, the blocks of the tokens absorbed in this step."""
    evicted_offset: int
    """Offset of the first of them in the first block."""

    @property
    def num_reads(self) -> int:
        """Tokens that read the memory, and as many that are absorbed."""
        return self.last_row - self.first_row

    def read_positions(self) -> torch.Tensor:
        """``[num_reads]`` int64, positions of the tokens that read the memory."""
        return torch.arange(self.first_position, self.first_position + self.num_reads)


@dataclass
class AHNMetadata:
    """One step's work, the same for all layers."""

    num_tokens: int
    slot_mapping: torch.Tensor
    """``[num_tokens]`` int64, where the new tokens' keys, values and gates go."""
    new_blocks: torch.Tensor
    """``[n]`` int64, window blocks that this step begins and does not fill."""
    inside: CausalBatch | None
    """Requests inside ``W + S``."""
    everything: CausalBatch | None
    """All requests, for layers that are plain full attention; None if the model has none."""
    decodes: DecodeBatch | None
    chunks: list[Chunk]


class AHNMetadataPlanner:
    """Turns vLLM's batch into :class:`AHNMetadata`.

    Args:
        spec: the window group's spec.
        num_heads: query heads of a layer on this rank.
        model_dtype: dtype of queries, keys and values.
        isa: instruction set of vLLM's CPU attention kernels.
        has_full_layers: some layers are plain full attention.
    """

    def __init__(
        self,
        spec: AHNWindowSpec,
        *,
        num_heads: int,
        model_dtype: torch.dtype,
        isa: str,
        has_full_layers: bool,
    ) -> None:
        self.spec = spec
        self.num_heads = num_heads
        self.model_dtype = model_dtype
        self.isa = isa
        self.has_full_layers = has_full_layers

    def plan(self, common: CommonAttentionMetadata) -> AHNMetadata:
        """Plan a step. ``common`` is the window group's; its tensors live on the CPU."""
        num_tokens = common.num_actual_tokens
        slot_mapping = common.slot_mapping[:num_tokens]
        starts = common.query_start_loc_cpu
        query_lens = starts.diff()
        seq_lens = common.seq_lens
        past = seq_lens > self.spec.capacity

        all_inside = not bool(past.any())
        inside = None
        if all_inside:
            inside = self._causal_batch(common, None)
        elif not bool(past.all()):
            inside = self._causal_batch(common, (~past).nonzero().flatten())
        everything = None
        if self.has_full_layers:
            everything = inside if all_inside else self._causal_batch(common, None)

        single = query_lens == 1
        decoding = (past & single).nonzero().flatten()
        return AHNMetadata(
            num_tokens=num_tokens,
            slot_mapping=slot_mapping,
            new_blocks=self._partly_new_blocks(slot_mapping),
            inside=inside,
            everything=everything,
            decodes=self._decode_batch(common, decoding) if len(decoding) else None,
            chunks=[self._chunk(common, int(request)) for request in (past & ~single).nonzero()],
        )

    def _partly_new_blocks(self, slot_mapping: torch.Tensor) -> torch.Tensor:
        blocks, offsets = slot_mapping // self.spec.block_size, slot_mapping % self.spec.block_size
        begun, filled = blocks[offsets == 0], blocks[offsets == self.spec.block_size - 1]
        return begun[torch.isin(begun, filled, invert=True)]

    def _causal_batch(self, common: CommonAttentionMetadata, requests: torch.Tensor | None) -> CausalBatch:
        """A batch for vLLM's kernel of the given rows of the block table, or of all."""
        query_start_loc, seq_lens, block_table = common.query_start_loc, common.seq_lens, common.block_table_tensor
        rows = None
        if requests is not None:
            starts = query_start_loc[requests].long()
            lengths = query_start_loc[requests + 1].long() - starts
            query_start_loc = torch.zeros(len(requests) + 1, dtype=query_start_loc.dtype)
            query_start_loc[1:] = lengths.cumsum(0)
            offset = starts - query_start_loc[:-1]
            rows = torch.arange(int(lengths.sum())) + offset.repeat_interleave(lengths)
            seq_lens, block_table = seq_lens[requests], block_table[requests]
        return CausalBatch(
            rows=rows,
            query_start_loc=query_start_loc,
            seq_lens=seq_lens,
            block_table=block_table,
            scheduler_metadata=ops.cpu_attn_get_scheduler_metadata(
                num_reqs=len(seq_lens),
                num_heads=self.num_heads,
                num_kv_heads=self.spec.num_kv_heads,
                head_dim=self.spec.head_size,
                seq_lens=seq_lens,
                dtype=self.model_dtype,
                query_start_loc=query_start_loc,
                causal=True,
                sliding_window_size=-1,
                isa=self.isa,
                enable_kv_split=envs.VLLM_CPU_ATTN_SPLIT_KV,
            ),
        )

    def _decode_batch(self, common: CommonAttentionMetadata, requests: torch.Tensor) -> DecodeBatch:
        spec, size = self.spec, self.spec.block_size
        table = common.block_table_tensor[requests].long()
        positions = common.seq_lens[requests].long() - 1
        evicted = positions - spec.window

        # Sinks first, then every block from that of the oldest visible token to that of the query. All rows take as
        # many blocks as the one whose window straddles most; what that adds lies past a row's end and is masked.
        sink_blocks = torch.arange(cdiv(spec.sinks, size))
        first_block = ((evicted + 1) // size).clamp(min=len(sink_blocks))
        window_blocks = torch.arange(int((positions // size - first_block).max()) + 1)
        indices = torch.cat((sink_blocks.expand(len(requests), -1), first_block.unsqueeze(-1) + window_blocks), dim=-1)
        key_positions = (indices.unsqueeze(-1) * size + torch.arange(size)).flatten(1)
        past_end = indices > (positions // size).unsqueeze(-1)
        return DecodeBatch(
            rows=common.query_start_loc_cpu[requests].long(),
            requests=requests,
            positions=positions,
            first_read=positions == spec.capacity,
            # A block past the end is replaced by the query's own: it is masked, but it must be free of NaN.
            key_blocks=table.gather(1, indices.where(~past_end, (positions // size).unsqueeze(-1))),
            visible=self._visible(positions.unsqueeze(-1), key_positions),
            evicted_blocks=table.gather(1, (evicted // size).unsqueeze(-1)).squeeze(-1),
            evicted_offsets=evicted % size,
        )

    def _chunk(self, common: CommonAttentionMetadata, request: int) -> Chunk:
        spec, size = self.spec, self.spec.block_size
        table = common.block_table_tensor[request].long()
        first, last = (int(row) for row in common.query_start_loc_cpu[request : request + 2])
        end = int(common.seq_lens[request])
        position_of_row_0 = end - last

        query_blocks = []
        for start in range(first, last, QUERY_BLOCK):
            stop = min(start + QUERY_BLOCK, last)
            queries = torch.arange(start, stop) + position_of_row_0
            sink_blocks = cdiv(min(spec.sinks, int(queries[-1]) + 1), size)
            first_block = max(sink_blocks, (int(queries[0]) - spec.window + 1) // size)
            blocks = torch.cat((torch.arange(sink_blocks), torch.arange(first_block, int(queries[-1]) // size + 1)))
            key_positions = (blocks.unsqueeze(-1) * size + torch.arange(size)).flatten()
            visible = self._visible(queries.unsqueeze(-1), key_positions)
            query_blocks.append(QueryBlock(start, stop, table[blocks], visible))

        first_read_position = max(first + position_of_row_0, spec.capacity)
        evicted = first_read_position - spec.window
        last_evicted = end - 1 - spec.window
        return Chunk(
            request=request,
            query_blocks=query_blocks,
            first_row=first_read_position - position_of_row_0,
            last_row=last,
            first_position=first_read_position,
            first_read=first_read_position == spec.capacity,
            evicted_blocks=table[evicted // size : last_evicted // size + 1],
            evicted_offset=evicted % size,
        )

    def _visible(self, query_positions: torch.Tensor, key_positions: torch.Tensor) -> torch.Tensor:
        """The lossless memory's mask, ``{ j <= t : t - j < W  or  j < S }``."""
        in_window = query_positions - key_positions < self.spec.window
        return (key_positions <= query_positions) & (in_window | (key_positions < self.spec.sinks))


class AHNMetadataBuilder(AttentionMetadataBuilder[AHNMetadata]):
    """Builds :class:`AHNMetadata` once a step, for all layers of the window group."""

    def __init__(
        self, kv_cache_spec: AttentionSpec, layer_names: list[str], vllm_config: VllmConfig, device: torch.device
    ) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        assert isinstance(kv_cache_spec, AHNWindowSpec)
        self.planner = AHNMetadataPlanner(
            kv_cache_spec,
            num_heads=vllm_config.model_config.get_num_attention_heads(vllm_config.parallel_config),
            model_dtype=vllm_config.model_config.dtype,
            isa=attention_isa(kv_cache_spec.block_size, kv_cache_spec.head_size),
            has_full_layers=kv_cache_spec.retain_all,
        )

    def build(
        self, common_prefix_len: int, common_attn_metadata: CommonAttentionMetadata, fast_build: bool = False
    ) -> AHNMetadata:
        return self.planner.plan(common_attn_metadata)
