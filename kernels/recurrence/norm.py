"""L2 normalisation of the memory's queries and keys."""

import torch


def l2_normalize(x: torch.Tensor, eps: float = 1e-6) -> torch.Tensor:
    """``x * rsqrt(sum(x^2, -1) + eps)``.

    ``x`` is ``[..., D]`` of any float dtype. Computed and returned in float32 (float64 stays float64), so
    that a zero row gives zeros and a half-precision input loses nothing more.
    """
    x = x if x.dtype == torch.float64 else x.float()
    return x * torch.rsqrt(x.square().sum(-1, keepdim=True) + eps)
