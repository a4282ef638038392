"""From pages to what chunk kernels take, and back: absorbed tokens, the queries that read after them, and states."""

import torch
import triton
import triton.language as tl

from .cache_write import check_window_pages
from .gates import check_memory, decay_and_rate
from .prefill_plan import PrefillPlan

TILE_ELEMENTS = 4096
"""Elements of a state that one program copies."""


@triton.jit
def _gather_kernel(  # type: ignore[no-untyped-def]
    query,
    key_pages,
    value_pages,
    gate_pages,
    slots,
    rows,
    A_log,
    q,
    k,
    v,
    g,
    b,
    query_token_stride,
    query_head_stride,
    page_stride,
    plane_stride,
    HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    GATES: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    MEMORY: tl.constexpr,
    BLOCK_GROUP: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """One program a KV head and token."""
    token = tl.program_id(0).to(tl.int64)
    kv_head = tl.program_id(1)
    slot = tl.load(slots + token)
    row = tl.load(rows + token).to(tl.int64)
    plane = slot // BLOCK_SIZE * page_stride + kv_head.to(tl.int64) * plane_stride
    offset = slot % BLOCK_SIZE
    d = tl.arange(0, BLOCK_D)
    i = tl.arange(0, BLOCK_GROUP)
    in_d = d < HEAD_SIZE
    in_group = i < GROUP
    head = kv_head * GROUP + tl.minimum(i, GROUP - 1)
    key = tl.load(key_pages + plane + offset * HEAD_SIZE + d, mask=in_d, other=0.0).to(tl.float32)
    value = tl.load(value_pages + plane + offset * HEAD_SIZE + d, mask=in_d, other=0.0).to(tl.float32)
    gates = gate_pages + plane + offset * GATES + tl.minimum(i, GROUP - 1) * (GATES // GROUP)
    decay, rate = decay_and_rate(gates, A_log, head, MEMORY)
    mask = in_group[:, None] & in_d[None, :]
    where = query + row * query_token_stride + head[:, None] * query_head_stride + d[None, :]
    x = tl.load(where, mask=mask, other=0.0).to(tl.float32)

    x *= tl.rsqrt(tl.sum(x * x, 1) + 1e-6)[:, None]
    key *= tl.rsqrt(tl.sum(key * key, 0) + 1e-6)
    keys = tl.broadcast_to(key[None, :], (BLOCK_GROUP, BLOCK_D))
    values = tl.broadcast_to(value[None, :], (BLOCK_GROUP, BLOCK_D))
    if MEMORY == "Mamba2":  # without the delta rule the rate is a factor of the value
        values *= rate[:, None]
    to = (token * HEADS + head)[:, None] * HEAD_SIZE + d[None, :]
    tl.store(q + to, x.to(q.dtype.element_ty), mask=mask)
    tl.store(k + to, keys.to(k.dtype.element_ty), mask=mask)
    tl.store(v + to, values.to(v.dtype.element_ty), mask=mask)
    tl.store(g + token * HEADS + head, decay, mask=in_group)
    tl.store(b + token * HEADS + head, rate, mask=in_group)


def gather_stretches(
    query: torch.Tensor,
    key_pages: torch.Tensor,
    value_pages: torch.Tensor,
    gate_pages: torch.Tensor,
    plan: PrefillPlan,
    *,
    memory: str,
    A_log: torch.Tensor | None = None,
) -> tuple[torch.Tensor, ...]:
    """What the chunk kernels take, packed: absorbed tokens and the queries that read after them. One launch.

    Args:
        query: ``[num_tokens, H, D]``, contiguous in ``D``, the batch's memory queries.
        key_pages, value_pages, gate_pages: the planes of the window pages, see :func:`.write_window_pages`.
        plan: of this step.
        memory: ``GatedDeltaNet``, ``DeltaNet`` or ``Mamba2``.
        A_log: ``[H]`` float32, for Mamba2.

    Returns:
        ``q``, ``k``, ``v`` ``[N, H, D]`` in the dtype of ``query``: ``q`` and ``k`` l2-normalised, ``k`` and ``v``
        repeated for the query heads of a group, ``v`` times the rate for Mamba2. ``g`` and ``b`` ``[N, H]`` float32.
    """
    check_window_pages(key_pages, value_pages, gate_pages)
    kv_heads, block_size, head_size = key_pages.shape[1:]
    heads, num_tokens = query.shape[1], len(plan.slots)
    group = heads // kv_heads
    if query.shape[1:] != (group * kv_heads, head_size) or query.stride(2) != 1:
        raise ValueError(f"query must be [T, a multiple of {kv_heads}, {head_size}], contiguous, got {query.shape}")
    check_memory(memory, A_log, gate_pages.shape[3], group)
    q, k, v = query.new_empty((3, num_tokens, heads, head_size)).unbind()
    g, b = query.new_empty((2, num_tokens, heads), dtype=torch.float32).unbind()
    block_group, block_d = triton.next_power_of_2(group), triton.next_power_of_2(head_size)
    _gather_kernel[(num_tokens, kv_heads)](
        query,
        key_pages,
        value_pages,
        gate_pages,
        plan.slots,
        plan.rows,
        A_log,
        q,
        k,
        v,
        g,
        b,
        query.stride(0),
        query.stride(1),
        key_pages.stride(0),
        key_pages.stride(1),
        HEADS=heads,
        GROUP=group,
        GATES=gate_pages.shape[3],
        HEAD_SIZE=head_size,
        BLOCK_SIZE=block_size,
        MEMORY=memory,
        BLOCK_GROUP=block_group,
        BLOCK_D=block_d,
        num_warps=min(max(block_group * block_d // 256, 1), 8),
    )
    return q, k, v, g, b


@triton.jit
def _copy_states_kernel(  # type: ignore[no-untyped-def]
    states,
    columns,
    state_table,
    requests,
    fresh,
    page_stride,
    table_stride,
    HEADS: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    COLUMNS_PER_PAGE: tl.constexpr,
    TO_PAGES: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """One program a tile of a state's columns, all heads' after one another, and stretch."""
    stretch = tl.program_id(1).to(tl.int64)
    request = tl.load(requests + stretch).to(tl.int64)
    d = tl.arange(0, BLOCK_D)
    column = tl.program_id(0) * BLOCK_V + tl.arange(0, BLOCK_V)
    in_state = column < HEADS * HEAD_SIZE
    page = tl.load(state_table + request * table_stride + column // COLUMNS_PER_PAGE, mask=in_state, other=0)
    place = page.to(tl.int64) * page_stride + column % COLUMNS_PER_PAGE * HEAD_SIZE
    place = columns + place[:, None] + d[None, :]
    packed = states + (stretch * HEADS * HEAD_SIZE + column)[:, None] * HEAD_SIZE + d[None, :]
    mask = in_state[:, None] & (d < HEAD_SIZE)[None, :]
    if TO_PAGES:
        tl.store(place, tl.load(packed, mask=mask).to(columns.dtype.element_ty), mask=mask)
    else:
        known = column < tl.where(tl.load(fresh + stretch) == 0, HEADS * HEAD_SIZE, 0)
        state = tl.load(place, mask=mask & known[:, None], other=0.0)
        tl.store(packed, state.to(tl.float32), mask=mask)


def _copy_states(
    states: torch.Tensor, columns: torch.Tensor, state_table: torch.Tensor, plan: PrefillPlan, *, to_pages: bool
) -> None:
    stretches, heads, head_size, _ = states.shape
    if columns.shape[2] != head_size or columns.stride()[1:] != (head_size, 1) or not states.is_contiguous():
        raise ValueError(
            f"columns must be [num_blocks, columns, {head_size}] contiguous in a page, got {columns.shape}"
        )
    if state_table.shape[1] * columns.shape[1] < heads * head_size:
        raise ValueError(f"{state_table.shape[1]} pages of {columns.shape[1]} columns are no state of {heads} heads")
    block_d = triton.next_power_of_2(head_size)
    block_v = min(TILE_ELEMENTS // block_d, block_d)
    _copy_states_kernel[(triton.cdiv(heads * head_size, block_v), stretches)](
        states,
        columns,
        state_table,
        plan.requests,
        plan.fresh,
        columns.stride(0),
        state_table.stride(0),
        HEADS=heads,
        HEAD_SIZE=head_size,
        COLUMNS_PER_PAGE=columns.shape[1],
        TO_PAGES=to_pages,
        BLOCK_D=block_d,
        BLOCK_V=block_v,
        num_warps=4,
    )


def gather_states(columns: torch.Tensor, state_table: torch.Tensor, heads: int, plan: PrefillPlan) -> torch.Tensor:
    """States of the plan's requests, ``[R, H, D_v, D_k]`` float32, zero where fresh. One launch.

    Args:
        columns: ``[num_blocks, columns_per_page, D]`` float32 or bfloat16, the state pages.
        state_table: ``[num_requests, >= num_pages]`` int32, the state group's block table.
        heads: ``H``.
        plan: of this step.
    """
    head_size = columns.shape[2]
    states = torch.empty((len(plan.lengths), heads, head_size, head_size), device=columns.device)
    _copy_states(states, columns, state_table, plan, to_pages=False)
    return states


def scatter_states(states: torch.Tensor, columns: torch.Tensor, state_table: torch.Tensor, plan: PrefillPlan) -> None:
    """The reverse of :func:`gather_states`: ``states [R, H, D_v, D_k]``, contiguous, to their pages. One launch."""
    _copy_states(states, columns, state_table, plan, to_pages=True)
