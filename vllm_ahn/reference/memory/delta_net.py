"""DeltaNet: the delta rule without decay."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from vllm_ahn.reference.layers import RMSNorm, at_least_float32
from vllm_ahn.reference.memory.base import NORM_EPS, Memory


class DeltaNet(Memory):
    """``b = sigmoid(b_proj h)``, ``g = 0``; ``y = rmsnorm(o) silu(g_proj h)``, each head for itself."""

    delta = True

    def __init__(self, hidden_size: int, heads: int, head_dim: int, use_q_proj: bool = False) -> None:
        super().__init__(hidden_size, heads, head_dim, use_q_proj)
        self.b_proj = nn.Linear(hidden_size, heads, bias=False)
        self.g_proj = nn.Linear(hidden_size, heads, bias=False)
        self.o_norm = RMSNorm(head_dim, NORM_EPS)

    def gates(self, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        b = at_least_float32(self.b_proj(hidden)).sigmoid()
        return torch.zeros_like(b), b

    def read_out(self, o: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
        return self.o_norm(o) * F.silu(self.g_proj(hidden))[..., None]
