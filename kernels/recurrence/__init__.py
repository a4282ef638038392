"""The recurrence in torch, three ways: token loop (the oracle), one token a sequence, chunk-parallel."""

from vllm_ahn.kernels.recurrence.chunk import chunk_recurrence
from vllm_ahn.kernels.recurrence.naive import naive_recurrence
from vllm_ahn.kernels.recurrence.norm import l2_normalize
from vllm_ahn.kernels.recurrence.step import recurrent_step

__all__ = ["chunk_recurrence", "l2_normalize", "naive_recurrence", "recurrent_step"]
