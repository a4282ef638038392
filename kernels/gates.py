"""Decay and rate from the gates that tokens keep, for Triton kernels.

:meth:`vllm_ahn.memory.base.Memory.decay_and_rate` does the same in torch.
"""

import torch
import triton
import triton.language as tl

from vllm_ahn.memory.spec import MemorySpec


@triton.jit
def decay_and_rate(gates, A_log, head, KEEPS_DECAY: tl.constexpr, DECAY_FROM_RATE: tl.constexpr):  # type: ignore[no-untyped-def]
    """Return ``g`` and ``b`` of the recurrence, float32, from the gates that a token keeps of a query head.

    ``gates`` points to them: ``g, b`` where the memory keeps the decay, else ``b`` alone, and ``g = -exp(A_log) b`` or
    0. ``head`` may be a block of numbers, ``gates`` then is a block of pointers.
    """
    if KEEPS_DECAY:
        g = tl.load(gates).to(tl.float32)
        b = tl.load(gates + 1).to(tl.float32)
    else:
        b = tl.load(gates).to(tl.float32)
        if DECAY_FROM_RATE:
            g = -tl.exp(tl.load(A_log + head)) * b
        else:
            g = tl.zeros_like(b)
    return g, b


def check_gates(memory: MemorySpec, gates_per_kv_head: int, group: int, A_log: torch.Tensor | None) -> None:
    """Raise ``ValueError`` unless pages keep the gates of this memory, and ``A_log`` is there if it needs one.

    Args:
        memory: whose gates.
        gates_per_kv_head: what a token keeps in its page per KV head.
        group: query heads that share a KV head.
        A_log: ``[H]`` float32, or None.
    """
    if gates_per_kv_head != memory.num_gates * group:
        raise ValueError(f"{memory.num_gates * group} gates a KV head expected, pages have {gates_per_kv_head}")
    if memory.decay_from_rate and (A_log is None or A_log.dtype != torch.float32):
        raise ValueError("a decay that is made of the rate needs A_log in float32")
