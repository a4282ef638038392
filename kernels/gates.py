"""What the memories differ in, as kernels see it."""

import torch
import triton
import triton.language as tl

NUM_GATES = {"GatedDeltaNet": 2, "DeltaNet": 1, "Mamba2": 1}
"""Gates that a token keeps per query head, by memory."""


@triton.jit
def decay_and_rate(gates, A_log, head, MEMORY: tl.constexpr):  # type: ignore[no-untyped-def]
    """``g`` and ``b`` of the recurrence, float32, from a token's kept gates.

    ``gates`` points to the gates of this token and query head: ``g, b`` of a GatedDeltaNet, ``b`` of a DeltaNet, the
    step size ``d`` of a Mamba2, whose ``g = -exp(A_log) d`` and ``b = d``. ``head`` may be a block, ``gates`` then a
    block of pointers.
    """
    if MEMORY == "GatedDeltaNet":
        g = tl.load(gates).to(tl.float32)
        b = tl.load(gates + 1).to(tl.float32)
    elif MEMORY == "DeltaNet":
        b = tl.load(gates).to(tl.float32)
        g = tl.zeros_like(b)
    else:
        b = tl.load(gates).to(tl.float32)
        g = -tl.exp(tl.load(A_log + head)) * b
    return g, b


def check_memory(memory: str, A_log: torch.Tensor | None, gates_per_kv_head: int, group: int) -> None:
    """Raise ``ValueError`` unless a memory of this name keeps so many gates and comes with what it needs."""
    if memory not in NUM_GATES:
        raise ValueError(f"memory must be one of {', '.join(NUM_GATES)}, got {memory!r}")
    if gates_per_kv_head != NUM_GATES[memory] * group:
        raise ValueError(f"{memory} keeps {NUM_GATES[memory]} gates a head, pages have {gates_per_kv_head} for {group}")
    if memory == "Mamba2" and (A_log is None or A_log.dtype != torch.float32):
        raise ValueError("Mamba2 needs A_log in float32")
