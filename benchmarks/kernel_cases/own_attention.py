"""Paged attention in Triton, for machines without vLLM: a stand-in for vLLM's kernel, of the same family.

Full attention and attention to sinks and window are one kernel with two masks, as they are there. The keys of a decode
are split into segments, whose parts a second launch adds up; a chunk's queries share the keys that they load.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from triton.runtime.driver import driver

BLOCK_N = 64
"""Keys at a time."""

MAX_SEGMENTS = 128
PROGRAMS_PER_MULTIPROCESSOR = 4
"""Decodes are split until there are so many programs."""


@triton.jit(do_not_specialize=["window", "sinks", "blocks_per_row", "segments"])
def _attend_kernel(  # type: ignore[no-untyped-def]
    query,
    key_pages,
    value_pages,
    block_table,
    query_start_loc,
    lens,
    output,
    parts,
    part_max,
    part_sum,
    query_token_stride,
    output_token_stride,
    page_stride,
    plane_stride,
    table_stride,
    window,
    sinks,
    scale,
    blocks_per_row,
    segments,
    HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    WINDOWED: tl.constexpr,
    SPLIT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """One program a block of a row's queries with the heads of a group, KV head and segment of keys."""
    row = tl.program_id(0) // blocks_per_row
    first = tl.program_id(0) % blocks_per_row * BLOCK_Q
    kv_head = tl.program_id(1)
    segment = tl.program_id(2)
    start = tl.load(query_start_loc + row)
    num_queries = tl.load(query_start_loc + row + 1) - start
    if first >= num_queries:
        return
    before = tl.load(lens + row) - num_queries
    m = tl.arange(0, BLOCK_M)
    number = first + m // GROUP
    in_block = (m < BLOCK_Q * GROUP) & (number < num_queries)
    position = before + number
    head = kv_head * GROUP + m % GROUP
    d = tl.arange(0, HEAD_SIZE)
    query += start.to(tl.int64) * query_token_stride
    q = tl.load(
        query + (number * query_token_stride + head * HEAD_SIZE)[:, None] + d[None, :],
        mask=in_block[:, None],
        other=0.0,
    )

    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    summed = tl.zeros([BLOCK_M, HEAD_SIZE], tl.float32)
    end = before + tl.minimum(first + BLOCK_Q, num_queries)
    tiles = tl.cdiv(end, BLOCK_N)
    tiles_each = tl.cdiv(tiles, segments)
    row_table = block_table + row.to(tl.int64) * table_stride
    pages = kv_head.to(tl.int64) * plane_stride
    for tile in range(segment * tiles_each, tl.minimum((segment + 1) * tiles_each, tiles)):
        j = tile * BLOCK_N + tl.arange(0, BLOCK_N)
        inside = j < end
        block = tl.load(row_table + j // BLOCK_SIZE, mask=inside, other=0).to(tl.int64)
        place = (pages + block * page_stride + j % BLOCK_SIZE * HEAD_SIZE)[:, None] + d[None, :]
        k = tl.load(key_pages + place, mask=inside[:, None], other=0.0)
        scores = tl.dot(q, tl.trans(k)) * scale
        age = position[:, None] - j[None, :]
        visible = age >= 0
        if WINDOWED:
            visible &= (age < window) | (j < sinks)[None, :]
        scores = tl.where(visible, scores, float("-inf"))
        new_top = tl.maximum(top, tl.max(scores, 1))
        shift = tl.where(new_top == float("-inf"), 0.0, new_top)
        weights = tl.exp2(scores - shift[:, None])
        shrink = tl.exp2(top - shift)
        total = total * shrink + tl.sum(weights, 1)
        v = tl.load(value_pages + place, mask=inside[:, None], other=0.0)
        summed = summed * shrink[:, None] + tl.dot(weights.to(v.dtype), v)
        top = new_top

    if SPLIT:
        part = (row * HEADS + head).to(tl.int64) * segments + segment
        tl.store(parts + part[:, None] * HEAD_SIZE + d[None, :], summed, mask=in_block[:, None])
        tl.store(part_max + part, top, mask=in_block)
        tl.store(part_sum + part, total, mask=in_block)
    else:
        output += start.to(tl.int64) * output_token_stride
        where = (number * output_token_stride + head * HEAD_SIZE)[:, None] + d[None, :]
        tl.store(output + where, (summed / total[:, None]).to(output.dtype.element_ty), mask=in_block[:, None])


@triton.jit(do_not_specialize=["segments"])
def _add_up_kernel(  # type: ignore[no-untyped-def]
    parts,
    part_max,
    part_sum,
    query_start_loc,
    output,
    output_token_stride,
    segments,
    HEADS: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    MOST_SEGMENTS: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    """One program a row and head."""
    row = tl.program_id(0)
    head = tl.program_id(1)
    token = tl.load(query_start_loc + row)
    if tl.load(query_start_loc + row + 1) == token:
        return
    part = (row * HEADS + head).to(tl.int64) * segments
    s = tl.arange(0, MOST_SEGMENTS)
    d = tl.arange(0, HEAD_SIZE)
    maxima = tl.load(part_max + part + s, mask=s < segments, other=float("-inf"))
    top = tl.max(maxima, 0)
    total = tl.sum(tl.load(part_sum + part + s, mask=s < segments, other=0.0) * tl.exp2(maxima - top), 0)
    summed = tl.zeros([HEAD_SIZE], tl.float32)
    for first in range(0, segments, BLOCK_S):
        i = first + tl.arange(0, BLOCK_S)
        weight = tl.exp2(tl.load(part_max + part + i, mask=i < segments, other=float("-inf")) - top)
        tile = tl.load(parts + (part + i)[:, None] * HEAD_SIZE + d[None, :], mask=(i < segments)[:, None], other=0.0)
        summed += tl.sum(weight[:, None] * tile, 0)
    where = output + token.to(tl.int64) * output_token_stride + head * HEAD_SIZE + d
    tl.store(where, (summed / total).to(output.dtype.element_ty))


def segments_of(rows: int, kv_heads: int, max_query_len: int, multiprocessors: int) -> int:
    """Return the parts that the keys of a row are split into."""
    if max_query_len > 1:
        return 1
    return max(1, min(-(-PROGRAMS_PER_MULTIPROCESSOR * multiprocessors // (rows * kv_heads)), MAX_SEGMENTS))


def paged_attention(
    query: torch.Tensor,
    key_pages: torch.Tensor,
    value_pages: torch.Tensor,
    output: torch.Tensor,
    query_start_loc: torch.Tensor,
    lens: torch.Tensor,
    block_table: torch.Tensor,
    *,
    max_query_len: int,
    window: int | None,
    sinks: int,
    scale: float,
    segments: int,
) -> None:
    """Attend, causally, with rows of queries to pages.

    ``query`` and ``output`` are ``[num_tokens, H, D]`` in half precision, ``D`` a power of two; pages are planes
    ``[num_blocks, Hkv, block_size, D]``. Row ``r`` has queries from ``query_start_loc[r]`` on, the last of its
    ``lens[r]`` keys. ``window`` is ``W``, None for all keys; ``segments`` comes from `segments_of`.
    """
    heads, head_size = query.shape[1:]
    kv_heads, block_size = key_pages.shape[1:3]
    assert query.stride()[1:] == output.stride()[1:] == (head_size, 1), "heads must be contiguous"
    assert key_pages.stride() == value_pages.stride(), "keys and values must be planes of the same pages"
    assert segments == 1 or max_query_len == 1, "only decodes are split into segments"
    group, rows, decodes = heads // kv_heads, len(lens), max_query_len == 1
    block_m = max(16, triton.next_power_of_2(group)) if decodes else 128
    block_q = 1 if decodes else block_m // group
    blocks_per_row = triton.cdiv(max_query_len, block_q)
    parts = part_max = part_sum = None
    if segments > 1:
        parts = torch.empty((rows, heads, segments, head_size), device=query.device)
        part_max, part_sum = torch.empty((2, rows, heads, segments), device=query.device).unbind()
    strides = (query.stride(0), output.stride(0), *key_pages.stride()[:2], block_table.stride(0))
    mask = (window or 0, sinks, scale * 1.4426950408889634)  # exponents of 2
    where = (key_pages, value_pages, block_table, query_start_loc, lens, output)
    _attend_kernel[(rows * blocks_per_row, kv_heads, segments)](
        *(query, *where, parts, part_max, part_sum, *strides, *mask, blocks_per_row, segments),
        HEADS=heads,
        GROUP=group,
        HEAD_SIZE=head_size,
        BLOCK_SIZE=block_size,
        WINDOWED=window is not None,
        SPLIT=segments > 1,
        BLOCK_M=block_m,
        BLOCK_Q=block_q,
        BLOCK_N=BLOCK_N,
        num_warps=4 if decodes else 8,
        num_stages=2 if driver.active.get_current_target().backend == "hip" else 3,  # AMD has less shared memory
    )
    if segments > 1:
        sizes = {"HEADS": heads, "HEAD_SIZE": head_size, "MOST_SEGMENTS": MAX_SEGMENTS, "BLOCK_S": 16}
        _add_up_kernel[(rows, heads)](
            parts, part_max, part_sum, query_start_loc, output, output.stride(0), segments, **sizes, num_warps=4
        )
