"""What decoder and memory need: RMS norm, rotary embedding, windowed attention."""

import torch
import torch.nn.functional as F
from torch import nn

QUERY_BLOCKS = (64, 512)
"""Min and max of queries that are attended together; between them as many as one of them has keys."""

FEW_KEYS = 512
"""Max keys of a block for which the probabilities may be kept."""


def at_least_float32(x: torch.Tensor) -> torch.Tensor:
    """Return `x` in float32, or as it is in float64."""
    return x if x.dtype == torch.float64 else x.float()


class RMSNorm(nn.Module):
    """``x * rsqrt(mean(x^2) + eps) * weight`` over the last dimension, computed in float32."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = at_least_float32(x)
        y = y * torch.rsqrt(y.square().mean(-1, keepdim=True) + self.eps)
        return y.to(x.dtype) * self.weight


def rotate(x: torch.Tensor, positions: torch.Tensor, theta: float) -> torch.Tensor:
    """Apply the rotary embedding to ``x [B, T, heads, D]`` at absolute ``positions [T]``; halves are paired.

    Angles are computed in float32 whatever the dtype of `x`, as base models and vLLM do: at position
    100,000 their rounding is part of the model.
    """
    dim = x.shape[-1]
    frequency = theta ** -(torch.arange(0, dim, 2, dtype=torch.float32, device=x.device) / dim)
    angle = positions.float()[:, None, None] * frequency
    cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


def window_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, start: int, window: int | None, sinks: int
) -> torch.Tensor:
    """Attend, by softmax and scale ``D^-1/2``, from ``t = start, ...`` to ``{j <= t: t - j < window or j < sinks}``.

    Queries are taken in blocks, and only the keys that a block can see are touched, so that memory grows with
    ``window + sinks``, not with the square of the length.

    Args:
        q: ``[B, T, H, D]``.
        k, v: ``[B, start + T, Hkv, D]``, every token from position 0.
        start: position of the first query.
        window: tokens that a query sees, its own among them; None for all earlier ones.
        sinks: first tokens that every query sees.

    Returns:
        ``[B, T, H, D]``.
    """
    length = q.shape[1]
    total = start + length
    window = total if window is None else min(window, total)
    sinks = min(sinks, total)
    if start == 0 and window == total:
        return _attend(q, k, v, None)
    min_block, max_block = QUERY_BLOCKS
    block = min(max(window + sinks, min_block), max_block)
    outputs = []
    for first in range(0, length, block):
        last = min(length, first + block)
        low = min(max(start + first - window + 1, sinks), start + last)
        seen = torch.cat((torch.arange(sinks, device=q.device), torch.arange(low, start + last, device=q.device)))
        at = torch.arange(start + first, start + last, device=q.device)[:, None]
        visible = (seen <= at) & ((at - seen < window) | (seen < sinks))
        keys = torch.cat((k[:, :sinks], k[:, low : start + last]), dim=1)
        values = torch.cat((v[:, :sinks], v[:, low : start + last]), dim=1)
        outputs.append(_attend(q[:, first:last], keys, values, visible))
    return torch.cat(outputs, dim=1)


def _attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, visible: torch.Tensor | None) -> torch.Tensor:
    # Each query sees what is `visible` [T, n]; None: as many keys as queries, of which it sees the earlier.
    if visible is not None and _steps_are_faster(q, k):
        return _attend_in_steps(q, k, v, visible)
    group = q.shape[2] // k.shape[2]
    attended = F.scaled_dot_product_attention(
        q.transpose(1, 2),
        k.repeat_interleave(group, dim=2).transpose(1, 2),
        v.repeat_interleave(group, dim=2).transpose(1, 2),
        attn_mask=visible,
        is_causal=visible is None,
    )
    return attended.transpose(1, 2)


def _steps_are_faster(q: torch.Tensor, k: torch.Tensor) -> bool:
    # PyTorch's way back through its fused attention is slow on CPUs in bfloat16, and in nothing else. With more keys,
    # keeping all probabilities takes the time that it saves, and memory that nothing bounds.
    in_training = torch.is_grad_enabled() and q.device.type == "cpu"
    return in_training and q.dtype == torch.bfloat16 and k.shape[1] <= FEW_KEYS


def _attend_in_steps(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, visible: torch.Tensor) -> torch.Tensor:
    # As `_attend`, with all probabilities kept for the gradient.
    batch, length, heads, dim = q.shape
    kv_heads = k.shape[2]
    q = q.unflatten(2, (kv_heads, -1)).permute(0, 2, 3, 1, 4).reshape(batch * kv_heads, -1, dim)
    k = k.permute(0, 2, 3, 1).reshape(batch * kv_heads, dim, -1)
    v = v.transpose(1, 2).reshape(batch * kv_heads, -1, dim)
    scores = torch.bmm(q, k).unflatten(1, (-1, length)) * dim**-0.5
    hidden = torch.zeros_like(visible, dtype=scores.dtype).masked_fill_(~visible, -torch.inf)
    probabilities = (scores + hidden).softmax(-1).flatten(1, 2)
    attended = torch.bmm(probabilities, v).view(batch, heads, length, dim)
    return attended.transpose(1, 2)
