"""Read-out: norm, gate and per-head output projection of what was read, added onto the attention output."""

import torch
import triton
import triton.language as tl

from vllm_ahn.memory.spec import NORM_EPS

BLOCK_N = 16
"""Reads that share a load of the projection's weight: the fewest rows that matrix units take."""


@triton.jit(do_not_specialize=["num_reads"])
def _read_out_kernel(  # type: ignore[no-untyped-def]
    o,
    z,
    reads,
    norm_weight,
    o_proj,
    squares,
    router,
    output,
    num_reads,
    z_stride,
    output_token_stride,
    output_head_stride,
    norm_size,
    eps,
    HEADS: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    NORM_ALL_HEADS: tl.constexpr,
    ROUTED: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
):
    """One program a block of output columns, head and block of reads."""
    head = tl.program_id(1)
    read = tl.program_id(2).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    token = tl.load(reads + read, mask=read < num_reads, other=-1)
    active = token >= 0
    if tl.max(token, 0) < 0:
        return
    token = token.to(tl.int64)
    d = tl.arange(0, BLOCK_D)
    j = tl.program_id(0) * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
    in_d = d < HEAD_SIZE
    in_j = j < HEAD_SIZE
    weight = tl.load(
        o_proj + (head * HEAD_SIZE + d)[:, None] * HEAD_SIZE + j[None, :],
        mask=in_d[:, None] & in_j[None, :],
        other=0.0,
    )
    y = tl.load(
        o + ((read * HEADS + head) * HEAD_SIZE)[:, None] + d[None, :],
        mask=active[:, None] & in_d[None, :],
        other=0.0,
    ).to(tl.float32)
    gate = tl.load(z + token * z_stride + head, mask=active, other=0.0).to(tl.float32)
    gate *= tl.sigmoid(gate)
    if NORM_ALL_HEADS:
        sums = tl.load(squares + read, mask=active, other=0.0)
        norm = tl.load(norm_weight + head * HEAD_SIZE + d, mask=in_d, other=0.0).to(tl.float32)
    else:
        sums = tl.sum(y * y, 1)
        norm = tl.load(norm_weight + d, mask=in_d, other=0.0).to(tl.float32)
    factor = gate * tl.rsqrt(sums / norm_size + eps)
    y *= factor[:, None] * norm[None, :]
    # Half-precision products are exact in float32; float32 ones are not to be rounded to TF32.
    m = tl.dot(y.to(weight.dtype), weight, input_precision="ieee")
    if ROUTED:
        m *= tl.load(router + read * HEADS + head, mask=active, other=0.0)[:, None]
    where = output + (token * output_token_stride + head * output_head_stride)[:, None] + j[None, :]
    mask = active[:, None] & in_j[None, :]
    attention = tl.load(where, mask=mask, other=0.0).to(tl.float32)
    tl.store(where, (attention + m).to(output.dtype.element_ty), mask=mask)


