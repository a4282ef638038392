"""prefill_memory against naive_recurrence; its gathers and scatters against plain indexing."""

import pytest
import torch

from support.interpreter import install_for_fla
from support.paged_case import PagedCase, Shape, WithoutDelta, decay_and_rate, random_gates
from vllm_ahn.kernels import l2_normalize, naive_recurrence
from vllm_ahn.kernels.prefill import prefill_memory
from vllm_ahn.kernels.prefill_gather import gather_states, gather_stretches, scatter_states
from vllm_ahn.kernels.prefill_plan import PrefillPlan, Stretch, plan_prefill
from vllm_ahn.kernels.settled import Settling

install_for_fla()

WINDOW, SINKS = 20, 5
RULE = Settling(WINDOW, SINKS, turns=2)
SHAPES = [
    Shape(2, 1, 64, 16, "GatedDeltaNet"),
    Shape(3, 3, 80, 32, "DeltaNet", torch.bfloat16),
    Shape(5, 1, 96, 64, "Mamba2", torch.float16),
    Shape(6, 2, 128, 16, "Mamba2", torch.bfloat16, torch.bfloat16),
    Shape(1, 1, 256, 16, "GatedDeltaNet", torch.bfloat16),
    WithoutDelta(2, 2, 64, 16, "GatedDeltaNet"),
]


@pytest.fixture(autouse=True)
def fresh_inputs() -> None:
    print("torch seed", torch.seed())


class Prefill:
    """A batch in which some requests absorb stretches; others lie between them in batch and tables.

    A stretch begins with the state of a boundary, some tokens of which earlier steps have absorbed already.
    """

    def __init__(self, shape: Shape, reads: list[int], fresh: list[bool]) -> None:
        tokens = RULE.capacity + max(reads) + 70
        self.case = PagedCase(shape, 2 * len(reads), tokens, slots=RULE.num_slots, apart=2)
        self.A_log = torch.randn(shape.heads)
        self.stretches, self.tokens, self.states = [], [], []
        row = 0
        for i, (num_reads, new) in enumerate(zip(reads, fresh, strict=True)):
            row += int(torch.randint(1, 5, ()))
            source = RULE.boundary(0) if new else RULE.boundary(RULE.capacity) + 16 * int(torch.randint(1, 4, ()))
            computed = max(RULE.capacity, source) + int(torch.randint(0, 7 if new else 16, ()))
            request, target, first = 2 * i + 1, computed + num_reads, RULE.absorbed(source)
            self.stretches.append(Stretch(request, row, computed, num_reads, source, target))
            absorbed = torch.arange(first, target - WINDOW)
            k, v = torch.randn(2, len(absorbed), shape.kv_heads, shape.head_size).to(shape.dtype)
            gates = random_gates(shape, len(absorbed)).to(shape.dtype)
            self.case.put_tokens(self.case.slots(request, absorbed), k, v, gates)
            state = torch.randn(shape.heads, shape.head_size, shape.head_size).to(shape.state_dtype).float()
            if new:
                state.zero_()
            else:
                self.case.put_state(request, state, RULE.slot(source))
            self.tokens.append((k, v, gates.float()))
            self.states.append(state)
            row += num_reads
        self.lengths = [len(k) for k, _, _ in self.tokens]
        self.query = torch.randn(row + 3, 2, shape.heads, shape.head_size).to(shape.dtype)[:, 1]

    def plan(self) -> PrefillPlan:
        return plan_prefill(self.stretches, self.case.window_table, RULE, block_size=self.case.shape.block_size)

    def queries(self, stretch: Stretch, length: int) -> torch.Tensor:
        """Normalised queries after each absorbed token, zero where there is none."""
        rows = self.query[stretch.first_token : stretch.first_token + stretch.num_reads]
        return torch.nn.functional.pad(l2_normalize(rows), (0, 0, 0, 0, length - stretch.num_reads, 0))


