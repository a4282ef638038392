"""The compressed memories, one a file: gates from the hidden state, recurrence, read-out."""

from vllm_ahn.reference.memory.base import RECURRENCES, Memory
from vllm_ahn.reference.memory.delta_net import DeltaNet
from vllm_ahn.reference.memory.gated_delta_net import GatedDeltaNet
from vllm_ahn.reference.memory.mamba2 import Mamba2

__all__ = ["MEMORIES", "RECURRENCES", "Memory", "make_memory"]

MEMORIES: dict[str, type[Memory]] = {memory.__name__: memory for memory in (GatedDeltaNet, DeltaNet, Mamba2)}
"""By ``_ahn_implementation`` of a checkpoint."""


def make_memory(name: str, hidden_size: int, heads: int, head_dim: int, use_q_proj: bool) -> Memory:
    """Return a new memory, one of `MEMORIES`, for the sizes that `Memory` takes."""
    return MEMORIES[name](hidden_size, heads, head_dim, use_q_proj)
