"""Decode: absorb one token of each request and read the memory, in place in its pages."""

import torch
import triton
import triton.language as tl

from .cache_write import check_window_pages
from .gates import check_memory, decay_and_rate

TILE_ELEMENTS = 4096
"""Elements of a state that one program updates: few enough for registers, enough to keep memory busy."""


@triton.jit
def _rows_kernel(query_start_loc, seq_lens, rows, num_requests, capacity, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    request = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = request < num_requests
    start = tl.load(query_start_loc + request, mask=mask, other=0)
    end = tl.load(query_start_loc + request + 1, mask=mask, other=0)
    seq_len = tl.load(seq_lens + request, mask=mask, other=0)
    reads = (end - start == 1) & (seq_len > capacity)
    tl.store(rows + request, tl.where(reads, start, -1).to(tl.int32), mask=mask)


def decode_rows(query_start_loc: torch.Tensor, seq_lens: torch.Tensor, capacity: int, rows: torch.Tensor) -> None:
    """Find the requests whose state this step updates by one token: once a step, for all layers.

    Args:
        query_start_loc: ``[num_requests + 1]`` int32, first row of each request in the batch.
        seq_lens: ``[num_requests]`` int32, tokens including the new ones; 0 for padding.
        capacity: ``W + S``.
        rows: ``[num_requests]`` int32, is written: the batch's row of a request with one new token past ``W + S``, or
            -1 for all others. May be a buffer that a CUDA graph reads.
    """
    if len(rows):
        _rows_kernel[(triton.cdiv(len(rows), 256),)](query_start_loc, seq_lens, rows, len(rows), capacity, BLOCK=256)


@triton.jit
def _decode_kernel(  # type: ignore[no-untyped-def]
    q,
    key_pages,
    value_pages,
    gate_pages,
    columns,
    window_table,
    state_table,
    rows,
    seq_lens,
    A_log,
    o,
    q_token_stride,
    q_head_stride,
    page_stride,
    plane_stride,
    state_page_stride,
    window_table_stride,
    state_table_stride,
    window,
    capacity,
    scale,
    HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    GATES: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    COLUMNS_PER_PAGE: tl.constexpr,
    MEMORY: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """One program a tile of a head's columns, head and request.

    The state is read before anything is absorbed, by key and query at once, as ``M_new = a M + k u^T`` means
    ``M_new^T q = a M^T q + (k . q) u``.
    """
    head = tl.program_id(1)
    request = tl.program_id(2).to(tl.int64)
    d = tl.arange(0, BLOCK_D)
    j = tl.program_id(0) * BLOCK_V + tl.arange(0, BLOCK_V)
    in_d = d < HEAD_SIZE
    in_j = j < HEAD_SIZE
    # A tile's columns may lie in two pages or more: every column finds its own.
    column = head * HEAD_SIZE + j
    # Three look-ups that do not wait for each other, before it is known whether there is anything to do.
    row = tl.load(rows + request)
    t = tl.load(seq_lens + request) - 1
    page = tl.load(state_table + request * state_table_stride + column // COLUMNS_PER_PAGE, mask=in_j, other=0)
    if row < 0:
        return

    tile = page.to(tl.int64) * state_page_stride + column % COLUMNS_PER_PAGE * HEAD_SIZE
    tile = columns + tile[:, None] + d[None, :]
    in_tile = in_j[:, None] & in_d[None, :]
    # At t = W + S the state is zero, whatever its pages held before.
    known = j < tl.where(t > capacity, HEAD_SIZE, 0)
    state = tl.load(tile, mask=known[:, None] & in_d[None, :], other=0.0).to(tl.float32)

    evicted = t - window
    block = tl.load(window_table + request * window_table_stride + evicted // BLOCK_SIZE).to(tl.int64)
    offset = evicted % BLOCK_SIZE
    plane = block * page_stride + (head // GROUP).to(tl.int64) * plane_stride
    k = tl.load(key_pages + plane + offset * HEAD_SIZE + d, mask=in_d, other=0.0).to(tl.float32)
    v = tl.load(value_pages + plane + offset * HEAD_SIZE + j, mask=in_j, other=0.0).to(tl.float32)
    gates = gate_pages + plane + offset * GATES + head % GROUP * (GATES // GROUP)
    g, b = decay_and_rate(gates, A_log, head, MEMORY)
    x = tl.load(q + row.to(tl.int64) * q_token_stride + head * q_head_stride + d, mask=in_d, other=0.0).to(tl.float32)

    k *= tl.rsqrt(tl.sum(k * k, 0) + 1e-6)
    x *= tl.rsqrt(tl.sum(x * x, 0) + 1e-6)
    decay = tl.exp(g)
    u = v
    if MEMORY != "Mamba2":
        u -= decay * tl.sum(state * k[None, :], 1)
    u *= b
    read = decay * tl.sum(state * x[None, :], 1) + tl.sum(k * x, 0) * u
    state = decay * state + u[:, None] * k[None, :]
    tl.store(tile, state.to(columns.dtype.element_ty), mask=in_tile)
    tl.store(o + (request * HEADS + head) * HEAD_SIZE + j, scale * read, mask=in_j)


def decode_memory(
    q: torch.Tensor,
    key_pages: torch.Tensor,
    value_pages: torch.Tensor,
    gate_pages: torch.Tensor,
    window_table: torch.Tensor,
    columns: torch.Tensor,
    state_table: torch.Tensor,
    rows: torch.Tensor,
    seq_lens: torch.Tensor,
    o: torch.Tensor,
    *,
    memory: str,
    window: int,
    sinks: int,
    scale: float,
    A_log: torch.Tensor | None = None,
    block_v: int | None = None,
    num_warps: int | None = None,
) -> None:
    """Absorb token ``t - W`` of each request in its state, then read the state with the query of token ``t``.

    The launch depends on shapes alone, so it can be captured in a CUDA graph; requests without a row cost nothing
    but a look at ``rows``.

    Args:
        q: ``[num_tokens, H, D]``, contiguous in ``D``, any float dtype; normalised here, as keys are.
        key_pages, value_pages, gate_pages: the planes of the window pages, see :func:`.write_window_pages`.
        window_table: ``[>= num_requests, num_blocks]`` int32, the window group's block table. Only the block of the
            evicted token is looked up.
        columns: ``[num_blocks, columns_per_page, D]`` float32 or bfloat16, the state pages; pages contiguous. Updated.
        state_table: ``[>= num_requests, >= num_pages]`` int32, the state group's block table.
        rows: ``[num_requests]`` int32, from :func:`decode_rows`.
        seq_lens: ``[num_requests]`` int32, ``t + 1``.
        o: ``[num_requests, H, D]`` float32, contiguous, is written where a request has a row.
        memory: ``GatedDeltaNet``, ``DeltaNet`` or ``Mamba2``.
        window: ``W``.
        sinks: ``S``.
        scale: factor on what is read.
        A_log: ``[H]`` float32, for Mamba2.
        block_v: columns of a state per program, a power of two; None for a choice by head size.
        num_warps: warps a program; None likewise.
    """
    check_window_pages(key_pages, value_pages, gate_pages)
    kv_heads, block_size, head_size = key_pages.shape[1:]
    heads = q.shape[1]
    group = heads // kv_heads
    if q.shape[1:] != (group * kv_heads, head_size) or q.stride(2) != 1:
        raise ValueError(f"q must be [T, a multiple of {kv_heads}, {head_size}] and contiguous, got {q.shape}")
    check_memory(memory, A_log, gate_pages.shape[3], group)
    if columns.shape[2] != head_size or columns.stride()[1:] != (head_size, 1):
        raise ValueError(
            f"columns must be [num_blocks, columns, {head_size}] contiguous in a page, got {columns.shape}"
        )
    if o.shape != (len(rows), heads, head_size) or not o.is_contiguous() or o.dtype != torch.float32:
        raise ValueError(f"o must be float32 {(len(rows), heads, head_size)}, contiguous, got {o.dtype} {o.shape}")
    if state_table.shape[1] * columns.shape[1] < heads * head_size:
        raise ValueError(f"{state_table.shape[1]} pages of {columns.shape[1]} columns are no state of {heads} heads")
    if len(rows) == 0:
        return
    block_d = triton.next_power_of_2(head_size)
    block_v = block_v or min(TILE_ELEMENTS // block_d, block_d)
    _decode_kernel[(triton.cdiv(head_size, block_v), heads, len(rows))](
        q,
        key_pages,
        value_pages,
        gate_pages,
        columns,
        window_table,
        state_table,
        rows,
        seq_lens,
        A_log,
        o,
        q.stride(0),
        q.stride(1),
        key_pages.stride(0),
        key_pages.stride(1),
        columns.stride(0),
        window_table.stride(0),
        state_table.stride(0),
        window,
        window + sinks,
        scale,
        HEADS=heads,
        GROUP=group,
        GATES=gate_pages.shape[3],
        HEAD_SIZE=head_size,
        BLOCK_SIZE=block_size,
        COLUMNS_PER_PAGE=columns.shape[1],
        MEMORY=memory,
        BLOCK_D=block_d,
        BLOCK_V=block_v,
        num_warps=num_warps or 4,
    )
