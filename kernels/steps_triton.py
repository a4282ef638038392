"""Steps on a GPU: absorb a few tokens of each request and read the memory, over the settled states in their pages."""

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
from vllm_ahn.kernels.settled import GRANULARITY, Settling
from vllm_ahn.kernels.settled_slots import absorbed_at, boundary_of, rule_arguments, slot_of
from vllm_ahn.memory.spec import MemorySpec

TILE_ELEMENTS = 4096
"""Elements of a state that one program reads: few enough for registers, enough to keep memory busy."""


@triton.jit(do_not_specialize=["num_requests"])
def _find_steps_kernel(  # type: ignore[no-untyped-def]
    query_start_loc,
    seq_lens,
    first_tokens,
    counts,
    tokens,
    positions,
    num_requests,
    capacity,
    QUERIES: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK: tl.constexpr,
):
    request = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = request < num_requests
    start = tl.load(query_start_loc + request, mask=mask, other=0)
    end = tl.load(query_start_loc + request + 1, mask=mask, other=0)
    seq_len = tl.load(seq_lens + request, mask=mask, other=0)
    # A chunk's queries step elsewhere, if at all: how it is cut the host has decided.
    count = tl.minimum(tl.maximum(seq_len - capacity, 0), end - start)
    count = tl.where(end - start <= QUERIES, count, 0)
    tl.store(first_tokens + request, end - count, mask=mask)
    tl.store(counts + request, count, mask=mask)
    query = tl.arange(0, BLOCK_Q)[None, :]
    steps = query < count[:, None]
    place = request[:, None] * QUERIES + query
    mask = mask[:, None] & (query < QUERIES)
    tl.store(tokens + place, tl.where(steps, (end - count)[:, None] + query, -1), mask=mask)
    # Where nothing is read the router is asked all the same, for a position that it knows.
    position = tl.where(steps, (seq_len - count)[:, None] + query, capacity)
    tl.store(positions + place, position.to(tl.int64), mask=mask)


def find_steps(
    query_start_loc: torch.Tensor,
    seq_lens: torch.Tensor,
    capacity: int,
    first_tokens: torch.Tensor,
    counts: torch.Tensor,
    tokens: torch.Tensor,
    positions: torch.Tensor,
) -> None:
    """Find the queries that step, of requests with at most ``QUERIES`` new tokens: once a step, for all layers.

    Nothing is asked of the host, whose lengths are bounds while drafts are in flight. All results may be buffers that a
    CUDA graph reads.

    Args:
        query_start_loc: ``[num_requests + 1]`` int32, first token of each request in the batch.
        seq_lens: ``[num_requests]`` int32, tokens including the new ones; 0 for padding.
        capacity: ``W + S``.
        first_tokens: ``[num_requests]`` int32, is written: in the batch, the first query at ``W + S`` or past it.
        counts: ``[num_requests]`` int32, is written: how many there are, 0 for none.
        tokens: ``[num_requests, QUERIES]`` int32, contiguous, is written: those queries, and -1 behind them.
        positions: likewise int64, their positions, and ``W + S`` behind them.
    """
    num_requests, queries = tokens.shape
    if num_requests:
        _find_steps_kernel[(triton.cdiv(num_requests, 64),)](
            query_start_loc,
            seq_lens,
            first_tokens,
            counts,
            tokens,
            positions,
            num_requests,
            capacity,
            QUERIES=queries,
            BLOCK_Q=triton.next_power_of_2(queries),
            BLOCK=64,
        )


