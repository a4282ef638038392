"""Kernels on pools whose offsets do not fit 32 bits, against plain indexing."""

import pytest
import torch

from support.paged_case import PagedCase, Shape, decay_and_rate, poisoned, random_gates
from vllm_ahn.kernels import l2_normalize, naive_recurrence
from vllm_ahn.kernels.cache_write import write_window_pages
from vllm_ahn.kernels.prefill_gather import gather_states, gather_stretches, scatter_states
from vllm_ahn.kernels.prefill_plan import Stretch, plan_prefill
from vllm_ahn.kernels.settled import Settling
from vllm_ahn.kernels.steps_triton import absorb_and_read_steps

SHAPE = Shape(4, 2, 64, 16, "GatedDeltaNet", torch.bfloat16)
WINDOW, SINKS, TOKENS = 30, 2, 70
RULE = Settling(WINDOW, SINKS)


@pytest.fixture(autouse=True)
def fresh_inputs() -> None:
    print("torch seed", torch.seed())


def test_pages_far_apart() -> None:
    """Written, absorbed one by one, and gathered."""
    case = PagedCase(SHAPE, 2, TOKENS, vast=True)
    assert case.cache.stride(0) * 9 > 2**31 and case.state.columns.stride(0) * 9 > 2**31
    assert int(case.window_table[:, :4].min()) >= 9
    key, value = torch.randn(2, 2 * TOKENS, SHAPE.kv_heads, SHAPE.head_size).bfloat16()
    gates = random_gates(SHAPE, 2 * TOKENS)
    positions = torch.arange(TOKENS)
    slots = torch.cat((case.slots(0, positions), case.slots(1, positions)))
    write_window_pages(key, value, gates, slots, case.window)
    blocks, offsets = slots // SHAPE.block_size, slots % SHAPE.block_size
    assert torch.equal(case.window.keys[blocks, :, offsets], key)
    assert torch.equal(case.window.values[blocks, :, offsets], value)
    assert torch.equal(case.window.gates[blocks, :, offsets], gates.reshape(2 * TOKENS, 2, -1).bfloat16())

    t = 63  # 15 tokens after the boundary: with this one the state of the next is written
    boundary = 48
    states = torch.randn(2, SHAPE.heads, SHAPE.head_size, SHAPE.head_size)
    absorbed = torch.arange(boundary - WINDOW, t + 1 - WINDOW) + TOKENS * torch.arange(2).unsqueeze(-1)
    g, b = decay_and_rate(SHAPE, gates[absorbed].bfloat16().float(), torch.empty(0))
    k, v = l2_normalize(key[absorbed]), value[absorbed]
    q = torch.randn(2, 16, SHAPE.heads, SHAPE.head_size).bfloat16()
    wanted, final = naive_recurrence(l2_normalize(q), k, v, g, b, SHAPE.scale, True, states)
    for request in range(2):
        case.put_state(request, states[request])
    first_tokens, counts, seq_lens = (torch.tensor([x, y], dtype=torch.int32) for x, y in ((0, 15), (15, 15), (63, 63)))
    for queries, count in ((q[:, :15], 15), (q[:, 15:], 1)):  # the first fill the kept updates, the last crosses
        o = poisoned(2, count, SHAPE.heads, SHAPE.head_size)
        absorb_and_read_steps(
            queries.flatten(0, 1),
            case.window,
            case.window_table,
            case.state,
            case.state_table,
            first_tokens,
            counts,
            seq_lens,
            o,
            memory=SHAPE.spec,
            settling=RULE,
            scale=SHAPE.scale,
        )
        part = slice(0, 15) if count == 15 else slice(15, 16)
        torch.testing.assert_close(o, wanted[:, part], rtol=2e-5, atol=2e-5)
        first_tokens, counts, seq_lens = first_tokens // 15, counts // 15, seq_lens + 1

    stretches = [Stretch(request, request, t + 1, 1, t + 1, t + 2) for request in range(2)]
    plan = plan_prefill(stretches, case.window_table, RULE, block_size=SHAPE.block_size)
    gathered = gather_states(case.state, case.state_table, plan)
    torch.testing.assert_close(gathered.mT, final, rtol=2e-5, atol=2e-5)
    new = torch.randn_like(gathered)
    scatter_states(new, case.state, case.state_table, plan)
    assert torch.equal(torch.stack([case.get_state(0), case.get_state(1)]), new.mT)
    _, k, v, g, _ = gather_stretches(q[:, 0], case.window, plan, memory=SHAPE.spec)
    last = absorbed[:, -1] + 1
    torch.testing.assert_close(k[:, ::2].float(), l2_normalize(key[last]), rtol=8e-3, atol=1e-6)
    assert torch.equal(v[:, ::2], value[last])
    assert torch.equal(g, gates[last][..., 0].bfloat16().float())
