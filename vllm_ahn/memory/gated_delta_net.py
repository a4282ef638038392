"""GatedDeltaNet: the delta rule with a learned decay."""

from typing import Any

import torch
from torch.nn import functional as F

from vllm_ahn.memory.base import float32_per_head
from vllm_ahn.memory.delta_net import DeltaNet


class GatedDeltaNet(DeltaNet):
    """DeltaNet with ``g = -exp(A_log) softplus(a_proj h + dt_bias)``."""

    num_gates = 2
    projections = ("a_proj", "b_proj", "g_proj")

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.A_log = float32_per_head(self.num_heads)
        self.dt_bias = float32_per_head(self.num_heads)

    def gates(self, *raw: torch.Tensor) -> torch.Tensor:
        a, b = raw
        return torch.stack((-self.A_log.exp() * F.softplus(a + self.dt_bias), b.sigmoid()), dim=-1)

    def decay_and_rate(self, gates: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        g, b = gates.unbind(-1)
        return g, b

    def load_weight(self, name: str, weight: torch.Tensor) -> str | None:
        if name == "D":  # every published checkpoint has it, and nothing reads it
            return None
        return super().load_weight(name, weight)
