"""Mamba2: a decayed sum of outer products, decay and rate from one step size."""

import torch
from torch.nn import functional as F

from vllm_ahn.memory.base import Memory
from vllm_ahn.memory.spec import MEMORIES


class Mamba2(Memory):
    """``b = softplus(dt_proj h + dt_proj.bias + dt_bias)``, the step size, and ``g = -exp(A_log) b``."""

    spec = MEMORIES["Mamba2"]

    def gates(self, *projected: torch.Tensor) -> torch.Tensor:
        (dt,) = projected
        return F.softplus(dt + self.dt_bias).unsqueeze(-1)
