"""Prefill: absorb many tokens of a request and read the memory after each, chunk by chunk.

The tokens that leave the window are gathered from its pages, flash-linear-attention's chunk kernels run over them, and
states go from pages to contiguous tensors and back.
"""

import torch

from .prefill_gather import gather_states, gather_stretches, scatter_states
from .prefill_plan import CHUNK_SIZE, PrefillPlan


def chunk_stretches(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor,
    b: torch.Tensor,
    states: torch.Tensor,
    plan: PrefillPlan,
    *,
    memory: str,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """flash-linear-attention's chunk kernels over packed stretches.

    Args:
        q, k, v, g, b: from :func:`gather_stretches`.
        states: ``[R, H, D_v, D_k]`` float32, before the first token.
        plan: of this step.
        memory: ``GatedDeltaNet``, ``DeltaNet`` or ``Mamba2``.
        scale: factor on what is read.

    Returns:
        ``o [N, H, D]`` in the dtype of ``q``, and the states after the last token, like ``states``.
    """
    if memory != "Mamba2":
        from fla.ops.gated_delta_rule import chunk_gated_delta_rule

        # Also for DeltaNet, with g = 0: the library's kernel without decay refuses float32.
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
    key_pages: torch.Tensor,
    value_pages: torch.Tensor,
    gate_pages: torch.Tensor,
    columns: torch.Tensor,
    state_table: torch.Tensor,
    plan: PrefillPlan,
    *,
    memory: str,
    scale: float,
    A_log: torch.Tensor | None = None,
) -> torch.Tensor:
    """Absorb the plan's tokens, one before each read, and read; states in pages are updated.

    Args:
        query: ``[num_tokens, H, D]``, contiguous in ``D``, the batch's memory queries.
        key_pages, value_pages, gate_pages: the planes of the window pages, see :func:`.write_window_pages`. What the
            plan's tokens need must have been written.
        columns: ``[num_blocks, columns_per_page, D]`` float32 or bfloat16, the state pages.
        state_table: ``[num_requests, >= num_pages]`` int32, the state group's block table.
        plan: of this step.
        memory: ``GatedDeltaNet``, ``DeltaNet`` or ``Mamba2``.
        scale: factor on what is read.
        A_log: ``[H]`` float32, for Mamba2.

    Returns:
        ``o [N, H, D]`` in the dtype of ``query``, contiguous, before norm and gate; ``plan.rows`` says whose.
    """
    q, k, v, g, b = gather_stretches(query, key_pages, value_pages, gate_pages, plan, memory=memory, A_log=A_log)
    states = gather_states(columns, state_table, query.shape[1], plan)
    o, states = chunk_stretches(q, k, v, g, b, states, plan, memory=memory, scale=scale)
    scatter_states(states, columns, state_table, plan)
    return o
