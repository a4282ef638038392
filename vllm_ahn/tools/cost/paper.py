"""Costs as the paper counts them (arXiv 2510.07318, table of complexities), so that its table can be recomputed.

Per layer, for a prefill of L tokens, with N = W + S, the window including the sinks, and 4 bytes an element:

* cache: full attention ``2 L H Nkv`` elements; window ``2 N H Nkv``; AHN ``2 N H Nkv + H^2 Nq``. The gates of the
  tokens in the window are not counted.
* mixing FLOPs: full attention ``4 L D H (Nq + Nkv) + 2 H Nq L^2``; window
  ``4 L D H (Nq + Nkv) + 2 H Nq N^2 + 2 (L - N) 2 N H Nq``; AHN that and ``2 (L - N)(2 H^2 Nq + p D Nq)``.
* model FLOPs: mixing, the MLP ``6 L D I`` a layer, and two vocabulary matrices ``2 L D V`` each, once.

``p`` is the number of gates that a memory keeps, `MemorySpec.num_gates`: 2 for GatedDeltaNet, 1 for DeltaNet and
Mamba2. The paper writes the formula for GatedDeltaNet alone, with 3, which would include the read-out gate; but only 2
gives the 4.38 PFLOPs that it prints for 14B (3: 4.39), and of the other two, only 1 gives 49.7 and 62.4 % (0: 49.6 and
62.4, 2: 49.7 and 62.5).

With the paper's L = 128,000 and N = 32,768 this gives all its rows for 3B and 14B to the printed digit. Of its rows for
7B it gives the cache and the window's mixing ratio. The rest does not come out: AHN's mixing ratios are 48.1 (printed:
48.2) %, the window's model ratio is 65.2 (65.5) and AHN's 65.4 (65.6) %. The FLOPs printed there for full attention,
where there is nothing to choose, are 8 % lower than those of Qwen2.5-7B's shape, so they are not of this shape.
"""

from __future__ import annotations

import dataclasses

from vllm_ahn.memory.spec import MEMORIES
from vllm_ahn.tools.cost.shape import ModelShape

BYTES_PER_ELEMENT = 4

COUNTED_GATES = {memory.name: memory.num_gates for memory in MEMORIES.values()}
"""``p`` of a memory's formula."""


@dataclasses.dataclass(frozen=True)
class PaperCost:
    """The cost of one sequence: FLOPs of its prefill, bytes of its cache."""

    mixing_flops: int
    model_flops: int
    cache_bytes: int


def full_attention(shape: ModelShape, length: int) -> PaperCost:
    """Return the cost of full attention over `length` tokens."""
    return _cost(shape, length, length, 0, 0)


def window_attention(shape: ModelShape, length: int, lossless: int, memory: str | None = None) -> PaperCost:
    """Return the cost of sinks and window, `lossless` tokens together, with `memory`, one of `MEMORIES`, or none."""
    evicted = max(0, length - lossless)
    if memory is None or not evicted:
        return _cost(shape, length, lossless, 0, 0)
    state = shape.head_size**2 * shape.heads
    per_token = 2 * state + COUNTED_GATES[memory] * shape.hidden * shape.heads
    return _cost(shape, length, lossless, state, 2 * evicted * per_token)


def _cost(shape: ModelShape, length: int, lossless: int, state_elements: int, memory_flops: int) -> PaperCost:
    # `state_elements` and `memory_flops` of a layer come on top of attention to `lossless` tokens.
    seen = min(length, lossless)
    projections = 4 * length * shape.hidden * shape.head_size * (shape.heads + shape.kv_heads)
    attention = 2 * shape.head_size * shape.heads * (seen**2 + 2 * (length - seen) * seen)
    mixing = shape.layers * (projections + attention + memory_flops)
    mlp = 6 * length * shape.hidden * shape.intermediate
    vocabulary = 2 * 2 * length * shape.hidden * shape.vocabulary
    elements = 2 * seen * shape.head_size * shape.kv_heads + state_elements
    return PaperCost(mixing, mixing + shape.layers * mlp + vocabulary, shape.layers * elements * BYTES_PER_ELEMENT)
