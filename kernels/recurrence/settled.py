"""Steps in plain torch: what `vllm_ahn.kernels.settled` says, for many requests at once.

`vllm_ahn.kernels.steps_cpu` does the same in one compiled kernel. This form serves where there is no compiler.
"""

import torch

from vllm_ahn.kernels.pages import StatePages, WindowPages
from vllm_ahn.kernels.recurrence.absorbed import Absorbed
from vllm_ahn.kernels.recurrence.chunk import LOWEST_DECAY
from vllm_ahn.kernels.recurrence.norm import l2_normalize
from vllm_ahn.kernels.settled import GRANULARITY, Settling
from vllm_ahn.kernels.steps import Steps
from vllm_ahn.memory.spec import MemorySpec


def absorb_and_read_steps(
    query: torch.Tensor,
    window_pages: WindowPages,
    window_table: torch.Tensor,
    state_pages: StatePages,
    state_table: torch.Tensor,
    steps: Steps,
    *,
    memory: MemorySpec,
    settling: Settling,
    scale: float,
    A_log: torch.Tensor | None = None,
) -> torch.Tensor:
    """Absorb one token before each query, then read; write the state where a boundary is crossed.

    Args:
        query: ``[num_tokens, H, D]``, the batch's memory queries, any float dtype; normalised here, as keys are.
        window_pages: the layer's window pages.
        window_table: ``[num_requests, width]`` int32, the window group's block table.
        state_pages: the layer's state pages, updated.
        state_table: ``[num_requests, >= num_slots * num_pages]`` int32, the state group's block table.
        steps: which queries.
        memory: which memory.
        settling: the rule of boundaries and slots.
        scale: factor on what is read.
        A_log: ``[H]`` float32, where the decay is made of the rate.

    Returns:
        ``o [N, H, D]`` float32, before norm and gate, in the order of ``steps.tokens``.
    """
    requests, computed, lens = steps.requests, steps.computed, steps.lens
    source, target = settling.boundary(computed), settling.boundary(computed + lens)
    first = settling.absorbed(source)  # what the state in the pages has not absorbed begins here
    num_pending = computed - settling.window - first
    slots = state_table[requests]
    source_pages = state_pages.slots(slots, settling.slot(source))
    target_pages = state_pages.slots(slots, settling.slot(target))

    # G places for pending tokens and behind them one for each new token, of each request.
    most, places = int(lens.max()), torch.arange(GRANULARITY)
    new = torch.arange(most)
    positions = torch.cat((first.unsqueeze(-1) + places, (first + num_pending).unsqueeze(-1) + new), 1)
    pending = places < num_pending.unsqueeze(-1)
    valid = torch.cat((pending, new < lens.unsqueeze(-1)), 1)
    tokens = Absorbed.read(window_pages, window_table[requests], positions, valid, memory, A_log)
    batch, length, kv_heads, size = tokens.k.shape
    heads = query.shape[1]
    group = heads // kv_heads

    q = query.new_zeros((batch, most, heads, size))
    q[steps.owners, steps.within] = query[steps.tokens]
    q = l2_normalize(q).view(batch, most, kv_heads, group, size).permute(0, 2, 3, 1, 4)  # [R, Hkv, group, Q, D]
    k = tokens.k.transpose(1, 2)  # [R, Hkv, T, D]
    k_new = k[:, :, None, GRANULARITY:].expand(-1, -1, group, -1, -1)
    v_new = tokens.v[:, GRANULARITY:].transpose(1, 2).unsqueeze(2)  # [R, Hkv, 1, Q, D]
    both = torch.cat((k_new, q), 3)  # keys and queries see the same things

    def by_head(x: torch.Tensor) -> torch.Tensor:
        """``[R, T, H]`` to ``[R, Hkv, group, T]``."""
        return x.transpose(1, 2).unflatten(1, (kv_heads, group))

    b = by_head(tokens.b)
    sums = by_head(tokens.g).double().clamp(min=LOWEST_DECAY).cumsum(-1)
    # What is left of token j when token i, of the new ones, has been absorbed; for j behind i nothing.
    causal = torch.arange(length) <= GRANULARITY + new.unsqueeze(-1)
    left = torch.where(causal, sums[..., GRANULARITY:, None] - sums[..., None, :], -torch.inf).exp().float()
    of_state = sums[..., GRANULARITY:, None].exp().float()

    state = state_pages.gather(source_pages).unflatten(1, (kv_heads, group))
    # What the pages of a fresh state hold is not zero times anything: it may be NaN.
    state.masked_fill_((first == settling.sinks)[:, None, None, None, None], 0.0)
    seen_k, seen_q = (both @ state).split(most, 3)
    scores_k, scores_q = (both @ k.transpose(-1, -2).unsqueeze(2)).split(most, 3)
    scores_q = scores_q * left
    if memory.delta:
        kept = state_pages.gather_kept(source_pages).unflatten(1, (kv_heads, group))
        kept.masked_fill_(~pending[:, None, None, :, None], 0.0)
        scores_k = scores_k * left
        wanted = v_new - of_state * seen_k - scores_k[..., :GRANULARITY] @ kept
        u_new = b[..., GRANULARITY:, None] * wanted
        if most > 1:
            among = (b[..., GRANULARITY:, None] * scores_k[..., GRANULARITY:]).tril(-1)
            u_new = torch.linalg.solve_triangular(among, u_new, upper=False, unitriangular=True)
        u = torch.cat((kept, u_new), 3)
    else:
        u = b.unsqueeze(-1) * tokens.v.transpose(1, 2).unsqueeze(2)
    o = scale * (of_state * seen_q + scores_q @ u)

    if memory.delta:
        _keep(state_pages, steps, settling, u[..., GRANULARITY:, :].flatten(1, 2), source_pages, target_pages)
    if (crossing := (target > source).nonzero().squeeze(-1)).numel():
        count = settling.absorbed(target) - first
        order = torch.cat((places.expand(batch, -1), num_pending.unsqueeze(-1) + new), 1)
        settles = (valid & (order < count.unsqueeze(-1)))[crossing][:, None, None]
        sums = sums[crossing]
        end = torch.where(settles, sums, torch.inf).amin(-1, keepdim=True)  # sums only fall
        weights = torch.where(settles, end - sums, -torch.inf).exp().float()
        keys = k[crossing].unsqueeze(2) * weights.unsqueeze(-1)
        settled = end.exp().float().unsqueeze(-1) * state[crossing] + keys.transpose(-1, -2) @ u[crossing]
        state_pages.scatter(target_pages[crossing], settled.flatten(1, 2))
    return o.flatten(1, 2).transpose(1, 2)[steps.owners, steps.within]


def _keep(
    pages: StatePages,
    steps: Steps,
    settling: Settling,
    updates: torch.Tensor,
    source_pages: torch.Tensor,
    target_pages: torch.Tensor,
) -> None:
    """Write new updates ``[R, H, Q, D]`` behind the state of the boundary that they come after."""
    owners = steps.owners
    token = steps.positions - settling.window
    source = settling.boundary(steps.computed)[owners]
    target = settling.boundary(steps.computed + steps.lens)[owners]
    first, behind = settling.absorbed(source), token >= settling.absorbed(target)
    row = torch.where(behind, token - settling.absorbed(target), token - first)
    # Those before a boundary that is crossed count only for a step that is taken back, if that boundary is left at all.
    wanted = behind | (settling.slot(source) != settling.slot(target))
    where = torch.where(behind.unsqueeze(-1), target_pages[owners], source_pages[owners])
    pages.scatter_kept(where[wanted], updates.transpose(1, 2)[owners, steps.within][wanted], row[wanted])
