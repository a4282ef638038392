"""GatedDeltaNet: the delta rule with a learned decay."""

import torch
from torch.nn import functional as F

from vllm_ahn.memory.base import Memory
from vllm_ahn.memory.spec import MEMORIES


class GatedDeltaNet(Memory):
    """``g = -exp(A_log) softplus(a_proj h + dt_bias)``, ``b = sigmoid(b_proj h)``."""

    spec = MEMORIES["GatedDeltaNet"]

    def gates(self, *projected: torch.Tensor) -> torch.Tensor:
        a, b = projected
        return torch.stack((-self.A_log.exp() * F.softplus(a + self.dt_bias), b.sigmoid()), dim=-1)
