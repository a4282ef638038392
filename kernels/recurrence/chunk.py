"""Chunk-parallel recurrence: prefill on the CPU.

Within a chunk of ``C`` tokens that starts in state ``M``, with ``G_i`` the sum of ``g`` up to and including
token ``i``, the recurrence unrolls to (the WY form of the delta rule, with decay)

    (I + A) U = diag(b) (V - diag(exp G) K M)      A_ij = b_i exp(G_i - G_j) k_i.k_j  for j < i
    O         = scale (diag(exp G) Q M + P U)      P_ij = exp(G_i - G_j) q_i.k_j      for j <= i
    M_next    = exp(G_C) M + sum_j exp(G_C - G_j) k_j u_j^T

and ``U = diag(b) V`` without the delta rule. ``inv(I + A)`` and ``P`` do not depend on the state: they are
made for many chunks at once. What is left for the loop over chunks is five batched products.

Only differences ``G_i - G_j <= 0`` are ever exponentiated. After one token with ``g = -1000`` a sum in
float32 is off by 1e-4 from then on, and so is every difference. So the sums are made in float64 and split,
``G = hi + lo``, with ``hi`` rounded to float32, whose differences are as exact as they need be. ``lo`` is
tiny and needs no pass over ``[C, C]``: it is a change of scale, ``u_j = exp(lo_j) u'_j``, that ends up in
factors of ``v`` and ``o``.
"""

import torch
import torch.nn.functional as F

from vllm_ahn.kernels.recurrence.shapes import check_sequence, compute_dtype
from vllm_ahn.kernels.recurrence.triangular import unit_lower_inverse

# exp(-104) is 0 in float32, and nothing in float64 either beside what is added in the same step.
LOWEST_DECAY = -104.0

# Elements of one [heads, C, C] tensor that are worked on together: few enough to stay in the CPU's caches.
SPAN_ELEMENTS = 1 << 18


