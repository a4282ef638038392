"""Runs a layer's kernels before the first request needs them, where they are compiled and tuned at their first launch.

vLLM warms up with prompts of a few tokens, none of which reaches the memory: without this, the first long request would
wait for the compiler.
"""

import torch
from vllm.utils.math_utils import cdiv
from vllm.v1.attention.backend import CommonAttentionMetadata

from vllm_ahn.attention.core import Layer, LayerInputs
from vllm_ahn.cache.layer import settling
from vllm_ahn.cache.specs import window_spec
from vllm_ahn.kernels.settled import GRANULARITY

CHUNK = 130
"""New tokens of the request that brings a chunk, more than two of the chunk kernels' own chunks."""

_warm: set[tuple[object, ...]] = set()


def warm_up_once(layer: Layer) -> None:
    """:func:`warm_up`, unless nothing is compiled or a layer like this one has been warmed up."""
    assert layer.pages is not None and layer.state is not None and layer.state.pages is not None
    kind = (
        type(layer.memory),
        layer.router is None,
        layer.pages.layout,
        layer.pages.pages.device,
        layer.state.pages.layout,
    )
    if layer.core.compiles and kind not in _warm:
        _warm.add(kind)
        warm_up(layer)


def warm_up(layer: Layer) -> None:
    """Run a step of a decode and a chunk beyond ``W + S``, and one of decodes alone, all in block 0.

    vLLM never gives block 0 to a request.
    """
    assert layer.state is not None
    pages, state_pages, memory = layer.pages, layer.state.pages, layer.memory
    assert pages is not None and state_pages is not None and memory is not None
    layout, config = pages.layout, layer.config
    rule = settling(config, block_size=layout.block_size, vllm_config=layer.vllm_config)
    max_drafts = layer.vllm_config.num_speculative_tokens
    spec = window_spec(layout, rule, max_drafts=max_drafts)
    device = pages.pages.device
    planner = layer.core.make_planner(spec, layer.vllm_config, device)
    state_table = torch.zeros((2, rule.num_slots * state_pages.layout.num_pages), dtype=torch.int32, device=device)
    few = 1 + max_drafts
    # Not at a boundary, so that some of the chunk's queries step.
    chunk = CHUNK if (config.capacity + CHUNK) % GRANULARITY else CHUNK + 1
    for query_lens in ((few, chunk), (few, few)):
        starts = torch.tensor((0, query_lens[0], sum(query_lens)), dtype=torch.int32)
        seq_lens = torch.tensor(query_lens, dtype=torch.int32) + config.capacity
        num_tokens, max_len = sum(query_lens), int(seq_lens.max())
        common = CommonAttentionMetadata(
            query_start_loc=starts.to(device),
            query_start_loc_cpu=starts,
            seq_lens=seq_lens.to(device),
            seq_lens_cpu_upper_bound=seq_lens,
            num_reqs=2,
            num_actual_tokens=num_tokens,
            max_query_len=max(query_lens),
            max_seq_len=max_len,
            block_table_tensor=torch.zeros((2, cdiv(max_len, layout.block_size)), dtype=torch.int32, device=device),
            slot_mapping=torch.zeros(num_tokens, dtype=torch.int64, device=device),
        )
        query = torch.ones((num_tokens, layer.num_heads, layout.head_size), dtype=layout.dtype, device=device)
        key = query[:, : layout.num_kv_heads].contiguous()
        gates = torch.zeros((num_tokens, layer.num_heads, memory.spec.num_gates), device=device)
        z = torch.zeros((num_tokens, layer.num_heads), device=device)
        output = torch.empty_like(query)
        inputs = LayerInputs(query, key, key, query, gates, z, output)
        layer.core.run(layer, inputs, planner.plan(common), state_table)
