"""One token a sequence, batched over sequences: decode."""

import torch

from .shapes import check_sequence, compute_dtype


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

    Shapes: ``q [B, H, Dk]``, ``k [B, Hkv, Dk]``, ``v [B, Hkv, Dv]``, ``g`` and ``b`` ``[B, H]``,
    ``state [B, H, Dk, Dv]``. Returns ``o [B, H, Dv]`` and the new state, float32 (float64 where ``q``, ``k``
    or ``v`` is). The given state is not changed. Raises ``ValueError`` for shapes that do not agree.
    """
    check_sequence(q[:, None], k[:, None], v[:, None], g[:, None], b[:, None], state)
    dtype = compute_dtype(q, k, v)
    batch, heads, key_dim = q.shape
    kv_heads, value_dim = k.shape[1], v.shape[-1]
    group = heads // kv_heads
    memory = state.to(dtype).reshape(batch, kv_heads, group, key_dim, value_dim)
    q = q.to(dtype).reshape(batch, kv_heads, group, 1, key_dim)
    k = k.to(dtype).reshape(batch, kv_heads, 1, 1, key_dim)
    v = v.to(dtype).reshape(batch, kv_heads, 1, 1, value_dim)
    decay = g.to(dtype).exp().reshape(batch, kv_heads, group, 1, 1)
    rate = b.to(dtype).reshape(batch, kv_heads, group, 1, 1)
    if delta:
        # k is read from the undecayed state: the decay is a scalar, and scaling the read-out is cheaper.
        v = v - decay * (k @ memory)
    new_state = (memory * decay).addcmul_(k.transpose(-1, -2), rate * v)
    o = scale * (q @ new_state)
    return o.reshape(batch, heads, value_dim), new_state.reshape(batch, heads, key_dim, value_dim)
