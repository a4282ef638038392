"""What kernels are to compute, in float64 and plain torch, and how near they have to come."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.nn import functional as F

from kernel_cases.layer import Step
from report import Mismatch
from vllm_ahn.kernels import chunk_recurrence, l2_normalize, naive_recurrence
from vllm_ahn.kernels.recurrence.gates import decay_and_rate

CHUNKED_FROM = 256
"""Tokens from which on the chunk-parallel recurrence is the oracle: token by token it would take minutes."""


def compare(name: str, got: torch.Tensor, wanted: torch.Tensor, *, mean: float, most: float) -> float:
    """Return the root mean square error of ``got``, relative to ``wanted``; both of any float dtype.

    Raises `Mismatch` if it is more than ``mean``, or an element is off by more than ``most``, relative to the largest.
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


def memory_reads(step: Step, requests: list[int], *, settled: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Return what requests read, ``[N, H, D]``, and their new states ``[R, H, D, D]``, from what pages hold now.

    With ``settled`` states those are of the last boundary before the step and after it; otherwise they are of the
    tokens before it and of all.
    """
    memory, rule, reads, states = step.memory, step.setting.rule, [], []
    for request in requests:
        rows = step.reading[request]
        computed, length = int(step.positions[rows][0]), int(step.positions[rows][-1]) + 1
        evicted = step.positions[rows] - step.setting.window
        before = 0
        if settled:
            pending = step.since_boundary(request)
            before, evicted = len(pending), torch.cat((pending, evicted))
        keys, values, gates = step.pool.tokens(torch.full_like(evicted, request), evicted)
        g, b = decay_and_rate(memory, gates.float(), step.A_log)
        state = step.pool.states(step.requests[request : request + 1])
        if int(evicted[0]) == step.setting.sinks:
            state = torch.zeros_like(state)
        q, k = l2_normalize(step.query[rows].double()), l2_normalize(keys.double())
        q = F.pad(q, (0, 0, 0, 0, before, 0))
        recurrence = naive_recurrence if len(q) < CHUNKED_FROM else chunk_recurrence
        tokens = [x[None] for x in (q, k, values.double(), g, b)]
        o, last = recurrence(*tokens, step.scale, memory.delta, state)
        reads.append(o[0, before:])
        if not settled:
            states.append(last[0])
        elif rule.boundary(length) == rule.boundary(computed):
            states.append(step.pool.states(step.requests[request : request + 1])[0].double())
        else:
            count = rule.absorbed(rule.boundary(length)) - int(evicted[0])
            _, last = recurrence(*(x[:, :count] for x in tokens), step.scale, memory.delta, state)
            states.append(last[0])
    return torch.cat(reads), torch.stack(states)


def verify_memory(
    kernel: str,
    step: Step,
    requests: list[int],
    compute: Callable[[], torch.Tensor],
    *,
    settled: bool = False,
    mean: float,
    most: float,
) -> torch.Tensor:
    """Compare what ``requests`` read with the oracle's, and their states; all other pages are to stay as they are.

    Returns what ``compute`` does: reads, one for each request of the batch if they are `Step.o`.
    """
    wanted, states = memory_reads(step, requests, settled=settled)
    who = step.requests[requests]
    before = step.pool.other_pages(who).clone()
    o = compute()
    compare(f"{kernel}'s reads, {step}", o[requests] if o is step.o else o, wanted, mean=mean, most=most)
    got, known = step.pool.states(who), ~states.isnan().flatten(1).any(1)  # a fresh state is not written yet
    compare(f"{kernel}'s states, {step}", got[known], states[known], mean=mean, most=most)
    untouched(f"pages beside states after {kernel}, {step}", step.pool.other_pages(who), before)
    return o


def read_out(step: Step, rows: torch.Tensor, o: torch.Tensor) -> torch.Tensor:
    """Return what the memory adds to the output of some tokens, ``[n, H, D]``, of reads ``[n, H, D]``."""
    o, gate, norm = o.double(), F.silu(step.z[rows].double()).unsqueeze(-1), step.norm.double()
    if step.memory.norm_all_heads:
        y = F.rms_norm((o * gate).flatten(1), norm.shape, norm, eps=1e-5).view(o.shape)
    else:
        y = F.rms_norm(o, norm.shape, norm, eps=1e-5) * gate
    return torch.einsum("nhi,hij->nhj", y, step.o_proj.double())


def attention(step: Step, request: int, rows: torch.Tensor, window: int | None) -> torch.Tensor:
    """Return attention ``[n, H, D]`` of the tokens ``rows`` of a request; full without a window."""
    queries, positions = step.query[rows].double(), step.positions[rows]
    first = max(int(positions.min()) - window + 1, 0) if window else 0
    sinks, last = step.setting.sinks, int(positions.max()) + 1
    seen = torch.cat((torch.arange(min(sinks, first)), torch.arange(first, last))).to(queries.device)
    keys, values, _ = step.pool.tokens(torch.full_like(seen, request), seen)
    age = positions[:, None] - seen[None, :]
    visible = age >= 0
    if window:
        visible &= (age < window) | (seen < sinks)
    outputs = []
    for head in range(step.model.heads):
        k, v = (x[:, head // step.model.group].double() for x in (keys, values))
        scores = queries[:, head] @ k.T * queries.shape[2] ** -0.5
        outputs.append(scores.masked_fill(~visible, -torch.inf).softmax(-1) @ v)
    return torch.stack(outputs, 1)
