"""An AHN layer's core on the CPU: write the pages, attend, absorb, read, add.

Plain torch, batched over requests and chunk-parallel over tokens. Attention is vLLM's own paged kernel, past the window
too wherever sinks and window fill blocks.
"""

from typing import TYPE_CHECKING

import torch
from torch.nn import functional as F
from vllm import _custom_ops as ops

from vllm_ahn.attention.cpu.batch import AHNMetadata, Chunk, ChunkKeys, DecodeBatch, DecodeKeys, PagedBatch
from vllm_ahn.attention.cpu.isa import attention_isa
from vllm_ahn.kernels import chunk_recurrence, l2_normalize, recurrent_step
from vllm_ahn.kernels.pages import StatePages, WindowPages
from vllm_ahn.memory.base import Memory
from vllm_ahn.memory.router import Router

if TYPE_CHECKING:
    from vllm_ahn.attention.layer import AHNAttention


def run(
    layer: "AHNAttention",
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    memory_query: torch.Tensor,
    gates: torch.Tensor | None,
    z: torch.Tensor | None,
    output: torch.Tensor,
    metadata: AHNMetadata,
    state_table: torch.Tensor | None,
) -> None:
    """The operation itself, on tensors split by heads; writes ``output``.

    Shapes are those of :meth:`AHNAttention.forward`; ``metadata`` is what this core's planner made of the step,
    ``state_table`` the state group's block table, None where no layer has a memory.
    """
    pages, memory = layer.pages, layer.memory
    assert pages is not None
    tokens = slice(metadata.num_tokens)
    query, output, memory_query = query[tokens], output[tokens], memory_query[tokens]
    write_pages(pages, key[tokens], value[tokens], None if gates is None else gates[tokens], metadata)
    if layer.full_attention:
        assert metadata.everything is not None
        attend_paged(pages, query, output, metadata.everything, layer.scale)
        return
    attend(pages, query, output, metadata, layer.scale)
    if memory is None or (metadata.decodes is None and not metadata.chunks):
        return

    assert layer.state is not None and layer.state.pages is not None and state_table is not None and z is not None
    where = (memory, pages, layer.state.pages, state_table, memory_query)
    if (batch := metadata.decodes) is not None:
        o = absorb_and_read_decodes(*where, batch)
        output[batch.rows] += contribution(memory, layer.router, o, z[batch.rows], batch.positions)
    for chunk in metadata.chunks:
        o = absorb_and_read_chunk(*where, chunk)
        reads = slice(chunk.first_row, chunk.last_row)
        output[reads] += contribution(memory, layer.router, o, z[reads], chunk.read_positions())


def reserve(layer: "AHNAttention", query: torch.Tensor) -> None:
    """Nothing: on CPUs vLLM sizes its cache by what the machine has."""


def warm_up_once(layer: "AHNAttention") -> None:
    """Nothing: there is no compiler to wait for."""


def write_pages(
    pages: WindowPages,
    key: torch.Tensor,
    value: torch.Tensor,
    gates: torch.Tensor | None,
    metadata: AHNMetadata,
) -> None:
    """Store new tokens in the window pages.

    Args:
        pages: the layer's pages.
        key: ``[num_tokens, num_kv_heads, head_size]``, after RoPE.
        value: shaped like ``key``.
        gates: ``[num_tokens, num_heads, num_gates]`` float32, or None for a layer without memory.
        metadata: the step's plan.
    """
    # A recycled block may hold anything, for instance float32 state read as bfloat16, one in 550 of which is NaN. A
    # masked NaN still spoils a product, so a block that this step begins and does not fill is cleared first.
    if metadata.new_blocks is not None:
        pages.pages.index_fill_(0, metadata.new_blocks, 0)
    isa = attention_isa(pages.layout.block_size, pages.layout.head_size)
    ops.cpu_attn_reshape_and_cache(key, value, pages.keys, pages.values, metadata.slot_mapping, isa)
    if gates is not None:
        by_kv_head = gates.reshape(len(gates), pages.layout.num_kv_heads, -1).to(pages.layout.dtype)
        pages.gates[metadata.blocks, :, metadata.offsets] = by_kv_head


def attend(pages: WindowPages, query: torch.Tensor, output: torch.Tensor, metadata: AHNMetadata, scale: float) -> None:
    """Attention of all requests' queries to sinks and window, ``[num_tokens, num_heads, head_size]``."""
    for paged in (metadata.inside, metadata.past):
        if paged is not None:
            attend_paged(pages, query, output, paged, scale)
    if (batch := metadata.decodes) is not None and batch.keys is not None:
        attend_decodes(pages, query, output, batch.rows, batch.keys, scale)
    for chunk in metadata.chunks:
        for keys in chunk.keys:
            attend_chunk(pages, query, output, keys, scale)


def attend_paged(
    pages: WindowPages, query: torch.Tensor, output: torch.Tensor, batch: PagedBatch, scale: float
) -> None:
    """Causal attention of a batch by vLLM's kernel, on the pages where they are.

    ``query`` and ``output`` are ``[num_tokens, num_heads, head_size]``; the batch's rows of ``output`` are written.
    """
    rows = batch.rows
    attended = output if rows is None else output.new_empty((len(rows), *output.shape[1:]))
    ops.cpu_attention_with_kv_cache(
        query=query if rows is None else query[rows],
        key_cache=pages.keys,
        value_cache=pages.values,
        output=attended,
        query_start_loc=batch.query_start_loc,
        seq_lens=batch.seq_lens,
        scale=scale,
        causal=True,
        alibi_slopes=None,
        sliding_window=batch.sliding_window,
        block_table=batch.block_table,
        softcap=0,
        scheduler_metadata=batch.scheduler_metadata,
        s_aux=None,
    )
    if rows is not None:
        output[rows] = attended


