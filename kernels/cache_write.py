"""Writing new tokens into the window pages: keys, values and gates in one launch."""

import torch
import triton
import triton.language as tl

from vllm_ahn.kernels.page_addresses import token_in_pages, window_page_arguments
from vllm_ahn.kernels.pages import WindowPages


@triton.jit
def _write_kernel(  # type: ignore[no-untyped-def]
    key,
    value,
    gates,
    slots,
    key_token_stride,
    key_head_stride,
    value_token_stride,
    value_head_stride,
    key_pages,
    value_pages,
    gate_pages,
    PAGE_STRIDE: tl.constexpr,
    KV_HEAD_STRIDE: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    GATES: tl.constexpr,
    KV_HEADS: tl.constexpr,
    HAS_GATES: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_G: tl.constexpr,
):
    """One program a token."""
    token = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots + token).to(tl.int64)
    if slot < 0:
        return
    head = tl.arange(0, BLOCK_H).to(tl.int64)[:, None]
    key_place, value_place, gate_place = token_in_pages(
        key_pages,
        value_pages,
        gate_pages,
        slot // BLOCK_SIZE,
        slot % BLOCK_SIZE,
        head,
        PAGE_STRIDE,
        KV_HEAD_STRIDE,
        HEAD_SIZE,
        GATES,
    )
    d = tl.arange(0, BLOCK_D)[None, :]
    mask = (head < KV_HEADS) & (d < HEAD_SIZE)
    k = tl.load(key + token * key_token_stride + head * key_head_stride + d, mask=mask)
    v = tl.load(value + token * value_token_stride + head * value_head_stride + d, mask=mask)
    tl.store(key_place + d, k.to(key_pages.dtype.element_ty), mask=mask)
    tl.store(value_place + d, v.to(value_pages.dtype.element_ty), mask=mask)
    if HAS_GATES:
        i = tl.arange(0, BLOCK_G)[None, :]
        mask = (head < KV_HEADS) & (i < GATES)
        gate = tl.load(gates + (token * KV_HEADS + head) * GATES + i, mask=mask)
        tl.store(gate_place + i, gate.to(gate_pages.dtype.element_ty), mask=mask)


def write_window_pages(
    key: torch.Tensor, value: torch.Tensor, gates: torch.Tensor | None, slots: torch.Tensor, pages: WindowPages
) -> None:
    """Store new tokens in their slots.

    Args:
        key: ``[num_tokens, Hkv, D]``, after RoPE; contiguous in ``D``.
        value: shaped like ``key``.
        gates: ``[num_tokens, H, num_gates]`` float32, contiguous, or None for a layer without memory.
        slots: ``[num_slots]`` integer, ``num_slots <= num_tokens``: block id times block size plus offset; -1 for
            padding, which is not stored.
        pages: the layer's window pages, written.

    Raises:
        ValueError: the tokens are not shaped like those of the pages.
    """
    kv_heads, head_size = pages.layout.num_kv_heads, pages.layout.head_size
    gates_per_token = kv_heads * pages.layout.gates_per_kv_head
    if key.shape[1:] != (kv_heads, head_size) or value.shape != key.shape:
        raise ValueError(f"key and value must be [T, {kv_heads}, {head_size}], got {key.shape} and {value.shape}")
    if key.stride(2) != 1 or value.stride(2) != 1:
        raise ValueError("heads of key and value must be contiguous")
    if gates is not None and (not gates.is_contiguous() or gates[0].numel() != gates_per_token):
        raise ValueError(f"gates must be contiguous, {gates_per_token} a token, got {gates.shape}")
    if len(slots) == 0:
        return
    block_h, block_d = triton.next_power_of_2(kv_heads), triton.next_power_of_2(head_size)
    _write_kernel[(len(slots),)](
        key,
        value,
        gates,
        slots,
        key.stride(0),
        key.stride(1),
        value.stride(0),
        value.stride(1),
        **window_page_arguments(pages),
        KV_HEADS=kv_heads,
        HAS_GATES=gates is not None,
        BLOCK_H=block_h,
        BLOCK_D=block_d,
        BLOCK_G=triton.next_power_of_2(max(pages.layout.gates_per_kv_head, 1)),
        num_warps=min(max(block_h * block_d // 256, 1), 8),
    )
