"""Block tables without the blocks between sinks and window.

vLLM's paged attention walks over all of a sequence. What an AHN layer attends to is its two ends: the sinks, and from
the oldest token in the first query's window to the last query. Dropping whole blocks in between makes a sequence of
bounded length, in which the distance between a query and every key of its window is what it was. It takes a mask that
knows sinks.

Where sinks and window fill blocks (:attr:`AHNWindowSpec.rearrangeable`) the sinks' blocks go behind those of the window
that are older than the block of the span's first query. Then an ordinary sliding window of ``W + S`` is all it takes,
for queries less than ``W`` tokens from the start of that block; :mod:`vllm_ahn.attention.window` says why. Spans
that end within ``W + S`` keep their order: there that window is all of the sequence.

A span is a number of consecutive queries of one request that share a table.
"""

import torch
import triton
import triton.language as tl

TILE_BLOCKS = 8
"""Entries that the attention kernel may read past a span's end, without using them: a tile has up to 128 tokens."""


def compact_width(window: int, sinks: int, block_size: int, max_queries: int) -> int:
    """Return the number of blocks in the longest compacted table.

    Args:
        window: ``W``.
        sinks: ``S``.
        block_size: tokens in a block.
        max_queries: most queries of one span.

    Returns:
        Blocks of the sinks, of the ``W - 1`` tokens before the first query and of the queries; the window starts
        anywhere in a block.
    """
    return triton.cdiv(sinks, block_size) + triton.cdiv(window - 1 + max_queries, block_size) + 1


@triton.jit(do_not_specialize=["window", "width"])
def _compact_kernel(  # type: ignore[no-untyped-def]
    block_table,
    block_table_stride,
    requests,
    query_start_loc,
    seq_lens,
    compact_table,
    compact_table_stride,
    compact_lens,
    window,
    width,
    SINK_BLOCKS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    HAS_REQUESTS: tl.constexpr,
    REARRANGE: tl.constexpr,
    TILE: tl.constexpr,
):
    span = tl.program_id(0)
    seq_len = tl.load(seq_lens + span)
    num_queries = tl.load(query_start_loc + span + 1) - tl.load(query_start_loc + span)
    first_query = seq_len - num_queries
    gap = tl.maximum(tl.maximum(first_query - window + 1, 0) // BLOCK_SIZE - SINK_BLOCKS, 0)
    compact_len = seq_len - gap * BLOCK_SIZE
    if tl.program_id(1) == 0:
        tl.store(compact_lens + span, compact_len)

    request = span
    if HAS_REQUESTS:
        request = tl.load(requests + span)
    columns = tl.program_id(1) * TILE + tl.arange(0, TILE)
    # No span is wider than the table, unless a run without requests made up its lengths.
    inside = (columns < (compact_len + BLOCK_SIZE - 1) // BLOCK_SIZE) & (columns < width)
    if REARRANGE:
        older = first_query // BLOCK_SIZE - SINK_BLOCKS - gap
        moved = (columns < older + SINK_BLOCKS) & (seq_len > window + SINK_BLOCKS * BLOCK_SIZE)
        rearranged = tl.where(columns < older, columns + SINK_BLOCKS + gap, columns - older)
        source = tl.where(moved, rearranged, columns + gap)
    else:
        source = columns + tl.where(columns < SINK_BLOCKS, 0, gap)
    blocks = tl.load(block_table + request.to(tl.int64) * block_table_stride + source, mask=inside, other=0)
    tl.store(compact_table + span.to(tl.int64) * compact_table_stride + columns, blocks, mask=inside)


def compact_block_table(
    block_table: torch.Tensor,
    requests: torch.Tensor | None,
    query_start_loc: torch.Tensor,
    seq_lens: torch.Tensor,
    window: int,
    sinks: int,
    block_size: int,
    rearrange: bool,
    compact_table: torch.Tensor,
    compact_lens: torch.Tensor,
) -> None:
    """Compact the tables of ``R`` spans of queries, in one launch and without waiting for the device.

    A span with ``n`` tokens, the first of whose queries is at ``t``, loses the
    ``gap = max(0, (t - W + 1) // block_size - ceil(S / block_size))`` blocks after those of the sinks. In the rest,
    tokens between ``S`` and the end of the sinks' last block lie outside the window still.

    Args:
        block_table: ``[num_requests, width]`` int32.
        requests: ``[R]`` int32, the spans' requests; None if span ``i`` belongs to request ``i``.
        query_start_loc: ``[R + 1]`` int32, where in the batch a span's queries begin. A span without any is left alone.
        seq_lens: ``[R]`` int32, tokens up to and with the span's last query.
        window: ``W``.
        sinks: ``S``.
        block_size: tokens in a block.
        rearrange: put the sinks behind the older blocks of the window.
        compact_table: ``[>= R, >= compact_width]`` int32, written as far as the spans reach.
        compact_lens: ``[>= R]`` int32, written: the compacted sequences' tokens.
    """
    tile = 1024
    grid = (len(seq_lens), triton.cdiv(compact_table.shape[1], tile))
    _compact_kernel[grid](
        block_table,
        block_table.stride(0),
        requests,
        query_start_loc,
        seq_lens,
        compact_table,
        compact_table.stride(0),
        compact_lens,
        window,
        compact_table.shape[1],
        SINK_BLOCKS=triton.cdiv(sinks, block_size),
        BLOCK_SIZE=block_size,
        HAS_REQUESTS=requests is not None,
        REARRANGE=rearrange,
        TILE=tile,
    )
