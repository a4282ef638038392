"""An AHN layer on the CPU: write the pages, attend, absorb, read, add.

Chunks in plain torch, batched over requests and chunk-parallel over tokens; steps in a kernel that is compiled for this
CPU, or in plain torch where there is no compiler. Attention is vLLM's own paged kernel, beyond the
window too wherever sinks and window fill blocks.
"""

from pathlib import Path
from typing import Any

import torch
from vllm import _custom_ops as ops
from vllm import envs
from vllm.config import VllmConfig
from vllm.v1.attention.backend import AttentionCGSupport

from vllm_ahn.attention.core import Layer, LayerInputs
from vllm_ahn.attention.cpu.plan import CPUPlan, CPUPlanner, Pass
from vllm_ahn.attention.paged.cpu import CPUAttention, attention_isa
from vllm_ahn.cache.specs import AHNWindowSpec
from vllm_ahn.device import compiles_kernels
from vllm_ahn.kernels import chunk_recurrence, l2_normalize
from vllm_ahn.kernels.pages import StatePages, WindowPages
from vllm_ahn.kernels.recurrence import settled as torch_form
from vllm_ahn.kernels.recurrence.absorbed import Absorbed
from vllm_ahn.kernels.settled import Settling
from vllm_ahn.kernels.steps import Steps
from vllm_ahn.kernels.steps_cpu import ReadOut, absorb_and_read_steps, load
from vllm_ahn.memory.base import Memory
from vllm_ahn.memory.router import Router

Places = tuple[torch.Tensor, WindowPages, torch.Tensor, StatePages, torch.Tensor]
"""The batch's memory queries, the window's pages and block table, the state's pages and block table."""

CHUNK_SIZE = 32
"""Tokens that the recurrence treats at once: a fifth faster than 64 on heads of 64 and of 128."""


class CPUCore:
    """See :class:`Core`."""

    compiles = False

    def __init__(self) -> None:
        self.library = load(Path(envs.VLLM_CACHE_ROOT) / "vllm_ahn") if compiles_kernels() else None

    def cudagraph_support(self, vllm_config: VllmConfig) -> AttentionCGSupport:
        return AttentionCGSupport.NEVER

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
        if memory is None or not (plan.passes or plan.steps):
            return

        z = inputs.z
        assert layer.state is not None and layer.state.pages is not None and state_table is not None and z is not None
        where: Places = (inputs.memory_query, pages, plan.block_table, layer.state.pages, state_table)
        for each in plan.passes:
            o = absorb_and_read_pass(*where, each, memory=memory, settling=plan.spec.settling)
            m = contribution(memory, layer.router, o, z[each.tokens], each.positions, plan.spec)
            output[each.tokens] += m
        if plan.steps is not None:
            self._step(layer, memory, inputs, plan, plan.steps, where)

    def _step(
        self, layer: Layer, memory: Memory, inputs: LayerInputs, plan: CPUPlan, steps: Steps, where: Places
    ) -> None:
        """Absorb and read the queries that step, and add what is read to the output."""
        z, output, settling = inputs.z, inputs.output, plan.spec.settling
        assert z is not None
        rule: dict[str, Any] = {"memory": memory.spec, "settling": settling, "scale": memory.scale}
        rule["A_log"] = memory.decay_of_rate
        if self.library is None:
            o = torch_form.absorb_and_read_steps(*where, steps, **rule)
        elif memory.spec.norm_all_heads:  # over the heads of all ranks
            o = absorb_and_read_steps(self.library, *where, steps, **rule)
        else:
            router = None if layer.router is None else layer.router(steps.positions, settling.window, settling.sinks)
            read_out = ReadOut(output, z, memory.norm.weight, memory.out_proj.weight, router)
            absorb_and_read_steps(self.library, *where, steps, **rule, read_out=read_out)
            return
        output[steps.tokens] += contribution(memory, layer.router, o, z[steps.tokens], steps.positions, plan.spec)


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


def absorb_and_read_pass(
    query: torch.Tensor,
    window_pages: WindowPages,
    window_table: torch.Tensor,
    state_pages: StatePages,
    state_table: torch.Tensor,
    stretches: Pass,
    *,
    memory: Memory,
    settling: Settling,
) -> torch.Tensor:
    """Absorb stretches from one boundary of each state to another, and read after each token that has a query.

    Args:
        query: ``[num_tokens, num_heads, head_size]``, the batch's memory queries.
        window_pages: pages that hold the absorbed tokens.
        window_table: ``[num_requests, width]`` int32, the window group's block table.
        state_pages: pages of the states, updated.
        state_table: ``[num_requests, >= num_slots * num_pages]`` int32, the state group's block table.
        stretches: which.
        memory: the layer's memory.
        settling: the rule of boundaries and slots.

    Returns:
        ``o [N, num_heads, head_size]`` float32, before norm and gate, in the order of ``stretches.tokens``.
    """
    tables, slots = window_table[stretches.requests], state_table[stretches.requests]
    tokens = Absorbed.read(window_pages, tables, stretches.absorbed, stretches.valid, memory.spec, memory.decay_of_rate)
    q = query.new_zeros((*stretches.valid.shape, *query.shape[1:]), dtype=torch.float32)
    q.flatten(0, 1)[stretches.rows] = l2_normalize(query[stretches.tokens])
    state = None
    if not stretches.fresh.all():
        state = state_pages.gather(state_pages.slots(slots, settling.slot(stretches.sources)))
        # What the pages of a fresh state held before is not zero times anything: it may be NaN.
        state.masked_fill_(stretches.fresh[:, None, None, None], 0.0)
    o, state = chunk_recurrence(
        q,
        tokens.k,
        tokens.v,
        tokens.g,
        tokens.b,
        memory.scale,
        memory.spec.delta,
        state,
        CHUNK_SIZE,
    )
    state_pages.scatter(state_pages.slots(slots, settling.slot(stretches.targets)), state)
    return o.flatten(0, 1)[stretches.rows]


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
