"""Inverse of unit lower triangular matrices, for many small matrices at once."""

from typing import Any

import torch

BASE = 8
"""Below this size one call of the library's triangular solver is faster than further halving."""


def _invert(strict: torch.Tensor) -> torch.Tensor:
    """Return ``inv(I + strict)`` for ``strict [N, C, C]``, of which only the strictly lower part is read."""
    batch, size, _ = strict.shape
    blocks = -(-size // BASE)
    inverse = torch.zeros_like(strict, memory_format=torch.contiguous_format)
    if size % BASE:
        inverse.diagonal(dim1=1, dim2=2).fill_(1.0)
        ends = [(i * BASE, min(size, (i + 1) * BASE)) for i in range(blocks)]
        for start, end in ends:
            eye = inverse[:, start:end, start:end].clone()
            inverse[:, start:end, start:end] = _solve(strict[:, start:end, start:end], eye)
    else:
        shape = (batch, blocks, BASE, blocks, BASE)
        diagonal = strict.reshape(shape).diagonal(dim1=1, dim2=3).permute(0, 3, 1, 2)
        eye = torch.eye(BASE, dtype=strict.dtype, device=strict.device)
        solved = _solve(diagonal, eye.expand(diagonal.shape))
        inverse.view(shape).diagonal(dim1=1, dim2=3).copy_(solved.permute(0, 2, 3, 1))
    width = BASE
    while width < size:
        # [[L11, 0], [L21, L22]]^-1 = [[X11, 0], [-X22 L21 X11, X22]] with X = L^-1 of the halves.
        for start in range(0, size - width, 2 * width):
            middle, end = start + width, min(size, start + 2 * width)
            low = torch.bmm(strict[:, middle:end, start:middle], inverse[:, start:middle, start:middle])
            corner = torch.bmm(inverse[:, middle:end, middle:end], low)
            inverse[:, middle:end, start:middle] = corner.neg_()
        width *= 2
    return inverse


def _solve(matrix: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    return torch.linalg.solve_triangular(matrix, right, upper=False, unitriangular=True)


class _UnitLowerInverse(torch.autograd.Function):
    """`_invert` writes its blocks in place, which autograd cannot follow; its derivative is short."""

    @staticmethod
    def forward(ctx: Any, strict: torch.Tensor) -> torch.Tensor:
        inverse = _invert(strict)
        ctx.save_for_backward(inverse)
        return inverse

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
        (inverse,) = ctx.saved_tensors
        transposed = inverse.transpose(1, 2)
        return -torch.bmm(transposed, torch.bmm(grad, transposed)).tril(-1)


def unit_lower_inverse(strict: torch.Tensor) -> torch.Tensor:
    """Return the inverse of ``I + strict`` for a batch of strictly lower triangular matrices.

    Halves are inverted and joined, which is forward substitution in blocks: as stable as substitution, unlike the
    series ``I - A + A^2 - ...``, whose terms grow like binomials when keys repeat.

    Args:
        strict: ``[N, C, C]``, float32 or float64; its diagonal and upper part are never read.

    Returns:
        ``[N, C, C]``, unit lower triangular, differentiable once.
    """
    return _UnitLowerInverse.apply(strict)
