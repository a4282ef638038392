"""What kernels are to compute, in float64 and plain torch, and how near they have to come."""

from __future__ import annotations

import torch
from torch.nn import functional as F

from kernel_cases.layer import Pool, Step
from report import Mismatch
from vllm_ahn.kernels import chunk_recurrence, l2_normalize, naive_recurrence
from vllm_ahn.memory.spec import MemorySpec

CHUNKED_FROM = 256
"""Tokens from which on the chunk-parallel recurrence is the oracle: token by token it would take minutes."""


def compare(name: str, got: torch.Tensor, wanted: torch.Tensor, *, mean: float, most: float) -> float:
    """Return the root mean square error of ``got``.

    Args:
        name: what it is, for the message.
        got: any float dtype.
        wanted: likewise, of the same shape.
        mean: root mean square error allowed, relative to that of ``wanted``.
        most: error of any element allowed, relative to the largest of ``wanted``.

    Raises:
        Mismatch: the two do not agree.
    """
    if got.shape != wanted.shape:
        raise Mismatch(f"{name}: shape {tuple(got.shape)}, expected {tuple(wanted.shape)}")
    if got.numel() == 0:
        return 0.0
    got, wanted = got.double(), wanted.double()
    if not bool(got.isfinite().all()):
        raise Mismatch(f"{name}: {int((~got.isfinite()).sum())} of {got.numel()} elements are not finite")
    error = got - wanted
    on_average = float(error.square().mean().sqrt() / wanted.square().mean().sqrt())
    at_most = float(error.abs().max() / wanted.abs().max())
    if not (on_average <= mean and at_most <= most):
        raise Mismatch(
            f"{name}: off by {on_average:.2g} on average and {at_most:.2g} at most, allowed are {mean:.2g}, {most:.2g}"
        )
    return on_average


def untouched(name: str, got: torch.Tensor, before: torch.Tensor) -> None:
    """Raise `Mismatch` unless two tensors are the same bytes, NaN included."""
    different = got.contiguous().view(torch.uint8) != before.contiguous().view(torch.uint8)
    if bool(different.any()):
        raise Mismatch(f"{name}: {int(different.sum())} of {different.numel()} bytes are not what they should be")


def decay_and_rate(memory: MemorySpec, gates: torch.Tensor, A_log: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return ``g`` and ``b`` of the recurrence, from gates ``[..., H, num_gates]``."""
    if memory.keeps_decay:
        return gates[..., 0], gates[..., 1]
    rate = gates[..., 0]
    return (-A_log.exp() * rate if memory.decay_from_rate else torch.zeros_like(rate)), rate


def memory_reads(step: Step, requests: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return what requests read, ``[N, H, D]``, and their new states ``[R, H, D, D]``, from what pages hold now."""
    layer, pool, reads, states = step.layer, step.layer.pool, [], []
    for request in requests:
        rows = step.reading[request]
        owners, evicted = step.owners[rows], step.positions[rows] - layer.setting.window
        keys, values, gates = pool.tokens(owners, evicted)
        g, b = decay_and_rate(step.memory, gates.float(), layer.A_log)
        state = pool.states(owners[:1])
        if int(evicted[0]) == layer.setting.sinks:
            state = torch.zeros_like(state)
        q, k = l2_normalize(step.query[rows].double()), l2_normalize(keys.double())
        recurrence = naive_recurrence if len(q) < CHUNKED_FROM else chunk_recurrence
        tokens = (x[None] for x in (q, k, values.double(), g, b))
        o, state = recurrence(*tokens, step.scale, step.memory.delta, state)
        reads.append(o[0])
        states.append(state[0])
    return torch.cat(reads), torch.stack(states)


def read_out(step: Step, rows: torch.Tensor, o: torch.Tensor) -> torch.Tensor:
    """Return what the memory adds to the output of some tokens, ``[n, H, D]``, of reads ``[n, H, D]``."""
    layer = step.layer
    o, gate, norm = o.double(), F.silu(step.z[rows].double()).unsqueeze(-1), layer.norm.double()
    if step.memory.norm_all_heads:
        gated = (o * gate).flatten(1)
        y = F.rms_norm(gated, gated.shape[1:], norm, eps=1e-5).view(o.shape)
    else:
        y = F.rms_norm(o, o.shape[2:], norm, eps=1e-5) * gate
    return torch.einsum("nhi,hij->nhj", y, layer.o_proj[step.number % len(layer.o_proj)].double())


def attention(
    pool: Pool, request: int, queries: torch.Tensor, positions: torch.Tensor, window: int | None, sinks: int
) -> torch.Tensor:
    """Return attention ``[n, H, D]`` of a request's queries ``[n, H, D]`` at positions ``[n]``; full without window."""
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