def chunk_recurrence(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor,
    b: torch.Tensor,
    scale: float,
    delta: bool,
    state: torch.Tensor | None = None,
    chunk_size: int = 64,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Run the recurrence over ``T`` tokens, chunk by chunk. Differentiable once.

    Arguments, shapes, dtypes and results are those of :func:`naive_recurrence`, and besides:

    Args:
        chunk_size: tokens of a chunk, at least 1; any number of tokens will do.

    Raises:
        ValueError: shapes do not agree, or the chunk size is below 1.
    """
    check_sequence(q, k, v, g, b, state)
    if chunk_size < 1:
        raise ValueError(f"chunk_size must be at least 1 token, got {chunk_size}")
    dtype = compute_dtype(q, k, v)
    batch, length, heads, key_dim = q.shape
    kv_heads, value_dim = k.shape[2], v.shape[-1]
    group = heads // kv_heads
    size = min(chunk_size, max(length, 1))
    chunks = -(-length // size)
    # The state is kept transposed, [Dv, Dk]: then one buffer is both a batch over query heads and, with the
    # group's heads stacked, a batch over key/value heads, and no product needs keys repeated per query head.
    if state is None:
        state_t = q.new_zeros(batch * heads, value_dim, key_dim, dtype=dtype)
    else:
        state_t = state.to(dtype).transpose(-1, -2).contiguous().view(batch * heads, value_dim, key_dim)
    stacked = (batch * kv_heads, group * value_dim, key_dim)
    factors = _Factors(g, b, size, chunks, scale, dtype)
    after_diagonal = torch.full((size, size), -torch.inf, dtype=dtype, device=q.device).triu(1)
    span = max(1, SPAN_ELEMENTS // (batch * heads * size * size))
    # Written in place without autograd, which would copy the whole of it once a chunk on its way back.
    o = q.new_empty(batch, chunks * size, heads, value_dim, dtype=dtype)
    pieces: list[torch.Tensor] = []
    for first in range(0, chunks, span):
        last = min(chunks, first + span)
        keys = _by_chunk(k, first, last, size, dtype)
        queries = _by_chunk(q, first, last, size, dtype)
        values = _by_chunk(v, first, last, size, dtype).transpose(-1, -2).contiguous()
        n = last - first
        per_head = (n, batch, kv_heads, group, size)
        hi = factors.hi[first:last].view(per_head)
        rate = factors.b[first:last].view(per_head)
        # `hi` carries no gradient (`lo` has it all), so neither does this: it may be worked on in place.
        decay = (hi[..., :, None] - hi[..., None, :]).add_(after_diagonal).exp_()
        keys_t = keys.transpose(-1, -2)
        scores = queries.view(-1, group * size, key_dim) @ keys_t.reshape(-1, key_dim, size)
        scores = scores.view(decay.shape).mul_(decay).view(n, -1, size, size)
        if delta:
            overlap = (keys @ keys_t).view(n, batch, kv_heads, 1, size, size)
            strict = (overlap * rate[..., None]).mul_(decay)
            inverse = unit_lower_inverse(strict.reshape(-1, size, size))
            inverse_t = inverse.view(n, -1, size, size).transpose(-1, -2)
        for i in range(n):
            c = first + i
            value = values[i].reshape(batch * kv_heads, 1, value_dim, size)
            update = value * factors.value[c].reshape(-1, group, 1, size)
            if delta:
                seen = torch.bmm(state_t.reshape(stacked), keys_t[i].flatten(0, 1)).reshape(update.shape)
                update.addcmul_(seen, factors.read[c].reshape(-1, group, 1, size), value=-1)
                update = torch.bmm(update.reshape(-1, value_dim, size), inverse_t[i])
            update = update.reshape(-1, value_dim, size)
            out = torch.bmm(queries[i].flatten(0, 1), state_t.transpose(1, 2))
            out = out.mul_(factors.exp_hi[c][..., None]).baddbmm_(scores[i], update.transpose(1, 2))
            out = out.view(batch, heads, size, value_dim).transpose(1, 2)
            factor = factors.out[c].view(batch, heads, size, 1).transpose(1, 2)
            if torch.is_grad_enabled():
                pieces.append(out * factor)
            else:
                torch.mul(out, factor, out=o[:, c * size : (c + 1) * size])
            update = (update * factors.store[c][:, None, :]).reshape(-1, group * value_dim, size)
            state_t = (state_t * factors.carry[c][:, None, None]).view(stacked)
            state_t = state_t.baddbmm_(update, keys[i].flatten(0, 1)).view(-1, value_dim, key_dim)
    o = torch.cat(pieces, dim=1) if pieces else o
    o = o[:, :length].contiguous()
    return o, state_t.view(batch, heads, value_dim, key_dim).transpose(-1, -2).contiguous()


class _Factors:
    """Everything made of ``g`` and ``b``, for all chunks: ``[chunks, B * H, C]`` (``carry`` without C)."""

    def __init__(
        self, g: torch.Tensor, b: torch.Tensor, size: int, chunks: int, scale: float, dtype: torch.dtype
    ) -> None:
        batch, length, heads = g.shape

        def chunked(x: torch.Tensor) -> torch.Tensor:
            x = F.pad(x, (0, 0, 0, chunks * size - length))
            return x.view(batch, chunks, size, heads).permute(1, 0, 3, 2).reshape(chunks, batch * heads, size)

        total = chunked(g.double().clamp(min=LOWEST_DECAY)).cumsum(-1)
        self.hi = total.detach().to(dtype)
        lo = (total - self.hi).to(dtype)
        self.b = chunked(b.to(dtype))
        self.exp_hi = self.hi.exp()
        self.value = self.b * (-lo).exp()
        self.read = self.b * self.exp_hi
        self.out = scale * lo.exp()
        self.store = (self.hi[..., -1:] - self.hi).exp() * lo[..., -1:].exp()
        self.carry = total[..., -1].exp().to(dtype)


def _by_chunk(x: torch.Tensor, first: int, last: int, size: int, dtype: torch.dtype) -> torch.Tensor:
    """Tokens of chunks ``[first, last)`` of ``x [B, T, heads, D]`` as ``[n, B, heads, C, D]``, 0 past T."""
    batch, length, heads, dim = x.shape
    x = x[:, first * size : last * size]
    if last * size > length:
        x = F.pad(x, (0, 0, 0, 0, 0, last * size - length))
    x = x.view(batch, last - first, size, heads, dim).permute(1, 0, 3, 2, 4)
    return x.to(dtype, memory_format=torch.contiguous_format).contiguous()
