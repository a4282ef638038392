"""Kernels of an AHN layer: the compressed memory's recurrence in torch, and Triton's for all that it does on a GPU.

They need PyTorch, Triton, einops and flash-linear-attention, not vLLM, and of this package only
:mod:`vllm_ahn.memory.spec`. What is exported here needs PyTorch alone: the recurrence and the pages. The
Triton kernels are imported by module, where Triton is: `cache_write`, `prefill`, `read_out`, `steps_triton`, `tables`.

The recurrence, for one sequence and one query head (``M`` is ``[Dk, Dv]``)::

    M <- exp(g) M;   u = b (v - (M^T k if delta else 0));   M <- M + k u^T;   o = scale * M^T q

`naive_recurrence` is the oracle that all else is compared with. Keys and values are shared by the ``H / Hkv`` query
heads of a group; decays ``g``, rates ``b`` and states are per query head.

What words mean here:

request
    Index of a request in the step's batch, and with it in the block tables.
token
    Index of a token in the step's batch, as in ``query[token]``.
position
    Where a token is in its sequence. ``t`` is that of a query.
slot
    Where a token is in the window pages: block id times block size plus offset in the block.
gates
    What a token keeps of a query head until it is absorbed, from which ``g`` and ``b`` are made.
state
    ``M`` of all query heads of a request. Pages hold it column by column, ``M[:, j]``.
settled
    A state as it was at the last boundary; see `settled`, which has the rule. A request has one in each of its slots.
update
    ``u`` of an absorbed token. Those since the boundary are kept behind the state.
pending
    Tokens that were absorbed since the boundary, in earlier steps.
fresh
    A state that is zero, whatever its pages hold: that of a request whose next query is at ``W + S``.
absorb
    Take a token into the state. A query at ``t >= W + S`` absorbs the token at ``t - W``, then it reads.
read
    What a query gets from the state, and that query's token: ``reads`` are tokens, -1 where nothing is read.
step
    Of a few queries of a request, over its settled state. A decode is a step of one.
stretch
    The tokens that a chunk-parallel recurrence absorbs of one request, from one boundary to another.
chunk
    The tokens that a chunk-parallel recurrence treats at once. It begins anew with every stretch.
span
    Consecutive queries of one request that share a block table, in `tables`.
memory
    An entry of the table in :mod:`vllm_ahn.memory.spec`: kernels know flags, no names.
"""

from vllm_ahn.kernels.pages import StatePageLayout, StatePages, WindowPageLayout, WindowPages
from vllm_ahn.kernels.recurrence import chunk_recurrence, l2_normalize, naive_recurrence

__all__ = [
    "StatePageLayout",
    "StatePages",
    "WindowPageLayout",
    "WindowPages",
    "chunk_recurrence",
    "l2_normalize",
    "naive_recurrence",
]
