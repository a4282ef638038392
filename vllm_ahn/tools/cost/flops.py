"""FLOPs of a prefill as this implementation computes it, a multiply-add counted as two.

Unlike the paper's count (``paper.py``) this one has the memory's projections of every token and all products of the
recurrence, and less for the vocabulary: an embedding is looked up, and logits are computed of the last token only. The
recurrence is counted token by token; the chunk-parallel kernels of a prefill do more work than that, faster.
"""

from __future__ import annotations

from vllm_ahn.config import AHNConfig
from vllm_ahn.memory.spec import MEMORIES
from vllm_ahn.tools.cost.shape import ModelShape


def mixing_flops(shape: ModelShape, length: int, config: AHNConfig | None) -> int:
    """Count what the attention layers compute for `length` tokens: projections, attention and memory.

    `config` None is full attention.
    """
    projections = 4 * length * shape.hidden * shape.head_size * (shape.heads + shape.kv_heads)
    full_layers = shape.layers if config is None else len(config.full_attention_layers)
    flops = shape.layers * projections + full_layers * _attention(shape, visible_pairs(length, length))
    if config is not None:
        one_layer = _attention(shape, visible_pairs(length, config.capacity)) + memory_flops(shape, length, config)
        flops += (shape.layers - full_layers) * one_layer
    return flops


def model_flops(shape: ModelShape, length: int, config: AHNConfig | None) -> int:
    """Count the whole model's, up to the logits of the last token; as `mixing_flops`."""
    mlp = 6 * length * shape.hidden * shape.intermediate
    return mixing_flops(shape, length, config) + shape.layers * mlp + 2 * shape.hidden * shape.vocabulary


def visible_pairs(length: int, lossless: int) -> int:
    """Count pairs of a query and a key it sees, among `length` tokens of which each sees at most `lossless`."""
    seen = min(length, lossless)
    return seen * (seen + 1) // 2 + (length - seen) * seen


def memory_flops(shape: ModelShape, length: int, config: AHNConfig) -> int:
    """Count one layer's memory: projections of all tokens, and past ``W + S`` a token absorbed and a read for each."""
    if config.memory is None:
        return 0
    memory = MEMORIES[config.memory]
    products = 2 if memory.delta else 1  # k u^T, and with the delta rule M^T k before it
    products += 2  # M^T q, and what is read times o_proj
    state = shape.heads * shape.head_size**2
    flops = 2 * length * shape.hidden * shape.heads * len(memory.projections)
    if config.use_q_proj:
        flops += 2 * length * state
    return flops + 2 * max(0, length - config.capacity) * products * state


def _attention(shape: ModelShape, pairs: int) -> int:
    return 4 * shape.head_size * shape.heads * pairs
