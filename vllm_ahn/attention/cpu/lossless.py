"""The lossless memory's attention, planned: which keys a query past ``W + S`` sees, and how a kernel gets at them.

A query at ``t`` sees ``{ j <= t : t - j < W  or  j < S }``. vLLM's CPU kernel knows sliding windows, but no sinks.
A block table can be rearranged so that a sliding window is all that is needed: for queries that begin in block ``b``,
take

    [ blocks of the window before b ]  [ blocks of the sinks ]  [ b and those after it ]

and let each query see the last ``W + S`` keys of this sequence. These are those of ``b`` up to itself, then all sinks,
then as many older ones as are left, ending at ``t - W + 1`` as they should; it holds as long as a query is less than
``W`` tokens from the start of ``b``. Keys carry their position in their RoPE, so their order does not matter.

Sinks must fill their blocks for this, and a window a block at least. For other settings keys are gathered and masked.
"""

import torch
from vllm import _custom_ops as ops
from vllm import envs
from vllm.utils.math_utils import cdiv

from vllm_ahn.attention.cpu.batch import ChunkKeys, DecodeKeys, PagedBatch
from vllm_ahn.attention.cpu.isa import attention_isa
from vllm_ahn.cache.specs import AHNWindowSpec

QUERY_BLOCK = 256
"""Queries of a chunk that share gathered keys: bounds the mask, and the keys that only some of them see."""


def segments(spec: AHNWindowSpec, start: int, end: int) -> list[tuple[int, int]]:
    """Cut the queries at positions ``[start, end)`` into runs that each take one rearranged table."""
    size, cuts = spec.block_size, [start]
    if start < spec.capacity < end:
        cuts.append(spec.capacity)
    while (limit := cuts[-1] // size * size + spec.window // size * size) < end and cuts[-1] >= spec.capacity:
        cuts.append(limit)
    return list(zip(cuts, [*cuts[1:], end], strict=True))


def rearranged_tables(
    spec: AHNWindowSpec, tables: torch.Tensor, starts: torch.Tensor, ends: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Block tables over which a sliding window of ``W + S`` is the lossless memory.

    Args:
        spec: the window group's spec.
        tables: ``[n, width]`` int32, the requests' own block tables.
        starts: ``[n]`` int64, position of the first query; those below ``W + S`` end there, see :func:`segments`.
        ends: ``[n]`` int64, position after the last query.

    Returns:
        Tables ``[n, any width]`` int32, and the lengths of their sequences, ``[n]`` int32.
    """
    size = spec.block_size
    # Queries inside W + S see all keys before them, in a table that stays as it is.
    natural = starts < spec.capacity
    own = torch.where(natural, 0, starts // size)
    sinks = torch.where(natural, 0, spec.sinks // size)
    first = torch.where(natural, 0, ((starts - spec.window + 1) // size).clamp(min=spec.sinks // size))
    older = own - first
    last = (ends - 1) // size
    lengths = (older + sinks) * size + ends - own * size
    column = torch.arange(int((older + sinks + last - own).max()) + 1)
    after_older = column - older.unsqueeze(-1)
    after_sinks = after_older - sinks.unsqueeze(-1)
    index = torch.where(after_older < 0, first.unsqueeze(-1) + column, after_older)
    index = torch.where(after_sinks >= 0, own.unsqueeze(-1) + after_sinks, index)
    index = torch.minimum(index, last.unsqueeze(-1))  # columns past a row's end are not read
    return tables.gather(1, index), lengths.int()


def paged_batch(
    spec: AHNWindowSpec,
    *,
    num_heads: int,
    dtype: torch.dtype,
    rows: torch.Tensor | None,
    query_start_loc: torch.Tensor,
    seq_lens: torch.Tensor,
    block_table: torch.Tensor,
    sliding_window: int,
) -> PagedBatch:
    """Queries with their tables, scheduled over threads as vLLM's CPU kernel wants it."""
    scheduler_metadata = ops.cpu_attn_get_scheduler_metadata(
        num_reqs=len(seq_lens),
        num_heads=num_heads,
        num_kv_heads=spec.num_kv_heads,
        head_dim=spec.head_size,
        seq_lens=seq_lens,
        dtype=dtype,
        query_start_loc=query_start_loc,
        causal=True,
        sliding_window_size=sliding_window,
        isa=attention_isa(spec.block_size, spec.head_size),
        enable_kv_split=envs.VLLM_CPU_ATTN_SPLIT_KV,
    )
    return PagedBatch(rows, query_start_loc, seq_lens, block_table, sliding_window, scheduler_metadata)


def decode_keys(spec: AHNWindowSpec, tables: torch.Tensor, positions: torch.Tensor) -> DecodeKeys:
    """Keys of single queries at ``positions [R]``, by the requests' own block tables ``[R, width]`` int64."""
    size = spec.block_size
    own = (positions // size).unsqueeze(-1)
    # Sinks first, then every block from that of the oldest visible token to the query's. All rows take as many blocks
    # as the one whose window straddles most; what that adds lies past a row's end and is masked.
    sink_blocks = torch.arange(cdiv(spec.sinks, size))
    first = ((positions - spec.window + 1) // size).clamp(min=len(sink_blocks)).unsqueeze(-1)
    window_blocks = torch.arange(int((own - first).max()) + 1)
    index = torch.cat((sink_blocks.expand(len(positions), -1), first + window_blocks), dim=-1)
    key_positions = (index.unsqueeze(-1) * size + torch.arange(size)).flatten(1)
    # A block past the end is replaced by the query's own: it is masked, but must be free of NaN.
    blocks = tables.gather(1, torch.where(index > own, own, index))
    return DecodeKeys(blocks, _visible(spec, positions.unsqueeze(-1), key_positions))


def chunk_keys(spec: AHNWindowSpec, table: torch.Tensor, first_row: int, start: int, end: int) -> list[ChunkKeys]:
    """Keys of one request's queries at positions ``[start, end)``, by its own block table ``[width]`` int64."""
    size, keys = spec.block_size, []
    for begin in range(start, end, QUERY_BLOCK):
        queries = torch.arange(begin, min(begin + QUERY_BLOCK, end))
        last = int(queries[-1])
        sink_blocks = cdiv(min(spec.sinks, last + 1), size)
        first = max(sink_blocks, (begin - spec.window + 1) // size)
        index = torch.cat((torch.arange(sink_blocks), torch.arange(first, last // size + 1)))
        key_positions = (index.unsqueeze(-1) * size + torch.arange(size)).flatten()
        visible = _visible(spec, queries.unsqueeze(-1), key_positions)
        row = first_row + begin - start
        keys.append(ChunkKeys(row, row + len(queries), table[index], visible))
    return keys


def _visible(spec: AHNWindowSpec, queries: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
    """The mask, for positions of queries and keys that broadcast."""
    return (keys <= queries) & ((queries - keys < spec.window) | (keys < spec.sinks))
