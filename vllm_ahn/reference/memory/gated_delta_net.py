"""GatedDeltaNet: the delta rule with a learnt decay."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from vllm_ahn.reference.layers import at_least_float32
from vllm_ahn.reference.memory.base import HeadwiseLinear, decay_parameters, spread_decays
from vllm_ahn.reference.memory.delta_net import DeltaNet


class GatedDeltaNet(DeltaNet):
    """As `DeltaNet`, with ``g = -exp(A_log) softplus(a_proj h + dt_bias)``, and perhaps queries of its own."""

    unused = ("D",)

    def __init__(self, hidden_size: int, heads: int, head_dim: int, use_q_proj: bool = False) -> None:
        super().__init__(hidden_size, heads, head_dim)
        self.a_proj = nn.Linear(hidden_size, heads, bias=False)
        self.A_log, self.dt_bias = decay_parameters(heads)
        if use_q_proj:
            self.q_proj = HeadwiseLinear(heads, head_dim)

    @torch.no_grad()
    def begin(self, slowest: int) -> None:
        super().begin(slowest)
        self.A_log.copy_(spread_decays(self.dt_bias, slowest))

    def gates(self, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        _, b = super().gates(hidden)
        return -self.A_log.exp() * F.softplus(at_least_float32(self.a_proj(hidden)) + self.dt_bias), b
