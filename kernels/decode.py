"""Decode: absorb one token of each request and read the memory, in place in its pages."""

import torch
import triton
import triton.language as tl

from vllm_ahn.kernels.gates import check_gates, decay_and_rate
from vllm_ahn.kernels.page_addresses import (
    columns_in_pages,
    state_page_arguments,
    token_in_pages,
    window_page_arguments,
)
from vllm_ahn.kernels.pages import StatePages, WindowPages
from vllm_ahn.kernels.recurrence.norm import L2_EPS
from vllm_ahn.memory.spec import MemorySpec

TILE_ELEMENTS = 4096
"""Elements of a state that one program updates: few enough for registers, enough to keep memory busy."""


@triton.jit(do_not_specialize=["num_requests"])
def _decode_reads_kernel(query_start_loc, seq_lens, reads, num_requests, capacity, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    request = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = request < num_requests
    start = tl.load(query_start_loc + request, mask=mask, other=0)
    end = tl.load(query_start_loc + request + 1, mask=mask, other=0)
    seq_len = tl.load(seq_lens + request, mask=mask, other=0)
    decodes = (end - start == 1) & (seq_len > capacity)
    tl.store(reads + request, tl.where(decodes, start, -1).to(tl.int32), mask=mask)


def decode_reads(query_start_loc: torch.Tensor, seq_lens: torch.Tensor, capacity: int, reads: torch.Tensor) -> None:
    """Find the tokens that read after one token is absorbed: once a step, for all layers.

    Args:
        query_start_loc: ``[num_requests + 1]`` int32, first token of each request in the batch.
        seq_lens: ``[num_requests]`` int32, tokens including the new ones; 0 for padding.
        capacity: ``W + S``.
        reads: ``[num_requests]`` int32, is written: the token of a request with one new token past ``W + S``, or -1 for
            all others. May be a buffer that a CUDA graph reads.
    """
    if len(reads):
        grid = (triton.cdiv(len(reads), 256),)
        _decode_reads_kernel[grid](query_start_loc, seq_lens, reads, len(reads), capacity, BLOCK=256)


@triton.jit
def _decode_kernel(  # type: ignore[no-untyped-def]
    query,
    window_table,
    reads,
    seq_lens,
    A_log,
    o,
    query_token_stride,
    query_head_stride,
    window_table_stride,
    window,
    capacity,
    scale,
    key_pages,
    value_pages,
    gate_pages,
    PAGE_STRIDE: tl.constexpr,
    KV_HEAD_STRIDE: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    GATES: tl.constexpr,
    columns,
    state_table,
    state_table_stride,
    STATE_PAGE_STRIDE: tl.constexpr,
    COLUMNS_PER_PAGE: tl.constexpr,
    COLUMN_SIZE: tl.constexpr,
    HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    DELTA: tl.constexpr,
    KEEPS_DECAY: tl.constexpr,
    DECAY_FROM_RATE: tl.constexpr,
    L2_EPS: tl.constexpr,
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
    # Three look-ups that do not wait for each other, before it is known whether there is anything to do.
    token = tl.load(reads + request)
    t = tl.load(seq_lens + request) - 1
    tile = columns_in_pages(
        columns,
        state_table,
        request,
        head * HEAD_SIZE + j,
        in_j,
        state_table_stride,
        STATE_PAGE_STRIDE,
        COLUMNS_PER_PAGE,
        COLUMN_SIZE,
    )
    if token < 0:
        return

    tile = tile[:, None] + d[None, :]
    in_tile = in_j[:, None] & in_d[None, :]
    # At t = W + S the state is fresh: zero, whatever its pages held before.
    known = j < tl.where(t > capacity, HEAD_SIZE, 0)
    state = tl.load(tile, mask=known[:, None] & in_d[None, :], other=0.0).to(tl.float32)

    absorbed = t - window
    block = tl.load(window_table + request * window_table_stride + absorbed // BLOCK_SIZE)
    key, value, gates = token_in_pages(
        key_pages,
        value_pages,
        gate_pages,
        block,
        absorbed % BLOCK_SIZE,
        head // GROUP,
        PAGE_STRIDE,
        KV_HEAD_STRIDE,
        HEAD_SIZE,
        GATES,
    )
    k = tl.load(key + d, mask=in_d, other=0.0).to(tl.float32)
    v = tl.load(value + j, mask=in_j, other=0.0).to(tl.float32)
    gates += head % GROUP * (GATES // GROUP)
    g, b = decay_and_rate(gates, A_log, head, KEEPS_DECAY, DECAY_FROM_RATE)
    place = query + token.to(tl.int64) * query_token_stride + head * query_head_stride
    q = tl.load(place + d, mask=in_d, other=0.0).to(tl.float32)

    k *= tl.rsqrt(tl.sum(k * k, 0) + L2_EPS)
    q *= tl.rsqrt(tl.sum(q * q, 0) + L2_EPS)
    decay = tl.exp(g)
    u = v
    if DELTA:
        u -= decay * tl.sum(state * k[None, :], 1)
    u *= b
    read = decay * tl.sum(state * q[None, :], 1) + tl.sum(k * q, 0) * u
    state = decay * state + u[:, None] * k[None, :]
    tl.store(tile, state.to(columns.dtype.element_ty), mask=in_tile)
    tl.store(o + (request * HEADS + head) * HEAD_SIZE + j, scale * read, mask=in_j)


def decode_memory(
    query: torch.Tensor,
    window_pages: WindowPages,
    window_table: torch.Tensor,
    state_pages: StatePages,
    state_table: torch.Tensor,
    reads: torch.Tensor,
    seq_lens: torch.Tensor,
    o: torch.Tensor,
    *,
    memory: MemorySpec,
    window: int,
    sinks: int,
    scale: float,
    A_log: torch.Tensor | None = None,
    block_v: int | None = None,
    num_warps: int | None = None,
) -> None:
    """Absorb token ``t - W`` of each request in its state, then read the state with the query of token ``t``.

    The launch depends on shapes alone, so it can be captured in a CUDA graph; requests that read nothing cost a look
    at ``reads``.

    Args:
        query: ``[num_tokens, H, D]``, contiguous in ``D``, any float dtype; normalised here, as keys are.
        window_pages: the layer's window pages.
        window_table: ``[>= num_requests, num_blocks]`` int32, the window group's block table. Only the block of the
            absorbed token is looked up.
        state_pages: the layer's state pages, float32 or bfloat16; updated.
        state_table: ``[>= num_requests, >= num_pages]`` int32, the state group's block table.
        reads: ``[num_requests]`` int32, from :func:`decode_reads`.
        seq_lens: ``[num_requests]`` int32, ``t + 1``.
        o: ``[num_requests, H, D]`` float32, contiguous, is written where a request has a read.
        memory: which memory.
        window: ``W``.
        sinks: ``S``.
        scale: factor on what is read.
        A_log: ``[H]`` float32, where the decay is made of the rate.
        block_v: columns of a state per program, a power of two; None for a choice by head size.
        num_warps: warps a program; None likewise.

    Raises:
        ValueError: shapes, dtypes or strides do not agree.
    """
    group = window_pages.group_of(query)
    heads, head_size = query.shape[1:]
    check_gates(memory, window_pages.layout.gates_per_kv_head, group, A_log)
    state_pages.check(state_table, heads, head_size)
    if o.shape != (len(reads), heads, head_size) or not o.is_contiguous() or o.dtype != torch.float32:
        raise ValueError(f"o must be float32 {(len(reads), heads, head_size)}, contiguous, got {o.dtype} {o.shape}")
    if len(reads) == 0:
        return
    block_d = triton.next_power_of_2(head_size)
    block_v = block_v or min(TILE_ELEMENTS // block_d, block_d)
    _decode_kernel[(triton.cdiv(head_size, block_v), heads, len(reads))](
        query,
        window_table,
        reads,
        seq_lens,
        A_log,
        o,
        query.stride(0),
        query.stride(1),
        window_table.stride(0),
        window,
        window + sinks,
        scale,
        **window_page_arguments(window_pages),
        **state_page_arguments(state_pages, state_table),
        HEADS=heads,
        GROUP=group,
        DELTA=memory.delta,
        KEEPS_DECAY=memory.keeps_decay,
        DECAY_FROM_RATE=memory.decay_from_rate,
        L2_EPS=L2_EPS,
        BLOCK_D=block_d,
        BLOCK_V=block_v,
        num_warps=num_warps or 4,
    )