@triton.jit
def _steps_kernel(  # type: ignore[no-untyped-def]
    query,
    window_table,
    requests,
    first_tokens,
    counts,
    seq_lens,
    A_log,
    o,
    query_token_stride,
    query_head_stride,
    window_table_stride,
    window,
    sinks,
    GRANULARITY: tl.constexpr,
    PERIOD: tl.constexpr,
    TURNS: tl.constexpr,
    INNER: tl.constexpr,
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
    PAGES_PER_SLOT: tl.constexpr,
    HAS_REQUESTS: tl.constexpr,
    QUERIES: tl.constexpr,
    HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    DELTA: tl.constexpr,
    KEEPS_DECAY: tl.constexpr,
    DECAY_FROM_RATE: tl.constexpr,
    L2_EPS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_V: tl.constexpr,
    ROWS: tl.constexpr,
):
    """One program a tile of a head's columns, head and entry.

    ``ROWS`` are the tokens since the boundary, pending ones and behind them the new ones. Sums of ``g`` run from the
    newest token back, so that a large decay spoils none behind it.
    """
    entry = tl.program_id(2).to(tl.int64)
    head = tl.program_id(1)
    count = tl.load(counts + entry)
    if count == 0:
        return
    request = entry
    if HAS_REQUESTS:
        request = tl.load(requests + entry).to(tl.int64)
    seq_len = tl.load(seq_lens + request)
    first_token = tl.load(first_tokens + entry).to(tl.int64)
    d = tl.arange(0, BLOCK_D)
    j = tl.program_id(0) * BLOCK_V + tl.arange(0, BLOCK_V)
    i = tl.arange(0, ROWS)
    in_d = d < HEAD_SIZE
    in_j = j < HEAD_SIZE
    in_tile = in_j[:, None] & in_d[None, :]

    computed = seq_len - count
    source = boundary_of(computed, window, sinks, GRANULARITY)
    target = boundary_of(seq_len, window, sinks, GRANULARITY)
    source_slot = slot_of(source, GRANULARITY, PERIOD, TURNS, INNER)
    target_slot = slot_of(target, GRANULARITY, PERIOD, TURNS, INNER)
    first = absorbed_at(source, window, sinks)
    pending = computed - window - first
    settled = absorbed_at(target, window, sinks) - first

    tile = columns_in_pages(
        columns,
        state_table,
        request,
        source_slot,
        head * HEAD_SIZE + j,
        in_j,
        state_table_stride,
        STATE_PAGE_STRIDE,
        COLUMNS_PER_PAGE,
        COLUMN_SIZE,
        PAGES_PER_SLOT,
    )
    # A fresh state is zero, whatever its pages held before.
    known = j < tl.where(first > sinks, HEAD_SIZE, 0)
    state = tl.load(tile[:, None] + d[None, :], mask=known[:, None] & in_d[None, :], other=0.0).to(tl.float32)

    valid = i < pending + count
    position = first + i
    block = tl.load(window_table + request * window_table_stride + position // BLOCK_SIZE, mask=valid, other=0)
    key, value, gates = token_in_pages(
        key_pages,
        value_pages,
        gate_pages,
        block,
        position % BLOCK_SIZE,
        head // GROUP,
        PAGE_STRIDE,
        KV_HEAD_STRIDE,
        HEAD_SIZE,
        GATES,
    )
    keys = tl.load(key[:, None] + d[None, :], mask=valid[:, None] & in_d[None, :], other=0.0).to(tl.float32)
    keys *= tl.rsqrt(tl.sum(keys * keys, 1) + L2_EPS)[:, None]
    # Places behind the last token look into block 0, which holds anything.
    gates += head % GROUP * (GATES // GROUP)
    g, b = decay_and_rate(gates, A_log, head, KEEPS_DECAY, DECAY_FROM_RATE)
    g = tl.where(valid, g, 0.0)
    b = tl.where(valid, b, 0.0)
    if DELTA:
        row = columns_in_pages(
            columns,
            state_table,
            request,
            source_slot,
            HEADS * HEAD_SIZE + head * GRANULARITY + i,
            i < pending,
            state_table_stride,
            STATE_PAGE_STRIDE,
            COLUMNS_PER_PAGE,
            COLUMN_SIZE,
            PAGES_PER_SLOT,
        )
        updates = tl.load(row[:, None] + j[None, :], mask=(i < pending)[:, None] & in_j[None, :], other=0.0)
        updates = updates.to(tl.float32)
    else:
        updates = tl.load(value[:, None] + j[None, :], mask=valid[:, None] & in_j[None, :], other=0.0)
        updates = b[:, None] * updates.to(tl.float32)
    if QUERIES > 1:
        tl.debug_barrier()  # below, rows may be written over those of the same state

    for x in range(count if QUERIES > 1 else 1):
        now = pending + x
        later = (i[None, :] > i[:, None]) & (i[None, :] <= now)
        weights = tl.exp(tl.sum(tl.where(later, g[None, :], 0.0), 1))
        of_state = tl.exp(tl.sum(tl.where(i <= now, g, 0.0), 0))
        place = query + (first_token + x) * query_token_stride + head * query_head_stride
        q = tl.load(place + d, mask=in_d, other=0.0).to(tl.float32)
        q *= tl.rsqrt(tl.sum(q * q, 0) + L2_EPS)
        if DELTA:
            absorbed = first + now
            its_block = tl.load(window_table + request * window_table_stride + absorbed // BLOCK_SIZE)
            _, its_value, _ = token_in_pages(
                key_pages,
                value_pages,
                gate_pages,
                its_block,
                absorbed % BLOCK_SIZE,
                head // GROUP,
                PAGE_STRIDE,
                KV_HEAD_STRIDE,
                HEAD_SIZE,
                GATES,
            )
            v = tl.load(its_value + j, mask=in_j, other=0.0).to(tl.float32)
            k = tl.sum(tl.where((i == now)[:, None], keys, 0.0), 0)
            keys_overlap = tl.where(i < now, weights * tl.sum(keys * k[None, :], 1), 0.0)
            seen = of_state * tl.sum(state * k[None, :], 1) + tl.sum(updates * keys_overlap[:, None], 0)
            u = tl.sum(tl.where(i == now, b, 0.0), 0) * (v - seen)
            updates = tl.where((i == now)[:, None], u[None, :], updates)
            # To the boundary's state that it comes after. An earlier one counts for a step that is taken back, if that
            # state is left at all.
            behind = now >= settled
            its_row = columns_in_pages(
                columns,
                state_table,
                request,
                tl.where(behind, target_slot, source_slot),
                HEADS * HEAD_SIZE + head * GRANULARITY + tl.where(behind, now - settled, now),
                count > 0,
                state_table_stride,
                STATE_PAGE_STRIDE,
                COLUMNS_PER_PAGE,
                COLUMN_SIZE,
                PAGES_PER_SLOT,
            )
            first_kept = tl.where(source_slot == target_slot, settled, 0)
            kept = j < tl.where(now >= first_kept, HEAD_SIZE, 0)
            tl.store(its_row + j, u.to(columns.dtype.element_ty), mask=kept)
        overlap = tl.where(i <= now, weights * tl.sum(keys * q[None, :], 1), 0.0)
        read = of_state * tl.sum(state * q[None, :], 1) + tl.sum(updates * overlap[:, None], 0)
        tl.store(o + ((entry * QUERIES + x) * HEADS + head) * HEAD_SIZE + j, scale * read, mask=in_j)

    if target > source:
        # A loop of outer products, and no `tl.dot`: in float32 that takes all registers there are, for all steps.
        state *= tl.exp(tl.sum(tl.where(i < settled, g, 0.0), 0))
        for token in range(settled):
            weight = tl.exp(tl.sum(tl.where((i > token) & (i < settled), g, 0.0), 0))
            its_update = tl.sum(tl.where((i == token)[:, None], updates, 0.0), 0)
            its_key = tl.sum(tl.where((i == token)[:, None], keys, 0.0), 0)
            state += (weight * its_update)[:, None] * its_key[None, :]
        tile = columns_in_pages(
            columns,
            state_table,
            request,
            target_slot,
            head * HEAD_SIZE + j,
            in_j,
            state_table_stride,
            STATE_PAGE_STRIDE,
            COLUMNS_PER_PAGE,
            COLUMN_SIZE,
            PAGES_PER_SLOT,
        )
        tl.store(tile[:, None] + d[None, :], state.to(columns.dtype.element_ty), mask=in_tile)


def absorb_and_read_steps(
    query: torch.Tensor,
    window_pages: WindowPages,
    window_table: torch.Tensor,
    state_pages: StatePages,
    state_table: torch.Tensor,
    first_tokens: torch.Tensor,
    counts: torch.Tensor,
    seq_lens: torch.Tensor,
    o: torch.Tensor,
    *,
    memory: MemorySpec,
    settling: Settling,
    scale: float,
    requests: torch.Tensor | None = None,
    A_log: torch.Tensor | None = None,
    block_v: int | None = None,
    num_warps: int | None = None,
) -> None:
    """Absorb one token before each query, then read; write the state where a boundary is crossed.

    The launch depends on shapes alone, so it can be captured in a CUDA graph; entries without queries cost one look.

    Args:
        query: ``[num_tokens, H, D]``, contiguous in ``D``, any float dtype; normalised here, as keys are.
        window_pages: the layer's window pages.
        window_table: ``[>= num_requests, num_blocks]`` int32, the window group's block table. Only blocks of absorbed
            tokens are looked up.
        state_pages: the layer's state pages, float32 or bfloat16; updated.
        state_table: ``[>= num_requests, >= num_slots * num_pages]`` int32, the state group's block table.
        first_tokens: ``[E]`` int32, first of the consecutive queries of an entry in the batch; all are at ``W + S`` or
            past it, the last is its request's last token.
        counts: ``[E]`` int32, how many, at most ``QUERIES``; 0 for none.
        seq_lens: ``[num_requests]`` int32, with the step's tokens.
        o: ``[E, QUERIES, H, D]`` float32, contiguous, is written where there is a query; ``QUERIES`` is at most 16.
        memory: which memory.
        settling: the rule of boundaries and slots.
        scale: factor on what is read.
        requests: ``[E]`` int32, the entries' requests; None if they are requests ``0..E-1``.
        A_log: ``[H]`` float32, where the decay is made of the rate.
        block_v: columns of a state per program, a power of two, at least 16; None for a choice by head size.
        num_warps: warps a program; None likewise.

    Raises:
        ValueError: shapes, dtypes or strides do not agree.
    """
    group = window_pages.group_of(query)
    heads, head_size = query.shape[1:]
    check_gates(memory, window_pages.layout.gates_per_kv_head, group, A_log)
    state_pages.check(state_table, heads, head_size, settling.num_slots)
    if state_pages.layout.kept != (GRANULARITY if memory.delta else 0):
        raise ValueError(f"pages keep {state_pages.layout.kept} updates a head, which is not what the memory needs")
    entries, queries = o.shape[:2]
    if o.shape[2:] != (heads, head_size) or not o.is_contiguous() or o.dtype != torch.float32:
        raise ValueError(f"o must be float32 [E, Q, {heads}, {head_size}], contiguous, got {o.dtype} {tuple(o.shape)}")
    if queries > GRANULARITY or len(counts) != entries or len(first_tokens) != entries:
        raise ValueError(f"{entries} entries of at most {GRANULARITY} queries expected, got {tuple(o.shape)}")
    if entries == 0:
        return
    block_d = triton.next_power_of_2(head_size)
    block_v = block_v or max(16, min(TILE_ELEMENTS // block_d, block_d))
    _steps_kernel[(triton.cdiv(head_size, block_v), heads, entries)](
        query,
        window_table,
        requests,
        first_tokens,
        counts,
        seq_lens,
        A_log,
        o,
        query.stride(0),
        query.stride(1),
        window_table.stride(0),
        scale=scale,
        **rule_arguments(settling),
        **window_page_arguments(window_pages),
        **state_page_arguments(state_pages, state_table),
        HAS_REQUESTS=requests is not None,
        QUERIES=queries,
        HEADS=heads,
        GROUP=group,
        DELTA=memory.delta,
        KEEPS_DECAY=memory.keeps_decay,
        DECAY_FROM_RATE=memory.decay_from_rate,
        L2_EPS=L2_EPS,
        BLOCK_D=block_d,
        BLOCK_V=block_v,
        ROWS=triton.next_power_of_2(GRANULARITY - 1 + queries),
        num_warps=num_warps or 4,
    )
