"""The three compressed memories of the paper, one a file, and the optional router."""

from vllm_ahn.memory.base import Memory
from vllm_ahn.memory.delta_net import DeltaNet
from vllm_ahn.memory.gated_delta_net import GatedDeltaNet
from vllm_ahn.memory.mamba2 import Mamba2
from vllm_ahn.memory.router import Router

MEMORY_CLASSES: dict[str, type[Memory]] = {
    "GatedDeltaNet": GatedDeltaNet,
    "DeltaNet": DeltaNet,
    "Mamba2": Mamba2,
}
"""``_ahn_implementation`` of a checkpoint's config -> class."""

__all__ = ["MEMORY_CLASSES", "DeltaNet", "GatedDeltaNet", "Mamba2", "Memory", "Router"]
