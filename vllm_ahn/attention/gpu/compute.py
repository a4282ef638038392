"""An AHN layer's core on devices that run Triton: write the pages, attend, absorb, read, add.

Window attention is vLLM's paged attention over compacted block tables, by Triton or FlashAttention; the memory's
kernels are this package's own.
"""

from typing import TYPE_CHECKING

import torch
from vllm.distributed import tensor_model_parallel_all_reduce
from vllm.utils.math_utils import cdiv

from vllm_ahn.attention.gpu.plan import AHNGpuMetadata
from vllm_ahn.attention.gpu.warm_up import warm_up_once
from vllm_ahn.kernels.cache_write import write_window_pages
from vllm_ahn.kernels.decode import decode_memory
from vllm_ahn.kernels.pages import StatePages, WindowPages
from vllm_ahn.kernels.prefill import prefill_memory
from vllm_ahn.kernels.prefill_plan import CHUNK_SIZE, PrefillPlan
from vllm_ahn.kernels.read_out import gated_squares, read_out
from vllm_ahn.memory.base import Memory
from vllm_ahn.memory.router import Router

if TYPE_CHECKING:
    from vllm_ahn.attention.layer import AHNAttention

__all__ = ["reserve", "run", "warm_up_once"]


def run(
    layer: "AHNAttention",
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    memory_query: torch.Tensor,
    gates: torch.Tensor | None,
    z: torch.Tensor | None,
    output: torch.Tensor,
    metadata: AHNGpuMetadata,
    state_table: torch.Tensor | None,
) -> None:
    """The operation itself, on tensors split by heads; writes ``output``.

    Shapes are those of :meth:`AHNAttention.forward`; ``metadata`` is what this core's planner made of the step,
    ``state_table`` the state group's block table, None where no layer has a memory.
    """
    pages, memory = layer.pages, layer.memory
    assert pages is not None
    write_window_pages(key, value, gates, metadata.slot_mapping, pages)
    rows = metadata.causal if layer.full_attention or metadata.windowed is None else metadata.windowed
    metadata.attention.attend(pages, query[: metadata.num_tokens], output, rows, layer.scale)
    if memory is None:
        return
    assert layer.state is not None and layer.state.pages is not None and state_table is not None and z is not None
    where = (layer, memory, pages, layer.state.pages, state_table, memory_query, z, output)
    if metadata.decode_rows is not None:
        decode(*where, metadata, metadata.decode_rows)
    if metadata.prefill is not None:
        prefill(*where, metadata.prefill)


def reserve(layer: "AHNAttention", query: torch.Tensor) -> None:
    """Take for a moment what the memory's prefill takes for a batch ``query [num_tokens, num_heads, head_size]``.

    vLLM finds out how much memory is left for its cache by a run without requests.
    """
    if layer.memory is None:
        return
    # Inputs, outputs and what lies between of the chunk kernels, each as large as the queries, and a state a chunk.
    chunks = cdiv(len(query), CHUNK_SIZE) + 1
    states = chunks * query.shape[1] * query.shape[2] ** 2
    torch.empty(12 * query.numel() + 2 * states, dtype=query.dtype, device=query.device)


def decode(
    layer: "AHNAttention",
    memory: Memory,
    pages: WindowPages,
    state_pages: StatePages,
    state_table: torch.Tensor,
    memory_query: torch.Tensor,
    z: torch.Tensor,
    output: torch.Tensor,
    metadata: AHNGpuMetadata,
    rows: torch.Tensor,
) -> None:
    """Absorb and read one token of each request that has a row, and add what is read to ``output``."""
    o = torch.empty((len(rows), *output.shape[1:]), dtype=torch.float32, device=output.device)
    decode_memory(
        memory_query,
        pages,
        metadata.block_table,
        state_pages,
        state_table,
        rows,
        metadata.seq_lens,
        o,
        memory=memory.spec,
        window=layer.config.window,
        sinks=layer.config.sinks,
        scale=memory.scale,
        A_log=memory.decay_of_rate,
    )
    positions = metadata.seq_lens if layer.router is None else metadata.seq_lens - 1
    read(memory, layer.router, o, z, rows, positions, output)


def prefill(
    layer: "AHNAttention",
    memory: Memory,
    pages: WindowPages,
    state_pages: StatePages,
    state_table: torch.Tensor,
    memory_query: torch.Tensor,
    z: torch.Tensor,
    output: torch.Tensor,
    plan: PrefillPlan,
) -> None:
    """Absorb what chunks evict, one token before each read, and add what is read to ``output``."""
    o = prefill_memory(
        memory_query,
        pages,
        state_pages,
        state_table,
        plan,
        memory=memory.spec,
        scale=memory.scale,
        A_log=memory.decay_of_rate,
    )
    read(memory, layer.router, o, z, plan.reads, plan.positions, output)


def read(
    memory: Memory,
    router: Router | None,
    o: torch.Tensor,
    z: torch.Tensor,
    rows: torch.Tensor,
    positions: torch.Tensor,
    output: torch.Tensor,
) -> None:
    """Norm, gate, project and weigh what was read, and add it to ``output``.

    Args:
        memory: the layer's memory.
        router: weighs it against the attention output, or None for an even sum.
        o: ``[num_reads, num_heads, head_size]``, from the recurrence.
        z: ``[num_tokens, num_heads]`` float32, read-out gates of the batch.
        rows: ``[num_reads]`` int32, the reading tokens' rows in the batch, -1 where nothing was read.
        positions: ``[num_reads]`` integer, their positions; not looked at without a router.
        output: ``[num_tokens, num_heads, head_size]``, updated.
    """
    weights = None if router is None else router(positions)
    if memory.spec.norm_all_heads:
        squares = torch.empty(len(rows), dtype=torch.float32, device=o.device)
        gated_squares(o, z, rows, squares)
        if memory.tp_size > 1:
            squares = tensor_model_parallel_all_reduce(squares)
        size = memory.total_num_heads * memory.head_size
        read_out(
            o,
            z,
            rows,
            memory.norm.weight,
            memory.out_proj.weight,
            output,
            squares=squares,
            norm_size=size,
            router=weights,
        )
    else:
        read_out(o, z, rows, memory.norm.weight, memory.out_proj.weight, output, router=weights)
