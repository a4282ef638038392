"""L2 normalisation of the memory's queries and keys."""

import torch

L2_EPS = 1e-6
"""Beside the sum of squares: zeros stay zeros."""


def l2_normalize(x: torch.Tensor, eps: float = L2_EPS) -> torch.Tensor:
    """Return ``x * rsqrt(sum(x^2, -1) + eps)`` of ``x [..., D]``, any float dtype.

    Computed and returned in float32 (float64 stays float64), so that a half-precision input loses nothing more.
    """
    x = x if x.dtype == torch.float64 else x.float()
    return x * torch.rsqrt(torch.linalg.vector_norm(x, dim=-1, keepdim=True).square() + eps)
