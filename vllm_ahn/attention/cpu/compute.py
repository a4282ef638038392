"""An AHN layer on the CPU: write the pages, attend, absorb, read, add.

Plain torch, batched over requests and chunk-parallel over tokens. Attention is vLLM's own paged kernel, beyond the
window too wherever sinks and window fill blocks.
"""

import torch
from vllm import _custom_ops as ops
from vllm.config import VllmConfig
from vllm.v1.attention.backend import AttentionCGSupport

from vllm_ahn.attention.core import Layer, LayerInputs
from vllm_ahn.attention.cpu.plan import Chunk, CPUPlan, CPUPlanner, Decodes
from vllm_ahn.attention.paged.cpu import CPUAttention, attention_isa
from vllm_ahn.cache.specs import AHNWindowSpec
from vllm_ahn.kernels import chunk_recurrence, l2_normalize, recurrent_step
from vllm_ahn.kernels.pages import StatePages, WindowPages
from vllm_ahn.memory.base import Memory
from vllm_ahn.memory.router import Router


class CPUCore:
    """See :class:`Core`."""

    cudagraph_support = AttentionCGSupport.NEVER
    compiles = False

    def make_planner(self, spec: AHNWindowSpec, vllm_config: VllmConfig, device: torch.device) -> CPUPlanner:
        model = vllm_config.model_config
        num_heads = model.get_num_attention_heads(vllm_config.parallel_config)
        return CPUPlanner(spec, CPUAttention(spec, num_heads=num_heads, dtype=model.dtype))

    def reserve(self, layer: Layer, query: torch.Tensor) -> None:
        """Nothing: on CPUs vLLM sizes its cache by what the machine has."""

    def run(self, layer: Layer, inputs: LayerInputs, plan: CPUPlan, state_table: torch.Tensor | None) -> None:
        pages, memory = layer.pages, layer.memory
        assert pages is not None
        tokens = slice(plan.num_tokens)
        query, output = inputs.query[tokens], inputs.output[tokens]
        gates = None if inputs.gates is None else inputs.gates[tokens]
        write_pages(pages, inputs.key[tokens], inputs.value[tokens], gates, plan)
        if layer.full_attention:
            assert plan.causal is not None
            plan.attention.attend(pages, query, output, plan.causal, layer.scale)
            return
        for spans in plan.windowed:
            plan.attention.attend(pages, query, output, spans, layer.scale)
        if memory is None or (plan.decodes is None and not plan.chunks):
            return

        z = inputs.z
        assert layer.state is not None and layer.state.pages is not None and state_table is not None and z is not None
        where = (memory, pages, layer.state.pages, state_table, inputs.memory_query)
        if (decodes := plan.decodes) is not None:
            o = absorb_and_read_decodes(*where, decodes)
            m = contribution(memory, layer.router, o, z[decodes.tokens], decodes.positions, plan.spec)
            output[decodes.tokens] += m
        for chunk in plan.chunks:
            o = absorb_and_read_chunk(*where, chunk)
            m = contribution(memory, layer.router, o, z[chunk.tokens], chunk.positions(), plan.spec)
            output[chunk.tokens] += m


def write_pages(
    pages: WindowPages, key: torch.Tensor, value: torch.Tensor, gates: torch.Tensor | None, plan: CPUPlan
) -> None:
    """Store new tokens in the window pages.

    Args:
        pages: the layer's pages.
        key: ``[num_tokens, num_kv_heads, head_size]``, after RoPE.
        value: shaped like ``key``.
        gates: ``[num_tokens, num_heads, num_gates]`` float32, or None for a layer without memory.
        plan: the step's.
    """
    # A recycled block may hold anything, for instance float32 state read as bfloat16, one in 550 of which is NaN. A
    # masked NaN still spoils a product, so a block that this step begins and does not fill is cleared first.
    if plan.new_blocks is not None:
        pages.pages.index_fill_(0, plan.new_blocks, 0)
    isa = attention_isa(pages.layout.block_size, pages.layout.head_size)
    ops.cpu_attn_reshape_and_cache(key, value, pages.keys, pages.values, plan.slot_mapping, isa)
    if gates is not None:
        by_kv_head = gates.reshape(len(gates), pages.layout.num_kv_heads, -1).to(pages.layout.dtype)
        pages.gates[plan.blocks, :, plan.offsets] = by_kv_head