def attend_chunk(pages: WindowPages, query: torch.Tensor, output: torch.Tensor, keys: ChunkKeys, scale: float) -> None:
    """Attention of some of one request's queries over gathered keys; their rows of ``output`` are written."""
    rows = slice(keys.start, keys.end)
    attended = F.scaled_dot_product_attention(
        query[rows].transpose(0, 1).unsqueeze(0),
        pages.keys_transposed[keys.blocks].permute(1, 0, 3, 2).flatten(1, 2).unsqueeze(0),
        pages.values[keys.blocks].transpose(0, 1).flatten(1, 2).unsqueeze(0),
        attn_mask=keys.visible,
        scale=scale,
        enable_gqa=True,
    )
    output[rows] = attended.squeeze(0).transpose(0, 1)


def attend_decodes(
    pages: WindowPages,
    query: torch.Tensor,
    output: torch.Tensor,
    rows: torch.Tensor,
    keys: DecodeKeys,
    scale: float,
) -> None:
    """Attention of one query of each request over gathered keys; the ``rows`` of ``output`` are written."""
    keys_by_head = pages.keys_transposed[keys.blocks].permute(0, 2, 3, 1, 4).flatten(3)
    values = pages.values[keys.blocks].transpose(1, 2).flatten(2, 3)
    queries = query[rows].unflatten(1, (pages.layout.num_kv_heads, -1))
    scores = (queries @ keys_by_head).float() * scale
    scores.masked_fill_(~keys.visible[:, None, None], -torch.inf)
    output[rows] = (scores.softmax(-1).to(values.dtype) @ values).flatten(1, 2)


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
    tokens = slice(chunk.evicted_offset, chunk.evicted_offset + chunk.num_reads)
    blocks = chunk.evicted_blocks
    keys = window_pages.keys_transposed[blocks].permute(0, 3, 1, 2).flatten(0, 1)[tokens]
    values = window_pages.values[blocks].transpose(1, 2).flatten(0, 1)[tokens]
    gates = window_pages.gates[blocks].transpose(1, 2).flatten(0, 1)[tokens]
    g, b = memory.decay_and_rate(gates.float().reshape(chunk.num_reads, memory.num_heads, memory.spec.num_gates))
    page_ids = state_table[chunk.request, : state_pages.layout.num_pages].long().unsqueeze(0)
    o, state = chunk_recurrence(
        l2_normalize(query[chunk.first_row : chunk.last_row]).unsqueeze(0),
        l2_normalize(keys).unsqueeze(0),
        values.unsqueeze(0),
        g.unsqueeze(0),
        b.unsqueeze(0),
        memory.scale,
        memory.spec.delta,
        None if chunk.first_read else state_pages.gather(page_ids),
    )
    state_pages.scatter(page_ids, state)
    return o.squeeze(0)


def absorb_and_read_decodes(
    memory: Memory,
    window_pages: WindowPages,
    state_pages: StatePages,
    state_table: torch.Tensor,
    query: torch.Tensor,
    batch: DecodeBatch,
) -> torch.Tensor:
    """Absorb one token of each request, then read; the batched form of :func:`absorb_and_read_chunk`.

    Returns:
        ``o [R, num_heads, head_size]`` float32, before norm and gate.
    """
    where = (batch.evicted_blocks, slice(None))
    keys = window_pages.keys_transposed[(*where, slice(None), batch.evicted_offsets)]
    values = window_pages.values[(*where, batch.evicted_offsets)]
    gates = window_pages.gates[(*where, batch.evicted_offsets)]
    g, b = memory.decay_and_rate(gates.float().reshape(len(gates), memory.num_heads, memory.spec.num_gates))
    page_ids = state_table[batch.requests, : state_pages.layout.num_pages].long()
    state = state_pages.gather(page_ids)
    # What the pages of a new state held before is not zero times anything: it may be NaN.
    state.masked_fill_(batch.first_read[:, None, None, None], 0.0)
    o, state = recurrent_step(
        l2_normalize(query[batch.rows]), l2_normalize(keys), values, g, b, memory.scale, memory.spec.delta, state
    )
    state_pages.scatter(page_ids, state)
    return o


def contribution(
    memory: Memory, router: Router | None, o: torch.Tensor, z: torch.Tensor, positions: torch.Tensor
) -> torch.Tensor:
    """Norm, gate, project and weigh what was read.

    Args:
        memory: the layer's memory.
        router: weighs it against the attention output, or None for an even sum.
        o: ``[n, num_heads, head_size]`` float32, from the recurrence.
        z: ``[n, num_heads]`` float32, read-out gates of the reading tokens.
        positions: ``[n]`` int64, theirs.

    Returns:
        What to add to the attention output, ``[n, num_heads, head_size]`` in the model dtype.
    """
    m = memory.read_out(o, z)
    return m if router is None else m * router(positions).unsqueeze(-1).to(m.dtype)
