"""Writing new tokens into the window pages: keys, values and gates in one launch."""

import torch
import triton
import triton.language as tl


@triton.jit
def _write_kernel(  # type: ignore[no-untyped-def]
    key,
    value,
    gates,
    slots,
    key_pages,
    value_pages,
    gate_pages,
    key_token_stride,
    key_head_stride,
    value_token_stride,
    value_head_stride,
    page_stride,
    plane_stride,
    BLOCK_SIZE: tl.constexpr,
    KV_HEADS: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    GATES: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_G: tl.constexpr,
):
    """One program a token."""
    token = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots + token).to(tl.int64)
    if slot < 0:
        return
    offset = slot % BLOCK_SIZE
    head = tl.arange(0, BLOCK_H).to(tl.int64)[:, None]
    planes = slot // BLOCK_SIZE * page_stride + head * plane_stride

    d = tl.arange(0, BLOCK_D)[None, :]
    mask = (head < KV_HEADS) & (d < HEAD_SIZE)
    k = tl.load(key + token * key_token_stride + head * key_head_stride + d, mask=mask)
    v = tl.load(value + token * value_token_stride + head * value_head_stride + d, mask=mask)
    where = planes + offset * HEAD_SIZE + d
    tl.store(key_pages + where, k.to(key_pages.dtype.element_ty), mask=mask)
    tl.store(value_pages + where, v.to(value_pages.dtype.element_ty), mask=mask)
    if GATES > 0:
        i = tl.arange(0, BLOCK_G)[None, :]
        mask = (head < KV_HEADS) & (i < GATES)
        gate = tl.load(gates + (token * KV_HEADS + head) * GATES + i, mask=mask)
        tl.store(gate_pages + planes + offset * GATES + i, gate.to(gate_pages.dtype.element_ty), mask=mask)


def write_window_pages(
    key: torch.Tensor,
    value: torch.Tensor,
    gates: torch.Tensor | None,
    slots: torch.Tensor,
    key_pages: torch.Tensor,
    value_pages: torch.Tensor,
    gate_pages: torch.Tensor,
) -> None:
    """Store new tokens in their slots.

    Args:
        key: ``[num_tokens, Hkv, D]``, after RoPE; contiguous in ``D``.
        value: shaped like ``key``.
        gates: ``[num_tokens, H, num_gates]`` float32, contiguous, or None for a layer without memory.
        slots: ``[num_slots]`` integer, ``num_slots <= num_tokens``: page id times block size plus offset; -1 for
            padding, which is not stored.
        key_pages: ``[num_blocks, Hkv, block_size, D]``, as :class:`~vllm_ahn.cache.page.WindowPages` has them: planes
            are contiguous, the first two axes may have any stride.
        value_pages: likewise.
        gate_pages: ``[num_blocks, Hkv, block_size, H / Hkv * num_gates]``, likewise.
    """
    check_window_pages(key_pages, value_pages, gate_pages)
    kv_heads, block_size, head_size = key_pages.shape[1:]
    if key.shape[1:] != (kv_heads, head_size) or value.shape != key.shape:
        raise ValueError(f"key and value must be [T, {kv_heads}, {head_size}], got {key.shape} and {value.shape}")
    if key.stride(2) != 1 or value.stride(2) != 1:
        raise ValueError("heads of key and value must be contiguous")
    if gates is not None and (not gates.is_contiguous() or gates[0].numel() != kv_heads * gate_pages.shape[3]):
        raise ValueError(f"gates must be contiguous, {kv_heads * gate_pages.shape[3]} a token, got {gates.shape}")
    if len(slots) == 0:
        return
    block_h, block_d = triton.next_power_of_2(kv_heads), triton.next_power_of_2(head_size)
    num_gates = 0 if gates is None else gate_pages.shape[3]
    _write_kernel[(len(slots),)](
        key,
        value,
        gates,
        slots,
        key_pages,
        value_pages,
        gate_pages,
        key.stride(0),
        key.stride(1),
        value.stride(0),
        value.stride(1),
        key_pages.stride(0),
        key_pages.stride(1),
        BLOCK_SIZE=block_size,
        KV_HEADS=kv_heads,
        HEAD_SIZE=head_size,
        GATES=num_gates,
        BLOCK_H=block_h,
        BLOCK_D=block_d,
        BLOCK_G=triton.next_power_of_2(max(num_gates, 1)),
        num_warps=min(max(block_h * block_d // 256, 1), 8),
    )


def check_window_pages(key_pages: torch.Tensor, value_pages: torch.Tensor, gate_pages: torch.Tensor) -> None:
    """Raise ``ValueError`` unless the three are planes of the same window pages."""
    if value_pages.shape != key_pages.shape or gate_pages.shape[:3] != key_pages.shape[:3]:
        raise ValueError(f"planes {key_pages.shape}, {value_pages.shape}, {gate_pages.shape} are not of the same pages")
    for name, planes in (("keys", key_pages), ("values", value_pages), ("gates", gate_pages)):
        strides = (*key_pages.stride()[:2], planes.shape[3], 1)
        # The stride of an axis of size 1 means nothing, and PyTorch gives it any value; pages without gates have none.
        if planes.numel() and any(
            n > 1 and a != b for n, a, b in zip(planes.shape, planes.stride(), strides, strict=True)
        ):
            raise ValueError(f"{name} of shape {planes.shape} and strides {planes.stride()} are not planes of pages")
