"""The recurrence in torch: token by token (the oracle), chunk-parallel, and over settled states in pages."""

from vllm_ahn.kernels.recurrence.chunk import chunk_recurrence
from vllm_ahn.kernels.recurrence.naive import naive_recurrence
from vllm_ahn.kernels.recurrence.norm import l2_normalize

__all__ = ["chunk_recurrence", "l2_normalize", "naive_recurrence"]
