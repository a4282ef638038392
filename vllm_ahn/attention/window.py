"""Sinks and window over paged keys: block tables without what lies between, and why a sliding window is then enough.

A query at ``t`` sees ``{ j <= t : t - j < W  or  j < S }``: the two ends of its sequence. A paged attention kernel
walks over all that a block table lists, so the blocks between sinks and window are left out of the table. The distance
between a query and every key of its window stays what it was, and keys carry their position in their RoPE.

Kernels know sliding windows, but few know sinks. Where sinks and window fill blocks
(:attr:`AHNWindowSpec.rearrangeable`) the table is put in another order. For queries that begin in block ``b``, take

    [ blocks of the window before b ]  [ blocks of the sinks ]  [ b and those after it ]

and let each query see the last ``W + S`` keys of this sequence. These are those of ``b`` up to itself, then all sinks,
then as many older ones as are left, ending at ``t - W + 1`` as they should; it holds as long as a query is less than
``W`` tokens from the start of ``b``. A span that ends within ``W + S`` keeps its order: there that window is all of the
sequence. For other settings the order stays, and a mask shows the sinks.

:func:`compact_tables` does it in plain torch; ``kernels/tables.py`` does the same in Triton.
"""

import torch
from vllm.utils.math_utils import cdiv

from vllm_ahn.cache.specs import AHNWindowSpec


def span_limits(spec: AHNWindowSpec, masked_queries: int) -> tuple[int, int]:
    """``queries_per_span`` and ``block_size`` of :func:`cut_into_spans` for tables of ``spec``.

    Rearranged spans are counted from the start of a block and may be as long as the window allows; spans under a mask
    have at most ``masked_queries``, anywhere.
    """
    size = spec.block_size
    return (spec.window // size * size, size) if spec.rearrangeable else (masked_queries, 1)


def compact_tables(
    spec: AHNWindowSpec, tables: torch.Tensor, starts: torch.Tensor, ends: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Block tables of sinks and window for spans of queries.

    A span whose first query is at ``t`` loses the ``gap = max(0, (t - W + 1) // block_size - ceil(S / block_size))``
    blocks after those of the sinks. In the rest, tokens between ``S`` and the end of the sinks' last block lie outside
    the window still.

    Args:
        spec: the window group's spec.
        tables: ``[R, width]`` int32, the block tables of the spans' requests.
        starts: ``[R]`` int64, position of the first query.
        ends: ``[R]`` int64, position after the last query.

    Returns:
        Tables ``[R, any width]`` int32, whose entries past a span's end repeat its last block, and the lengths of their
        sequences, ``[R]`` int32.
    """
    size, sink_blocks = spec.block_size, spec.sink_blocks
    gap = (((starts - spec.window + 1).clamp(min=0) // size) - sink_blocks).clamp(min=0)
    lens = ends - gap * size
    column = torch.arange(cdiv(int(lens.max()), size))
    gap = gap.unsqueeze(-1)
    if spec.rearrangeable:
        older = (starts // size).unsqueeze(-1) - sink_blocks - gap
        moved = (column < older + sink_blocks) & (ends > spec.capacity).unsqueeze(-1)
        rearranged = torch.where(column < older, column + sink_blocks + gap, column - older)
        source = torch.where(moved, rearranged, column + gap)
    else:
        source = torch.where(column < sink_blocks, column, column + gap)
    last = ((ends - 1) // size).unsqueeze(-1)
    return tables.gather(1, torch.minimum(source, last)), lens.int()


def visible_keys(spec: AHNWindowSpec, queries: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
    """The mask, for indices of queries and keys in tables that keep their order, which broadcast."""
    return (keys <= queries) & ((queries - keys < spec.window) | (keys < spec.sinks))
