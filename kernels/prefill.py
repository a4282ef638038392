"""Prefill: absorb many tokens of a request and read the memory after each, chunk by chunk.

The tokens that leave the window are gathered from its pages, flash-linear-attention's chunk kernels run over them, and
states go from pages to contiguous tensors and back.
"""

import torch

from vllm_ahn.kernels.pages import StatePages, WindowPages
from vllm_ahn.kernels.prefill_gather import gather_states, gather_stretches, scatter_states
from vllm_ahn.kernels.prefill_plan import CHUNK_SIZE, PrefillPlan
from vllm_ahn.memory.spec import MemorySpec


def chunk_stretches(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor,
    b: torch.Tensor,
    states: torch.Tensor,
    plan: PrefillPlan,
    *,
    memory: MemorySpec,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Run flash-linear-attention's chunk kernels over packed stretches.

    Args:
        q, k, v, g, b: from :func:`gather_stretches`.
        states: ``[R, H, D_v, D_k]`` float32, before the first token.
        plan: of this step.
        memory: which memory.
        scale: factor on what is read.

    Returns:
        ``o [N, H, D]`` in the dtype of ``q``, and the states after the last token, like ``states``.
    """
    if memory.delta:
        from fla.ops.gated_delta_rule import chunk_gated_delta_rule

        # Also without a decay, with g = 0: the library's kernel without decay refuses float32.
        o, states = chunk_gated_delta_rule(
            *(x.unsqueeze(0) for x in (q, k, v, g, b)),
            scale=scale,
            initial_state=states,
            output_final_state=True,
            state_v_first=True,
            cu_seqlens=plan.cu_seqlens,
            chunk_indices=plan.chunk_indices,
            chunk_size=CHUNK_SIZE,
        )
        return o.squeeze(0), states

    from fla.ops.simple_gla import chunk_simple_gla

    # Over several sequences at once this one asks the device how many chunks there are, and waits for the answer in
    # every layer. There is seldom more than one long prompt in a step: one call each.
    outputs, finals = [], []
    for i, parts in enumerate(zip(*(x.split(plan.lengths) for x in (q, k, v, g)), strict=True)):
        o, final = chunk_simple_gla(
            *(x.unsqueeze(0) for x in parts),
            scale=scale,
            initial_state=states[i : i + 1],
            output_final_state=True,
            state_v_first=True,
            chunk_size=CHUNK_SIZE,
        )
        outputs.append(o.squeeze(0))
        finals.append(final)
    return (outputs[0], finals[0]) if len(outputs) == 1 else (torch.cat(outputs), torch.cat(finals))


def prefill_memory(
    query: torch.Tensor,
    window_pages: WindowPages,
    state_pages: StatePages,
    state_table: torch.Tensor,
    plan: PrefillPlan,
    *,
    memory: MemorySpec,
    scale: float,
    A_log: torch.Tensor | None = None,
) -> torch.Tensor:
    """Absorb the plan's tokens, one before each read, and read.

    Args:
        query: ``[num_tokens, H, D]``, contiguous in ``D``, the batch's memory queries.
        window_pages: the layer's window pages. What the plan's tokens need must have been written.
        state_pages: the layer's state pages, float32 or bfloat16; updated.
        state_table: ``[num_requests, >= num_slots * num_pages]`` int32, the state group's block table.
        plan: of this step.
        memory: which memory.
        scale: factor on what is read.
        A_log: ``[H]`` float32, where the decay is made of the rate.

    Returns:
        ``o [N, H, D]`` in the dtype of ``query``, contiguous, before norm and gate; ``plan.reads`` says whose.

    Raises:
        ValueError: shapes, dtypes or strides do not agree.
    """
    state_pages.check(state_table, *query.shape[1:])
    q, k, v, g, b = gather_stretches(query, window_pages, plan, memory=memory, A_log=A_log)
    states = gather_states(state_pages, state_table, plan)
    o, states = chunk_stretches(q, k, v, g, b, states, plan, memory=memory, scale=scale)
    scatter_states(states, state_pages, state_table, plan)
    return o
