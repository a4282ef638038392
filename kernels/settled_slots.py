"""The rule of :mod:`vllm_ahn.kernels.settled` for Triton kernels.

A wrapper passes a rule to its kernel by :func:`rule_arguments`; the kernel takes arguments of these names and hands
them to the helpers below.
"""

from typing import Any

import triton
import triton.language as tl

from vllm_ahn.kernels.settled import GRANULARITY, Settling


def rule_arguments(rule: Settling) -> dict[str, Any]:
    """Return the arguments by which a kernel finds boundaries and slots, by name."""
    return {
        "window": rule.window,
        "sinks": rule.sinks,
        "GRANULARITY": GRANULARITY,
        "PERIOD": rule.period,
        "TURNS": rule.turns,
        "INNER": rule.inner,
    }


@triton.jit
def boundary_of(num_tokens, window, sinks, GRANULARITY: tl.constexpr):  # type: ignore[no-untyped-def]
    """Return the boundary for which the state is settled when ``num_tokens`` are computed."""
    return tl.maximum(num_tokens, window + sinks) // GRANULARITY * GRANULARITY


@triton.jit
def absorbed_at(num_tokens, window, sinks):  # type: ignore[no-untyped-def]
    """Return the first token that a state after ``num_tokens`` has not absorbed."""
    return tl.maximum(num_tokens - window, sinks)


@triton.jit
def slot_of(  # type: ignore[no-untyped-def]
    boundary, GRANULARITY: tl.constexpr, PERIOD: tl.constexpr, TURNS: tl.constexpr, INNER: tl.constexpr
):
    """Return which of a request's states is that of ``boundary``."""
    index = boundary // GRANULARITY
    slot = index // PERIOD % TURNS
    if INNER > 0:
        slot = tl.where(index % PERIOD == 0, slot, TURNS + index % INNER)
    return slot
