"""DeltaNet: the delta rule without decay."""

import torch

from vllm_ahn.memory.base import Memory
from vllm_ahn.memory.spec import MEMORIES


class DeltaNet(Memory):
    """``b = sigmoid(b_proj h)``."""

    spec = MEMORIES["DeltaNet"]

    def gates(self, *projected: torch.Tensor) -> torch.Tensor:
        (b,) = projected
        return b.sigmoid().unsqueeze(-1)