def read_out(
    o: torch.Tensor,
    z: torch.Tensor,
    reads: torch.Tensor,
    norm_weight: torch.Tensor,
    o_proj: torch.Tensor,
    output: torch.Tensor,
    *,
    squares: torch.Tensor | None = None,
    norm_size: int | None = None,
    router: torch.Tensor | None = None,
    eps: float = NORM_EPS,
) -> None:
    """Add ``m[h] = (norm(o)[h] silu(z[h])) @ o_proj[h]`` onto the attention output, in one launch.

    A memory normalises ``o`` head by head, or ``o silu(z)`` over the heads of all ranks (``norm_all_heads`` of its
    spec): then ``squares`` and ``norm_size`` are passed. As the gate is one scalar a head, both are one formula with
    different sums.

    Args:
        o: ``[num_reads, H, D]`` of any float dtype, contiguous, from the recurrence.
        z: ``[num_tokens, H]`` of any float dtype, read-out gates of the batch, contiguous in ``H``.
        reads: ``[num_reads]`` int32, the batch's token that read; -1: nothing was read, nothing is touched.
        norm_weight: ``[D]``, or ``[H * D]`` with ``squares``; any float dtype, contiguous.
        o_proj: ``[H, D, D]`` in the model dtype, ``[head, in, out]``, contiguous.
        output: ``[num_tokens, H, D]`` in the model dtype, contiguous in ``D``; updated.
        squares: ``[num_reads]`` float32, ``sum((o silu(z))^2)`` over the heads of all ranks, see
            :func:`gated_squares`.
        norm_size: with ``squares``, the number of elements that were summed.
        router: ``[num_reads, H]`` float32, contiguous, weights of ``m``; None for 1.
        eps: of the memory's norm.

    Raises:
        ValueError: shapes or strides do not agree.
    """
    num_reads, heads, head_size = o.shape
    if not o.is_contiguous() or len(reads) != num_reads or z.shape[1] != heads or z.stride(1) != 1:
        raise ValueError(f"o {o.shape}, reads {reads.shape} and z {z.shape} must agree and be contiguous")
    if o_proj.shape != (heads, head_size, head_size) or not o_proj.is_contiguous():
        raise ValueError(f"o_proj must be {(heads, head_size, head_size)}, contiguous, got {o_proj.shape}")
    if output.shape[1:] != (heads, head_size) or output.stride(2) != 1:
        raise ValueError(f"output must be [T, {heads}, {head_size}], heads contiguous, got {output.shape}")
    if (squares is None) != (norm_size is None):
        raise ValueError("squares and norm_size go together")
    if norm_weight.numel() != (head_size if squares is None else heads * head_size):
        raise ValueError(f"norm_weight has {norm_weight.numel()} elements for {heads} heads of {head_size}")
    if router is not None and (router.shape != (num_reads, heads) or not router.is_contiguous()):
        raise ValueError(f"router must be {(num_reads, heads)}, contiguous, got {router.shape}")
    if num_reads == 0:
        return
    block_d = triton.next_power_of_2(head_size)
    block_out = min(block_d, 64)
    grid = (triton.cdiv(head_size, block_out), heads, triton.cdiv(num_reads, BLOCK_N))
    _read_out_kernel[grid](
        o,
        z,
        reads,
        norm_weight,
        o_proj,
        squares,
        router,
        output,
        num_reads,
        z.stride(0),
        output.stride(0),
        output.stride(1),
        float(norm_size or head_size),
        eps,
        HEADS=heads,
        HEAD_SIZE=head_size,
        NORM_ALL_HEADS=squares is not None,
        ROUTED=router is not None,
        BLOCK_N=BLOCK_N,
        BLOCK_D=block_d,
        BLOCK_OUT=block_out,
        num_warps=4,
    )


@triton.jit
def _gated_squares_kernel(  # type: ignore[no-untyped-def]
    o,
    z,
    reads,
    squares,
    z_stride,
    HEADS: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """One program a read."""
    read = tl.program_id(0).to(tl.int64)
    token = tl.load(reads + read).to(tl.int64)
    total = 0.0
    if token >= 0:
        d = tl.arange(0, BLOCK_D)[None, :]
        sums = tl.zeros([BLOCK_H], tl.float32)
        for first in tl.static_range(0, HEADS, BLOCK_H):
            head = first + tl.arange(0, BLOCK_H)
            gate = tl.load(z + token * z_stride + head, mask=head < HEADS, other=0.0).to(tl.float32)
            gate *= tl.sigmoid(gate)
            mask = (head < HEADS)[:, None] & (d < HEAD_SIZE)
            y = tl.load(o + ((read * HEADS + head) * HEAD_SIZE)[:, None] + d, mask=mask, other=0.0).to(tl.float32)
            sums += gate * gate * tl.sum(y * y, 1)
        total += tl.sum(sums, 0)
    tl.store(squares + read, total)


def gated_squares(o: torch.Tensor, z: torch.Tensor, reads: torch.Tensor, squares: torch.Tensor) -> None:
    """Sum the squares of gated reads over the heads of this rank, for a norm over all heads; ranks are then summed.

    Args:
        o, z, reads: as for :func:`read_out`.
        squares: ``[num_reads]`` float32, is written: ``sum((o silu(z))^2)``, or 0 where nothing was read.

    Raises:
        ValueError: shapes or strides do not agree.
    """
    num_reads, heads, head_size = o.shape
    if not o.is_contiguous() or z.shape[1] != heads or z.stride(1) != 1 or squares.shape != reads.shape:
        raise ValueError(f"o {o.shape}, z {z.shape}, reads {reads.shape}, squares {squares.shape} must agree")
    if num_reads == 0:
        return
    block_d = triton.next_power_of_2(head_size)
    _gated_squares_kernel[(num_reads,)](
        o,
        z,
        reads,
        squares,
        z.stride(0),
        HEADS=heads,
        HEAD_SIZE=head_size,
        BLOCK_H=min(triton.next_power_of_2(heads), max(4096 // block_d, 1)),
        BLOCK_D=block_d,
        num_warps=4,
    )
