"""The router: a learned weight on what the memory adds, by how much of the sequence lies outside the window."""

import torch
from torch import nn
from vllm.distributed import get_tensor_model_parallel_rank, get_tensor_model_parallel_world_size

from vllm_ahn.memory.base import float32_per_head


class Router(nn.Module):
    """``sigmoid(alpha_h ln r + beta_h)`` with ``r = (t - W - S + 1) / W``; checkpoints call it ``ahn_router``."""

    def __init__(self, total_num_heads: int) -> None:
        super().__init__()
        num_heads = total_num_heads // get_tensor_model_parallel_world_size()
        self.alpha = float32_per_head(num_heads)
        self.beta = float32_per_head(num_heads)

    def forward(self, positions: torch.Tensor, window: int, sinks: int) -> torch.Tensor:
        """Weigh what tokens at ``positions [num_tokens]`` read, all of them at least ``W + S``.

        Returns:
            ``[num_tokens, num_heads]`` float32.
        """
        ratio = (positions - window - sinks + 1).float() / window
        return torch.sigmoid(self.alpha * ratio.log().unsqueeze(-1) + self.beta)

    def load_weight(self, name: str, weight: torch.Tensor) -> str:
        """Take the tensor ``alpha`` or ``beta`` of all heads; returns ``name``."""
        rank, size = get_tensor_model_parallel_rank(), get_tensor_model_parallel_world_size()
        self.get_parameter(name).data.copy_(weight.chunk(size)[rank])
        return name
