"""The recurrence token by token: the oracle."""

import torch

from .shapes import check_sequence, compute_dtype


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

    Shapes: ``q [B, T, H, Dk]``, ``k [B, T, Hkv, Dk]``, ``v [B, T, Hkv, Dv]``, ``g`` and ``b`` ``[B, T, H]``,
    ``state [B, H, Dk, Dv]`` or ``None`` for zeros; ``H`` is a multiple of ``Hkv``. Any float dtype.

    Returns ``o [B, T, H, Dv]`` and the state after the last token, both float32, or float64 where ``q``,
    ``k`` or ``v`` is float64. The given state is not changed. Raises ``ValueError`` for shapes that do not
    agree.
    """
    check_sequence(q, k, v, g, b, state)
    dtype = compute_dtype(q, k, v)
    batch, length, heads, key_dim = q.shape
    group = heads // k.shape[2]
    q, g, b = q.to(dtype), g.to(dtype), b.to(dtype)
    k = k.to(dtype).repeat_interleave(group, dim=2)
    v = v.to(dtype).repeat_interleave(group, dim=2)
    memory = q.new_zeros(batch, heads, key_dim, v.shape[-1]) if state is None else state.to(dtype, copy=True)
    outputs = [q.new_zeros(batch, 0, heads, v.shape[-1])]
    for t in range(length):
        memory = memory * g[:, t].exp()[..., None, None]
        u = v[:, t]
        if delta:
            u = u - torch.einsum("bhkv,bhk->bhv", memory, k[:, t])
        u = u * b[:, t, :, None]
        memory = memory + k[:, t, :, :, None] * u[:, :, None, :]
        outputs.append(scale * torch.einsum("bhkv,bhk->bhv", memory, q[:, t])[:, None])
    return torch.cat(outputs, dim=1), memory
