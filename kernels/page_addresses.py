"""Addresses inside pages, for Triton kernels: the layouts of :mod:`vllm_ahn.kernels.pages`, decided here for them all.

A wrapper passes pages to its kernel by :func:`window_page_arguments` and :func:`state_page_arguments`; the kernel takes
arguments of these names and hands them to the helpers below.

Strides are compile-time constants: a model has one of each, and knowing what they are multiples of gives wide loads. A
stride from one page to the next may exceed 32 bits, so block ids are widened before they are multiplied.
"""

from typing import Any

import torch
import triton
import triton.language as tl

from vllm_ahn.kernels.pages import StatePages, WindowPages


def window_page_arguments(pages: WindowPages) -> dict[str, Any]:
    """Return the arguments by which a kernel finds tokens in window pages, by name."""
    # The stride of an axis of size 1 means nothing, and PyTorch gives it any value.
    return {
        "key_pages": pages.keys,
        "value_pages": pages.values,
        "gate_pages": pages.gates,
        "PAGE_STRIDE": pages.pages.stride(0),
        "KV_HEAD_STRIDE": pages.pages.stride(1),
        "BLOCK_SIZE": pages.layout.block_size,
        "HEAD_SIZE": pages.layout.head_size,
        "GATES": pages.layout.gates_per_kv_head,
    }


@triton.jit
def token_in_pages(  # type: ignore[no-untyped-def]
    key_pages,
    value_pages,
    gate_pages,
    block,
    offset,
    kv_head,
    PAGE_STRIDE: tl.constexpr,
    KV_HEAD_STRIDE: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    GATES: tl.constexpr,
):
    """Return pointers to the key, the value and the gates that a KV head keeps of the token at ``offset`` of ``block``.

    ``block``, ``offset`` and ``kv_head`` may be blocks of numbers that broadcast; so are the pointers then.
    """
    head = block.to(tl.int64) * PAGE_STRIDE + kv_head.to(tl.int64) * KV_HEAD_STRIDE
    element = head + offset * HEAD_SIZE
    return key_pages + element, value_pages + element, gate_pages + head + offset * GATES


def state_page_arguments(pages: StatePages, table: torch.Tensor) -> dict[str, Any]:
    """Return the arguments by which a kernel finds columns in state pages, by name.

    Args:
        pages: of one layer.
        table: ``[num_requests, >= num_slots * num_pages]`` int32, the state group's block table.
    """
    return {
        "columns": pages.columns,
        "state_table": table,
        "state_table_stride": table.stride(0),
        "STATE_PAGE_STRIDE": pages.columns.stride(0),
        "COLUMNS_PER_PAGE": pages.columns.shape[1],
        "COLUMN_SIZE": pages.columns.shape[2],
        "PAGES_PER_SLOT": pages.layout.num_pages,
    }


@triton.jit
def columns_in_pages(  # type: ignore[no-untyped-def]
    columns,
    state_table,
    request,
    slot,
    column,
    mask,
    state_table_stride,
    STATE_PAGE_STRIDE: tl.constexpr,
    COLUMNS_PER_PAGE: tl.constexpr,
    COLUMN_SIZE: tl.constexpr,
    PAGES_PER_SLOT: tl.constexpr,
):
    """Return pointers to the beginning of columns of one of a request's states.

    ``column`` is a block of numbers that count columns over all heads, and behind them the kept updates: a tile's may
    lie in two pages or more, so every column finds its own. Where not ``mask`` the pointer is of some column, not to be
    used.
    """
    entry = request * state_table_stride + slot * PAGES_PER_SLOT + column // COLUMNS_PER_PAGE
    page = tl.load(state_table + entry, mask=mask, other=0)
    return columns + page.to(tl.int64) * STATE_PAGE_STRIDE + column % COLUMNS_PER_PAGE * COLUMN_SIZE
