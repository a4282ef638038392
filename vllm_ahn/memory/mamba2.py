"""Mamba2: a decayed sum of outer products, decay and rate from one step size."""

from typing import Any

import torch
from torch.nn import functional as F
from vllm.distributed import tensor_model_parallel_all_reduce

from vllm_ahn.memory.base import NORM_EPS, Memory, Scale, float32_per_head


class Mamba2(Memory):
    """``d = softplus(dt_proj h + dt_proj.bias + dt_bias)``, ``g = -exp(A_log) d``, ``b = d``.

    The step size ``d`` is all that a token has to keep.
    """

    delta = False
    num_gates = 1
    projections = ("dt_proj", "g_proj")
    projection_bias = True

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.A_log = float32_per_head(self.num_heads)
        self.dt_bias = float32_per_head(self.num_heads)
        self.norm = Scale(self.num_heads * self.head_size)

    @property
    def scale(self) -> float:
        return 1.0

    def gates(self, *raw: torch.Tensor) -> torch.Tensor:
        (dt,) = raw
        return F.softplus(dt + self.dt_bias).unsqueeze(-1)

    def decay_and_rate(self, gates: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        d = gates.squeeze(-1)
        return -self.A_log.exp() * d, d

    def normalise(self, o: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
        gated = (o * F.silu(z).unsqueeze(-1)).flatten(-2)
        # The norm runs over the heads of all ranks.
        squares = gated.square().sum(-1, keepdim=True)
        if self.tp_size > 1:
            squares = tensor_model_parallel_all_reduce(squares)
        rms = torch.rsqrt(squares / (self.total_num_heads * self.head_size) + NORM_EPS)
        return (gated * rms * self.norm.weight.float()).unflatten(-1, (self.num_heads, self.head_size))
