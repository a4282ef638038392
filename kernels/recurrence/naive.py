"""The recurrence token by token: the oracle."""

import torch

from vllm_ahn.kernels.recurrence.shapes import check_sequence, compute_dtype


def naive_recurrence(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor,
    b: torch.Tensor,
    scale: float,
    delta: bool,
    state: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Run the recurrence over ``T`` tokens, one after the other.

    Args:
        q: ``[B, T, H, Dk]``, any float dtype, as all others.
        k: ``[B, T, Hkv, Dk]``; ``H`` is a multiple of ``Hkv``.
        v: ``[B, T, Hkv, Dv]``.
        g: ``[B, T, H]``, logarithm of the decay.
        b: ``[B, T, H]``, the rate.
        scale: factor on what is read.
        delta: whether the delta rule applies.
        state: ``[B, H, Dk, Dv]`` before the first token, not changed; None for zeros.

    Returns:
        ``o [B, T, H, Dv]`` and the state after the last token, both float32, or float64 where ``q``, ``k`` or ``v`` is.

    Raises:
        ValueError: shapes do not agree.
    """
    check_sequence(q, k, v, g, b, state)
    dtype = compute_dtype(q, k, v)
    batch, length, heads, key_dim = q.shape
    group = heads // k.shape[2]
    q, g, b = q.to(dtype), g.to(dtype), b.to(dtype)
    k = k.to(dtype).repeat_interleave(group, dim=2)
    v = v.to(dtype).repeat_interleave(group, dim=2)
    state = q.new_zeros(batch, heads, key_dim, v.shape[-1]) if state is None else state.to(dtype, copy=True)
    outputs = [q.new_zeros(batch, 0, heads, v.shape[-1])]
    for t in range(length):
        state = state * g[:, t].exp()[..., None, None]
        u = v[:, t]
        if delta:
            u = u - torch.einsum("bhkv,bhk->bhv", state, k[:, t])
        u = u * b[:, t, :, None]
        state = state + k[:, t, :, :, None] * u[:, :, None, :]
        outputs.append(scale * torch.einsum("bhkv,bhk->bhv", state, q[:, t])[:, None])
    return torch.cat(outputs, dim=1), state
