"""An AHN layer on devices that run Triton: write the pages, attend, absorb, read, add.

Attention is vLLM's paged attention over compacted block tables, by Triton or FlashAttention; the memory's kernels are
this package's own.
"""

import torch
import triton
from vllm.config import VllmConfig
from vllm.distributed import tensor_model_parallel_all_reduce
from vllm.utils.math_utils import cdiv
from vllm.v1.attention.backend import AttentionCGSupport

from vllm_ahn.attention.core import Layer, LayerInputs
from vllm_ahn.attention.gpu.plan import GPUPlan, GPUPlanner, GPUSteps
from vllm_ahn.attention.paged.choose import choose_attention
from vllm_ahn.cache.specs import AHNWindowSpec
from vllm_ahn.kernels.cache_write import write_window_pages
from vllm_ahn.kernels.pages import StatePages
from vllm_ahn.kernels.prefill import prefill_memory
from vllm_ahn.kernels.prefill_plan import CHUNK_SIZE, PrefillPlan
from vllm_ahn.kernels.read_out import gated_squares, read_out
from vllm_ahn.kernels.steps_triton import absorb_and_read_steps
from vllm_ahn.memory.base import Memory


class GPUCore:
    """See :class:`Core`."""

    compiles = not triton.knobs.runtime.interpret

    def cudagraph_support(self, vllm_config: VllmConfig) -> AttentionCGSupport:
        drafts = vllm_config.num_speculative_tokens
        return AttentionCGSupport.UNIFORM_BATCH if drafts else AttentionCGSupport.UNIFORM_SINGLE_TOKEN_DECODE

    def make_planner(self, spec: AHNWindowSpec, vllm_config: VllmConfig, device: torch.device) -> GPUPlanner:
        return GPUPlanner(
            spec,
            choose_attention(spec, vllm_config, device),
            max_requests=vllm_config.scheduler_config.max_num_seqs,
            max_tokens=vllm_config.scheduler_config.max_num_batched_tokens,
            device=device,
        )

    def reserve(self, layer: Layer, query: torch.Tensor) -> None:
        if layer.memory is None:
            return
        # Inputs, outputs and what lies between of the chunk kernels, each as large as the queries, and a state a chunk.
        chunks = cdiv(len(query), CHUNK_SIZE) + 1
        states = chunks * query.shape[1] * query.shape[2] ** 2
        torch.empty(12 * query.numel() + 2 * states, dtype=query.dtype, device=query.device)

    def run(self, layer: Layer, inputs: LayerInputs, plan: GPUPlan, state_table: torch.Tensor | None) -> None:
        pages, memory = layer.pages, layer.memory
        assert pages is not None
        write_window_pages(inputs.key, inputs.value, inputs.gates, plan.slot_mapping, pages)
        # Tensors may be padded to the size of a CUDA graph, and FlashAttention takes no output longer than its queries.
        query, output = inputs.query[: plan.num_tokens], inputs.output[: plan.num_tokens]
        for spans in [plan.causal] if layer.full_attention else plan.windowed:
            plan.attention.attend(pages, query, output, spans, layer.scale)
        if memory is None:
            return
        assert layer.state is not None and layer.state.pages is not None and state_table is not None
        where = (layer, memory, layer.state.pages, state_table, inputs, plan)
        for stretches in plan.passes:
            prefill(*where, stretches)
        for steps in plan.steps:
            step(*where, steps)


def step(
    layer: Layer,
    memory: Memory,
    state_pages: StatePages,
    state_table: torch.Tensor,
    inputs: LayerInputs,
    plan: GPUPlan,
    steps: GPUSteps,
) -> None:
    """Absorb and read the queries that step, and add what is read to the output."""
    pages, output = layer.pages, inputs.output
    assert pages is not None
    o = torch.empty((*steps.tokens.shape, *output.shape[1:]), dtype=torch.float32, device=output.device)
    absorb_and_read_steps(
        inputs.memory_query,
        pages,
        plan.block_table,
        state_pages,
        state_table,
        steps.first_tokens,
        steps.counts,
        plan.seq_lens,
        o,
        memory=memory.spec,
        settling=plan.spec.settling,
        scale=memory.scale,
        requests=steps.requests,
        A_log=memory.decay_of_rate,
    )
    read(layer, memory, o.flatten(0, 1), inputs, plan, steps.tokens.flatten(), steps.positions.flatten())


def prefill(
    layer: Layer,
    memory: Memory,
    state_pages: StatePages,
    state_table: torch.Tensor,
    inputs: LayerInputs,
    plan: GPUPlan,
    stretches: PrefillPlan,
) -> None:
    """Absorb what chunks evict, one token before each read, and add what is read to the output."""
    pages = layer.pages
    assert pages is not None
    o = prefill_memory(
        inputs.memory_query,
        pages,
        state_pages,
        state_table,
        stretches,
        memory=memory.spec,
        scale=memory.scale,
        A_log=memory.decay_of_rate,
    )
    read(layer, memory, o, inputs, plan, stretches.reads, stretches.positions)


def read(
    layer: Layer,
    memory: Memory,
    o: torch.Tensor,
    inputs: LayerInputs,
    plan: GPUPlan,
    tokens: torch.Tensor,
    positions: torch.Tensor,
) -> None:
    """Norm, gate, project and weigh what was read, and add it to the output.

    Args:
        layer: the layer; its router, if it has one, weighs what was read against the attention output.
        memory: its memory.
        o: ``[num_reads, num_heads, head_size]``, from the recurrence.
        inputs: the layer's tensors; the output is updated.
        plan: the step's.
        tokens: ``[num_reads]`` int32, where in the batch the reading tokens are, -1 where nothing was read.
        positions: ``[num_reads]`` integer, their positions; not looked at without a router.
    """
    z, weights = inputs.z, None
    assert z is not None
    if layer.router is not None:
        weights = layer.router(positions, plan.spec.window, plan.spec.sinks)
    squares, norm_size = None, None
    if memory.spec.norm_all_heads:
        squares = torch.empty(len(tokens), dtype=torch.float32, device=o.device)
        gated_squares(o, z, tokens, squares)
        if memory.tp_size > 1:
            squares = tensor_model_parallel_all_reduce(squares)
        norm_size = memory.total_num_heads * memory.head_size
    read_out(
        o,
        z,
        tokens,
        memory.norm.weight,
        memory.out_proj.weight,
        inputs.output,
        squares=squares,
        norm_size=norm_size,
        router=weights,
    )
