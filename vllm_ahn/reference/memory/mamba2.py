"""Mamba2: a decayed sum of outer products, decay and rate from one step size."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from vllm_ahn.reference.layers import RMSNorm, at_least_float32
from vllm_ahn.reference.memory.base import NORM_EPS, Memory, decay_parameters, spread_decays


class Mamba2(Memory):
    """``b = softplus(dt_proj h + dt_bias)``, ``g = -exp(A_log) b``; ``y = rmsnorm(o silu(g_proj h))`` over all
    heads."""

    delta = False

    def __init__(self, hidden_size: int, heads: int, head_dim: int, use_q_proj: bool = False) -> None:
        super().__init__(hidden_size, heads, head_dim)
        self.scale = 1.0
        self.dt_proj = nn.Linear(hidden_size, heads)
        self.g_proj = nn.Linear(hidden_size, heads)
        self.A_log, self.dt_bias = decay_parameters(heads)
        self.norm = RMSNorm(heads * head_dim, NORM_EPS)

    @torch.no_grad()
    def begin(self, slowest: int) -> None:
        super().begin(slowest)
        self.A_log.copy_(spread_decays(self.dt_bias, slowest))

    def gates(self, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        b = F.softplus(at_least_float32(self.dt_proj(hidden)) + self.dt_bias)
        return -self.A_log.exp() * b, b

    def read_out(self, o: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
        gated = o * F.silu(self.g_proj(hidden))[..., None]
        return self.norm(gated.flatten(-2)).view(o.shape)
