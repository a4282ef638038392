"""One token a sequence, batched over sequences: decode."""

import torch

from vllm_ahn.kernels.recurrence.shapes import check_sequence, compute_dtype


def recurrent_step(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor,
    b: torch.Tensor,
    scale: float,
    delta: bool,
    state: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Absorb one token in each of ``B`` states, then read them.

    Args:
        q: ``[B, H, Dk]``, any float dtype, as all others.
        k: ``[B, Hkv, Dk]``; ``H`` is a multiple of ``Hkv``.
        v: ``[B, Hkv, Dv]``.
        g: ``[B, H]``, logarithm of the decay.
        b: ``[B, H]``, the rate.
        scale: factor on what is read.
        delta: whether the delta rule applies.
        state: ``[B, H, Dk, Dv]``, not changed.

    Returns:
        ``o [B, H, Dv]`` and the new state, both float32, or float64 where ``q``, ``k`` or ``v`` is.

    Raises:
        ValueError: shapes do not agree.
    """
    check_sequence(q[:, None], k[:, None], v[:, None], g[:, None], b[:, None], state)
    dtype = compute_dtype(q, k, v)
    batch, heads, key_dim = q.shape
    kv_heads, value_dim = k.shape[1], v.shape[-1]
    group = heads // kv_heads
    by_group = state.to(dtype).reshape(batch, kv_heads, group, key_dim, value_dim)
    q = q.to(dtype).reshape(batch, kv_heads, group, 1, key_dim)
    k = k.to(dtype).reshape(batch, kv_heads, 1, 1, key_dim)
    v = v.to(dtype).reshape(batch, kv_heads, 1, 1, value_dim)
    decay = g.to(dtype).exp().reshape(batch, kv_heads, group, 1, 1)
    rate = b.to(dtype).reshape(batch, kv_heads, group, 1, 1)
    if delta:
        # k is read from the undecayed state: the decay is a scalar, and scaling the read-out is cheaper.
        v = v - decay * (k @ by_group)
    new_state = (by_group * decay).addcmul_(k.transpose(-1, -2), rate * v)
    o = scale * (q @ new_state)
    return o.reshape(batch, heads, value_dim), new_state.reshape(batch, heads, key_dim, value_dim)
