"""What a step's batch asks of an AHN layer on the CPU: plain data, the same for all layers."""

from dataclasses import dataclass, field

import torch


@dataclass
class PagedBatch:
    """Queries for vLLM's paged causal attention: everything that its CPU kernel takes."""

    rows: torch.Tensor | None
    """``[num_rows]`` int64, the step's rows of these queries; None for all rows."""
    query_start_loc: torch.Tensor
    """``[n + 1]`` int32."""
    seq_lens: torch.Tensor
    """``[n]`` int32."""
    block_table: torch.Tensor
    """``[n, width]`` int32."""
    sliding_window: int
    """Last keys of the table's sequence that a query sees, itself included; -1 for all."""
    scheduler_metadata: torch.Tensor


@dataclass
class DecodeKeys:
    """Keys of ``R`` single queries, gathered and masked: what any window and sinks can be attended with."""

    blocks: torch.Tensor
    """``[R, num_blocks]`` int64, the blocks of sinks and window."""
    visible: torch.Tensor
    """``[R, num_blocks * block_size]`` bool, which of their tokens the query sees."""


@dataclass
class ChunkKeys:
    """The same for consecutive queries of one request."""

    start: int
    end: int
    """The queries' rows in the step."""
    blocks: torch.Tensor
    """``[num_blocks]`` int64."""
    visible: torch.Tensor
    """``[end - start, num_blocks * block_size]`` bool."""


@dataclass
class DecodeBatch:
    """One new token each of ``R`` requests, all past ``W + S``: each absorbs one token and reads."""

    rows: torch.Tensor
    """``[R]`` int64, their rows in the step."""
    requests: torch.Tensor
    """``[R]`` int64, their rows in the block tables."""
    positions: torch.Tensor
    """``[R]`` int64, ``t``."""
    first_read: torch.Tensor
    """``[R]`` bool: ``t = W + S``, the state is zero and its pages hold nothing yet."""
    evicted_blocks: torch.Tensor
    evicted_offsets: torch.Tensor
    """``[R]`` int64 each: where token ``t - W`` lies."""
    keys: DecodeKeys | None
    """For attention, if :attr:`AHNMetadata.past` does not have these requests."""


@dataclass
class Chunk:
    """Several new tokens of one request, the last of them past ``W + S``."""

    request: int
    """Its row in the block tables."""
    first_row: int
    """Row in the step of its first token that reads the memory; it and those after it each absorb one token first."""
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
    keys: list[ChunkKeys]
    """For attention, if :attr:`AHNMetadata.past` does not have this request."""

    @property
    def num_reads(self) -> int:
        """Tokens that read the memory, and as many that are absorbed."""
        return self.last_row - self.first_row

    def read_positions(self) -> torch.Tensor:
        """``[num_reads]`` int64, positions of the tokens that read the memory."""
        return torch.arange(self.first_position, self.first_position + self.num_reads)


@dataclass
class AHNMetadata:
    """One step's work."""

    num_tokens: int
    slot_mapping: torch.Tensor
    """``[num_tokens]`` int64, where the new tokens' keys, values and gates go."""
    blocks: torch.Tensor
    offsets: torch.Tensor
    """``[num_tokens]`` int64 each: the same, as blocks and offsets in them."""
    new_blocks: torch.Tensor | None
    """``[n]`` int64, window blocks that this step begins and does not fill; None if there are none."""
    everything: PagedBatch | None
    """Plain attention of all requests, for layers that are full attention; None if the model has none."""
    inside: PagedBatch | None
    """Attention of the requests inside ``W + S``."""
    past: PagedBatch | None = None
    """Attention of the others over rearranged tables; None if there are none, or each brings its own keys."""
    decodes: DecodeBatch | None = None
    chunks: list[Chunk] = field(default_factory=list)
