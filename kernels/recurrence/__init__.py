"""The recurrence in torch, three ways: token loop (the oracle), one token a sequence, chunk-parallel."""

from .chunk import chunk_recurrence
from .naive import naive_recurrence
from .norm import l2_normalize
from .step import recurrent_step

__all__ = ["chunk_recurrence", "l2_normalize", "naive_recurrence", "recurrent_step"]
