"""The recurrence's two scalars from what a token keeps of them, in torch; `vllm_ahn.kernels.gates` is Triton's."""

import torch

from vllm_ahn.memory.spec import MemorySpec


def decay_and_rate(
    memory: MemorySpec, gates: torch.Tensor, A_log: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return ``g`` and ``b``, ``[..., H]`` each, in the dtype of ``gates``; ``g <= 0``.

    Args:
        memory: whose gates.
        gates: ``[..., H, num_gates]``, as read back from the window pages.
        A_log: ``[H]`` float32, where the decay is made of the rate; else None.
    """
    b = gates[..., -1]
    if memory.keeps_decay:
        return gates[..., 0], b
    if not memory.decay_from_rate:
        return torch.zeros_like(b), b
    assert A_log is not None
    return -A_log.exp() * b, b
