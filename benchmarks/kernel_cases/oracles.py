"""What kernels are to compute, in float64 and plain torch."""

import torch
from torch.nn import functional as F

from kernel_cases.pool import Pool
from support.paged_case import Shape, decay_and_rate
from vllm_ahn.kernels import chunk_recurrence, l2_normalize, naive_recurrence, recurrent_step

CHUNKED_FROM = 256
"""Tokens from which on the chunk-parallel recurrence is the oracle: token by token it would take minutes."""


def step(
    shape: Shape,
    q: torch.Tensor,
    tokens: tuple[torch.Tensor, ...],
    A_log: torch.Tensor,
    states: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """A decode's read ``[n, H, D]`` and new states, from queries ``[n, H, D]`` and :meth:`Pool.tokens`."""
    k, v, gates = tokens
    g, b = decay_and_rate(shape, gates.float(), A_log)
    return recurrent_step(
        l2_normalize(q.double()),
        l2_normalize(k.double()),
        v.double(),
        g,
        b,
        shape.scale,
        shape.memory != "Mamba2",
        states,
    )


def stretch(
    shape: Shape,
    q: torch.Tensor,
    tokens: tuple[torch.Tensor, ...],
    A_log: torch.Tensor,
    state: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """A prefill's reads ``[n, H, D]`` and new state ``[H, D, D]`` of one request."""
    k, v, gates = tokens
    g, b = decay_and_rate(shape, gates.float(), A_log)
    recurrence = naive_recurrence if len(q) < CHUNKED_FROM else chunk_recurrence
    o, state = recurrence(
        l2_normalize(q.double())[None],
        l2_normalize(k.double())[None],
        v.double()[None],
        g[None],
        b[None],
        shape.scale,
        shape.memory != "Mamba2",
        state[None],
    )
    return o[0], state[0]


def read_out(memory: str, o: torch.Tensor, z: torch.Tensor, norm: torch.Tensor, o_proj: torch.Tensor) -> torch.Tensor:
    """What the memory adds to the attention output, ``[n, H, D]``, of reads ``[n, H, D]`` and gates ``z [n, H]``."""
    o, gate = o.double(), F.silu(z.double()).unsqueeze(-1)
    if memory == "Mamba2":
        gated = (o * gate).flatten(1)
        y = F.rms_norm(gated, gated.shape[1:], norm.double(), eps=1e-5).view(o.shape)
    else:
        y = F.rms_norm(o, o.shape[2:], norm.double(), eps=1e-5) * gate
    return torch.einsum("nhi,hij->nhj", y, o_proj.double())


def attention(
    pool: Pool, request: int, queries: torch.Tensor, positions: torch.Tensor, window: int | None, sinks: int
) -> torch.Tensor:
    """Attention ``[n, H, D]`` of one request's queries ``[n, H, D]`` at positions ``[n]``; full without a window."""
    first = max(int(positions.min()) - window + 1, 0) if window else 0
    last = int(positions.max()) + 1
    seen = torch.cat((torch.arange(min(sinks, first)), torch.arange(first, last))).to(queries.device)
    keys, values, _ = pool.tokens(torch.full_like(seen, request), seen)
    age = positions[:, None] - seen[None, :]
    visible = age >= 0
    if window:
        visible &= (age < window) | (seen < sinks)
    heads, kv_heads = queries.shape[1], keys.shape[1]
    outputs = []
    for head in range(heads):
        k, v = (x[:, head * kv_heads // heads].double() for x in (keys, values))
        scores = queries[:, head].double() @ k.T * queries.shape[2] ** -0.5
        outputs.append(scores.masked_fill(~visible, -torch.inf).softmax(-1) @ v)
    return torch.stack(outputs, 1)