def test_plan_prefill() -> None:
    """By hand: windows of 4 after 2 sinks in blocks of 16."""
    rule = Settling(4, 2, turns=2)
    table = torch.tensor([[1, 2, 3, 4, 5, 6], [7, 8, 9, 10, 0, 0]], dtype=torch.int32)
    # Request 1 enters the memory with its first token at position 6. Of the 80 tokens that request 0 absorbs, 3 are
    # since its boundary and have no query.
    stretches = [Stretch(1, 5, 6, 10, 0, 16), Stretch(0, 15, 19, 77, 16, 96)]
    plan = plan_prefill(stretches, table, rule, block_size=16)
    assert plan.lengths == (10, 80)
    assert plan.reads.tolist() == [*range(5, 15), -1, -1, -1, *range(15, 92)]
    assert plan.positions.tolist() == [*range(6, 16), *range(16, 96)]
    slots = [7 * 16 + e for e in range(2, 12)] + [table[0, e // 16].item() * 16 + e % 16 for e in range(12, 92)]
    assert plan.slots.tolist() == slots
    assert plan.requests.tolist() == [1, 0]
    assert plan.sources.tolist() == [-1, 1]
    assert plan.targets.tolist() == [1, 0]
    assert plan.cu_seqlens.tolist() == [0, 10, 90]
    assert plan.chunk_indices.tolist() == [[0, 0], [1, 0], [1, 1]]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_gathers_equal_indexing(shape: Shape) -> None:
    prefill = Prefill(shape, [1, 18, 3], [True, False, False])
    plan = prefill.plan()
    A_log = prefill.A_log
    got = gather_stretches(prefill.query, prefill.case.window, plan, memory=shape.spec, A_log=A_log)
    wanted: list[list[torch.Tensor]] = [[] for _ in got]
    for stretch, (k, v, gates) in zip(prefill.stretches, prefill.tokens, strict=True):
        q = prefill.queries(stretch, len(k))
        g, b = decay_and_rate(shape, gates, A_log)
        v = v.repeat_interleave(shape.group, 1).float() * (1 if shape.delta else b.unsqueeze(-1))
        k = l2_normalize(k).repeat_interleave(shape.group, 1)
        parts = (q, k, v, g, b)
        for together, part in zip(wanted, parts, strict=True):
            together.append(part)
    tolerance = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}[shape.dtype]
    for name, x, parts in zip("qkvgb", got, wanted, strict=True):
        exact = name in "gb"
        assert x.dtype == (torch.float32 if exact else shape.dtype)
        torch.testing.assert_close(
            x.float(), torch.cat(parts), rtol=1e-6 if exact else tolerance, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}"
        )

    states = gather_states(prefill.case.state, prefill.case.state_table, plan)
    assert torch.equal(states, torch.stack(prefill.states).mT)
    before = prefill.case.cache.clone()
    new = torch.randn_like(states)
    scatter_states(new, prefill.case.state, prefill.case.state_table, plan)
    touched = torch.zeros(len(before), dtype=torch.bool)
    for stretch, state in zip(prefill.stretches, new, strict=True):
        slot = RULE.slot(stretch.target)
        assert torch.equal(prefill.case.get_state(stretch.request, slot), state.mT.to(shape.state_dtype).float())
        touched[prefill.case.state_pages(stretch.request, slot)] = True
    assert torch.equal(prefill.case.cache[~touched].view(torch.uint8), before[~touched].view(torch.uint8))


def check(shape: Shape, reads: list[int], fresh: list[bool], tolerance: float) -> None:
    prefill = Prefill(shape, reads, fresh)
    plan = prefill.plan()
    case = prefill.case
    o = prefill_memory(
        prefill.query,
        case.window,
        case.state,
        case.state_table,
        plan,
        memory=shape.spec,
        scale=shape.scale,
        A_log=prefill.A_log,
    )
    assert o.is_contiguous() and o.dtype == shape.dtype
    parts = zip(prefill.stretches, o.split(prefill.lengths), prefill.tokens, prefill.states, strict=True)
    for stretch, got, (k, v, gates), state in parts:
        g, b = decay_and_rate(shape, gates, prefill.A_log)
        wanted, final = naive_recurrence(
            prefill.queries(stretch, len(k))[None].double(),
            l2_normalize(k)[None].double(),
            v[None].double(),
            g[None],
            b[None],
            shape.scale,
            shape.delta,
            state[None],
        )
        new = case.get_state(stretch.request, RULE.slot(stretch.target))
        read = slice(len(k) - stretch.num_reads, None)
        for name, x, y in (("o", got[read], wanted[0, read]), ("state", new, final[0])):
            # Relative to the largest, as roundings of the state in half precision are.
            error = (x.double() - y).abs().max() / y.abs().max()
            assert error < tolerance, f"{name} of {stretch}: {error}"


@pytest.mark.parametrize("memory", ["GatedDeltaNet", "Mamba2"])
def test_prefill_memory_equals_naive(memory: str) -> None:
    """Stretches of one chunk, of three, the last of which is not full, and of a full one."""
    check(Shape(2, 1, 64, 16, memory), [1, 130, 64], [True, False, True], 1e-4)


def test_prefill_memory_without_decay_equals_naive() -> None:
    check(Shape(2, 2, 64, 16, "DeltaNet"), [70], [False], 1e-4)


@pytest.mark.parametrize("memory", ["GatedDeltaNet", "Mamba2"])
def test_prefill_memory_in_bfloat16(memory: str) -> None:
    check(Shape(3, 1, 80, 32, memory, torch.bfloat16), [70], [False], 3e-2)


def test_prefill_memory_with_a_bfloat16_state() -> None:
    check(Shape(2, 2, 64, 16, "GatedDeltaNet", torch.bfloat16, torch.bfloat16), [9, 20], [False, True], 3e-2)


@pytest.mark.parametrize("head_size", [128, 256])
def test_prefill_memory_of_other_head_sizes(head_size: int) -> None:
    for memory in ("GatedDeltaNet", "Mamba2"):
        check(Shape(1, 1, head_size, 16, memory), [67], [False], 1e-4)
