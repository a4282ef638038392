"""Kernels: the compressed memory's recurrence in torch, and Triton's for everything an AHN layer does on a GPU.

What is exported here is the recurrence, three ways: token loop, one token a sequence, chunk-parallel. The Triton
kernels (`cache_write`, `compaction`, `decode_memory`, `prefill_gather`, `read_out`) are imported by name, where Triton
is. All compute, for one sequence and one query head (``M`` is ``[Dk, Dv]``):

    M <- exp(g) M;   u = b (v - (M^T k if delta else 0));   M <- M + k u^T;   o = scale * M^T q

`naive` is the oracle the others are compared with. Keys and values are shared by the ``H / Hkv`` query
heads of a group, decays ``g``, rates ``b`` and states are per query head.
"""

from .recurrence.chunk import chunk_recurrence
from .recurrence.naive import naive_recurrence
from .recurrence.norm import l2_normalize
from .recurrence.step import recurrent_step

__all__ = ["chunk_recurrence", "l2_normalize", "naive_recurrence", "recurrent_step"]
