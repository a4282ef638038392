"""From pages to what chunk kernels take, and back: absorbed tokens, the queries that read after them, and states."""

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
from vllm_ahn.kernels.prefill_plan import PrefillPlan
from vllm_ahn.kernels.recurrence.norm import L2_EPS
from vllm_ahn.memory.spec import MemorySpec

TILE_ELEMENTS = 4096
"""Elements of a state that one program copies."""


@triton.jit
def _gather_kernel(  # type: ignore[no-untyped-def]
    query,
    slots,
    reads,
    A_log,
    q,
    k,
    v,
    g,
    b,
    query_token_stride,
    query_head_stride,
    key_pages,
    value_pages,
    gate_pages,
    PAGE_STRIDE: tl.constexpr,
    KV_HEAD_STRIDE: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    GATES: tl.constexpr,
    HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    KEEPS_DECAY: tl.constexpr,
    DECAY_FROM_RATE: tl.constexpr,
    RATE_ON_VALUE: tl.constexpr,
    L2_EPS: tl.constexpr,
    BLOCK_GROUP: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """One program a KV head and absorbed token."""
    index = tl.program_id(0).to(tl.int64)
    kv_head = tl.program_id(1)
    slot = tl.load(slots + index)
    token = tl.load(reads + index).to(tl.int64)
    key_place, value_place, gate_place = token_in_pages(
        key_pages,
        value_pages,
        gate_pages,
        slot // BLOCK_SIZE,
        slot % BLOCK_SIZE,
        kv_head,
        PAGE_STRIDE,
        KV_HEAD_STRIDE,
        HEAD_SIZE,
        GATES,
    )
    d = tl.arange(0, BLOCK_D)
    i = tl.arange(0, BLOCK_GROUP)
    in_d = d < HEAD_SIZE
    in_group = i < GROUP
    in_head = tl.minimum(i, GROUP - 1)
    head = kv_head * GROUP + in_head
    key = tl.load(key_place + d, mask=in_d, other=0.0).to(tl.float32)
    value = tl.load(value_place + d, mask=in_d, other=0.0).to(tl.float32)
    decay, rate = decay_and_rate(gate_place + in_head * (GATES // GROUP), A_log, head, KEEPS_DECAY, DECAY_FROM_RATE)
    mask = in_group[:, None] & in_d[None, :]
    where = query + token * query_token_stride + head[:, None] * query_head_stride + d[None, :]
    # Tokens that are absorbed again have no query; what is read for it is not looked at.
    x = tl.load(where, mask=mask & (in_head < tl.where(token >= 0, GROUP, 0))[:, None], other=0.0).to(tl.float32)

    x *= tl.rsqrt(tl.sum(x * x, 1) + L2_EPS)[:, None]
    key *= tl.rsqrt(tl.sum(key * key, 0) + L2_EPS)
    keys = tl.broadcast_to(key[None, :], (BLOCK_GROUP, BLOCK_D))
    values = tl.broadcast_to(value[None, :], (BLOCK_GROUP, BLOCK_D))
    if RATE_ON_VALUE:
        values *= rate[:, None]
    to = (index * HEADS + head)[:, None] * HEAD_SIZE + d[None, :]
    tl.store(q + to, x.to(q.dtype.element_ty), mask=mask)
    tl.store(k + to, keys.to(k.dtype.element_ty), mask=mask)
    tl.store(v + to, values.to(v.dtype.element_ty), mask=mask)
    tl.store(g + index * HEADS + head, decay, mask=in_group)
    tl.store(b + index * HEADS + head, rate, mask=in_group)


def gather_stretches(
    query: torch.Tensor,
    pages: WindowPages,
    plan: PrefillPlan,
    *,
    memory: MemorySpec,
    A_log: torch.Tensor | None = None,
) -> tuple[torch.Tensor, ...]:
    """Gather what the chunk kernels take, packed: absorbed tokens and the queries that read after them. One launch.

    Args:
        query: ``[num_tokens, H, D]``, contiguous in ``D``, the batch's memory queries.
        pages: the layer's window pages.
        plan: of this step.
        memory: which memory.
        A_log: ``[H]`` float32, where the decay is made of the rate.

    Returns:
        ``q``, ``k``, ``v`` ``[N, H, D]`` in the dtype of ``query``: ``q`` and ``k`` l2-normalised, ``k`` and ``v``
        repeated for the query heads of a group; ``v`` times the rate if there is no delta rule. ``g`` and ``b``
        ``[N, H]`` float32.

    Raises:
        ValueError: shapes, dtypes or strides do not agree.
    """
    group = pages.group_of(query)
    check_gates(memory, pages.layout.gates_per_kv_head, group, A_log)
    num_tokens, (heads, head_size) = len(plan.slots), query.shape[1:]
    q, k, v = query.new_empty((3, num_tokens, heads, head_size)).unbind()
    g, b = query.new_empty((2, num_tokens, heads), dtype=torch.float32).unbind()
    block_group, block_d = triton.next_power_of_2(group), triton.next_power_of_2(head_size)
    _gather_kernel[(num_tokens, heads // group)](
        query,
        plan.slots,
        plan.reads,
        A_log,
        q,
        k,
        v,
        g,
        b,
        query.stride(0),
        query.stride(1),
        **window_page_arguments(pages),
        HEADS=heads,
        GROUP=group,
        KEEPS_DECAY=memory.keeps_decay,
        DECAY_FROM_RATE=memory.decay_from_rate,
        RATE_ON_VALUE=not memory.delta,
        L2_EPS=L2_EPS,
        BLOCK_GROUP=block_group,
        BLOCK_D=block_d,
        num_warps=min(max(block_group * block_d // 256, 1), 8),
    )
    return q, k, v, g, b


@triton.jit
def _copy_states_kernel(  # type: ignore[no-untyped-def]
    states,
    requests,
    slots,
    columns,
    state_table,
    state_table_stride,
    STATE_PAGE_STRIDE: tl.constexpr,
    COLUMNS_PER_PAGE: tl.constexpr,
    COLUMN_SIZE: tl.constexpr,
    PAGES_PER_SLOT: tl.constexpr,
    HEADS: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    TO_PAGES: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """One program a tile of a state's columns, all heads' after one another, and stretch."""
    stretch = tl.program_id(1).to(tl.int64)
    request = tl.load(requests + stretch).to(tl.int64)
    slot = tl.load(slots + stretch)
    d = tl.arange(0, BLOCK_D)
    column = tl.program_id(0) * BLOCK_V + tl.arange(0, BLOCK_V)
    in_state = column < HEADS * HEAD_SIZE
    place = columns_in_pages(
        columns,
        state_table,
        request,
        tl.maximum(slot, 0),
        column,
        in_state,
        state_table_stride,
        STATE_PAGE_STRIDE,
        COLUMNS_PER_PAGE,
        COLUMN_SIZE,
        PAGES_PER_SLOT,
    )
    place = place[:, None] + d[None, :]
    packed = states + (stretch * HEADS * HEAD_SIZE + column)[:, None] * HEAD_SIZE + d[None, :]
    mask = in_state[:, None] & (d < HEAD_SIZE)[None, :]
    if TO_PAGES:
        tl.store(place, tl.load(packed, mask=mask).to(columns.dtype.element_ty), mask=mask)
    else:
        known = column < tl.where(slot >= 0, HEADS * HEAD_SIZE, 0)  # a fresh state is zero
        state = tl.load(place, mask=mask & known[:, None], other=0.0)
        tl.store(packed, state.to(tl.float32), mask=mask)


def _copy_states(
    states: torch.Tensor, pages: StatePages, state_table: torch.Tensor, plan: PrefillPlan, *, to_pages: bool
) -> None:
    stretches, heads, head_size, _ = states.shape
    pages.check(state_table, heads, head_size)
    if not states.is_contiguous():
        raise ValueError(f"states must be contiguous, got strides {states.stride()}")
    block_d = triton.next_power_of_2(head_size)
    block_v = min(TILE_ELEMENTS // block_d, block_d)
    _copy_states_kernel[(triton.cdiv(heads * head_size, block_v), stretches)](
        states,
        plan.requests,
        plan.targets if to_pages else plan.sources,
        **state_page_arguments(pages, state_table),
        HEADS=heads,
        HEAD_SIZE=head_size,
        TO_PAGES=to_pages,
        BLOCK_D=block_d,
        BLOCK_V=block_v,
        num_warps=4,
    )


def gather_states(pages: StatePages, state_table: torch.Tensor, plan: PrefillPlan) -> torch.Tensor:
    """Read the states that the plan's stretches begin with, ``[R, H, D_v, D_k]`` float32, zero where fresh. One launch.

    Args:
        pages: the layer's state pages, float32 or bfloat16.
        state_table: ``[num_requests, >= num_slots * num_pages]`` int32, the state group's block table.
        plan: of this step.

    Raises:
        ValueError: the table is too narrow for a state.
    """
    heads, size = pages.layout.num_heads, pages.layout.head_size
    states = torch.empty((len(plan.lengths), heads, size, size), dtype=torch.float32, device=pages.columns.device)
    _copy_states(states, pages, state_table, plan, to_pages=False)
    return states


def scatter_states(states: torch.Tensor, pages: StatePages, state_table: torch.Tensor, plan: PrefillPlan) -> None:
    """Write ``states [R, H, D_v, D_k]``, contiguous, where the plan's stretches end. One launch.

    The other arguments and what is raised are those of :func:`gather_states`.
    """
    _copy_states(states, pages, state_table, plan, to_pages=True)