def absorb_and_read_chunk(
    memory: Memory,
    window_pages: WindowPages,
    state_pages: StatePages,
    state_table: torch.Tensor,
    query: torch.Tensor,
    chunk: Chunk,
) -> torch.Tensor:
    """Absorb what a chunk evicts, one token before each of its reads.

    Args:
        memory: the layer's memory.
        window_pages: pages that hold the evicted tokens.
        state_pages: pages of the states.
        state_table: ``[num_requests, >= num_pages]``, the state group's block table.
        query: ``[num_tokens, num_heads, head_size]``, the batch's memory queries.
        chunk: the request.

    Returns:
        ``o [num_reads, num_heads, head_size]`` float32, before norm and gate.
    """
    num_reads = chunk.stretch.length
    tokens = slice(chunk.evicted_offset, chunk.evicted_offset + num_reads)
    blocks = chunk.evicted_blocks
    keys = window_pages.keys_transposed[blocks].permute(0, 3, 1, 2).flatten(0, 1)[tokens]
    values = window_pages.values[blocks].transpose(1, 2).flatten(0, 1)[tokens]
    gates = window_pages.gates[blocks].transpose(1, 2).flatten(0, 1)[tokens]
    g, b = memory.decay_and_rate(gates.float().reshape(num_reads, memory.num_heads, memory.spec.num_gates))
    page_ids = state_table[chunk.stretch.request, : state_pages.layout.num_pages].long().unsqueeze(0)
    o, state = chunk_recurrence(
        l2_normalize(query[chunk.tokens]).unsqueeze(0),
        l2_normalize(keys).unsqueeze(0),
        values.unsqueeze(0),
        g.unsqueeze(0),
        b.unsqueeze(0),
        memory.scale,
        memory.spec.delta,
        None if chunk.fresh else state_pages.gather(page_ids),
    )
    state_pages.scatter(page_ids, state)
    return o.squeeze(0)


def absorb_and_read_decodes(
    memory: Memory,
    window_pages: WindowPages,
    state_pages: StatePages,
    state_table: torch.Tensor,
    query: torch.Tensor,
    decodes: Decodes,
) -> torch.Tensor:
    """Absorb one token of each request, then read; the batched form of :func:`absorb_and_read_chunk`.

    Returns:
        ``o [R, num_heads, head_size]`` float32, before norm and gate.
    """
    where = (decodes.evicted_blocks, slice(None))
    keys = window_pages.keys_transposed[(*where, slice(None), decodes.evicted_offsets)]
    values = window_pages.values[(*where, decodes.evicted_offsets)]
    gates = window_pages.gates[(*where, decodes.evicted_offsets)]
    g, b = memory.decay_and_rate(gates.float().reshape(len(gates), memory.num_heads, memory.spec.num_gates))
    page_ids = state_table[decodes.requests, : state_pages.layout.num_pages].long()
    state = state_pages.gather(page_ids)
    # What the pages of a new state held before is not zero times anything: it may be NaN.
    state.masked_fill_(decodes.fresh[:, None, None, None], 0.0)
    o, state = recurrent_step(
        l2_normalize(query[decodes.tokens]), l2_normalize(keys), values, g, b, memory.scale, memory.spec.delta, state
    )
    state_pages.scatter(page_ids, state)
    return o


def contribution(
    memory: Memory,
    router: Router | None,
    o: torch.Tensor,
    z: torch.Tensor,
    positions: torch.Tensor,
    spec: AHNWindowSpec,
) -> torch.Tensor:
    """Norm, gate, project and weigh what was read.

    Args:
        memory: the layer's memory.
        router: weighs it against the attention output, or None for an even sum.
        o: ``[n, num_heads, head_size]`` float32, from the recurrence.
        z: ``[n, num_heads]`` float32, read-out gates of the reading tokens.
        positions: ``[n]`` int64, theirs.
        spec: the window group's spec.

    Returns:
        What to add to the attention output, ``[n, num_heads, head_size]`` in the model dtype.
    """
    m = memory.read_out(o, z)
    return m if router is None else m * router(positions, spec.window, spec.sinks).unsqueeze(-1).to(m.dtype)
