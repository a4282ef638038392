"""DeltaNet: the delta rule without decay."""

from typing import Any, ClassVar

import torch
from torch.nn import functional as F

from vllm_ahn.memory.base import Memory, Scale, rms_norm


class DeltaNet(Memory):
    """``g = 0``, ``b = sigmoid(b_proj h)``; read-out ``rmsnorm(o) silu(z)``, head by head."""

    delta = True
    num_gates = 1
    projections: ClassVar[tuple[str, ...]] = ("b_proj", "g_proj")
    shared_by_heads = frozenset({"o_norm.weight"})

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.o_norm = Scale(self.head_size)

    def gates(self, *raw: torch.Tensor) -> torch.Tensor:
        (b,) = raw
        return b.sigmoid().unsqueeze(-1)

    def decay_and_rate(self, gates: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        b = gates.squeeze(-1)
        return torch.zeros_like(b), b

    def normalise(self, o: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
        return rms_norm(o, self.o_norm.weight) * F.silu(z).unsqueeze(-1)
