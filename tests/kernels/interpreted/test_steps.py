"""Steps over settled states in Triton: against the naive recurrence, whatever becomes of drafts."""

import itertools
from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
from triton.runtime.interpreter import InterpreterBuilder

from kernel_cases.decode import state_bytes
from support.settled_case import SettledCase
from vllm_ahn.kernels.settled import Settling
from vllm_ahn.kernels.steps import Steps
from vllm_ahn.kernels.steps_triton import absorb_and_read_steps, find_steps

MEMORIES = ("GatedDeltaNet", "DeltaNet", "Mamba2")


@pytest.fixture(autouse=True)
def seed() -> int:
    """A new one in every run, in the captured output of a test that fails."""
    seed = torch.seed()
    print("torch seed", seed)
    return seed


class Stepper:
    """Steps a case by the kernel, in tensors that hold NaN where nothing is to be written."""

    def __init__(self, queries: int, **choices: int) -> None:
        self.queries, self.choices = queries, choices

    def __call__(self, case: SettledCase, query: torch.Tensor, steps: Steps) -> torch.Tensor:
        # The first entry has nothing to do.
        entries = 1 + len(steps.lens)
        first_tokens, counts, requests = (torch.zeros(entries, dtype=torch.int32) for _ in range(3))
        first_tokens[1:], counts[1:], requests[1:] = steps.first_tokens, steps.lens, steps.requests
        seq_lens = torch.zeros(case.num_requests, dtype=torch.int32)
        seq_lens[steps.requests] = (steps.computed + steps.lens).int()
        o = torch.full((entries, self.queries, case.heads, case.head_size), float("nan"))
        absorb_and_read_steps(
            query,
            case.window,
            case.window_table,
            case.state,
            case.state_table,
            first_tokens,
            counts,
            seq_lens,
            o,
            memory=case.spec,
            settling=case.rule,
            scale=case.scale,
            requests=requests,
            A_log=case.A_log,
            **self.choices,
        )
        written = torch.zeros(o.shape[:2], dtype=torch.bool)
        written[1 + steps.owners, steps.within] = True
        assert o[~written].isnan().all()
        return o[written]


@pytest.mark.parametrize("memory, drafts, caches", itertools.product(MEMORIES, (0, 3, 15), (False, True)), ids=str)
def test_steps_equal_the_naive_recurrence(memory: str, drafts: int, caches: bool, seed: int) -> None:
    sizes = itertools.cycle(((24, 8, 16), (33, 0, 32), (20, 5, 48)))
    window, sinks, block_size = next(itertools.islice(sizes, seed % 3, None))
    rule = Settling.of(window, sinks, block_size=block_size, caches_prefixes=caches, speculates=drafts > 0)
    case = SettledCase(rule, memory, 2, 1, block_size=block_size, num_requests=2, num_tokens=85, transposed=False)
    assert case.run(Stepper(1 + drafts), drafts, seed) < 1e-5


@pytest.mark.parametrize("num_drafts", [1, 3, 8, 15])
def test_any_number_of_drafts_is_accepted(num_drafts: int, seed: int) -> None:
    rule = Settling.of(24, 8, block_size=16, caches_prefixes=True, speculates=True)
    accepted: Counter[int] = Counter()
    while set(accepted) < set(range(num_drafts + 1)):
        case = SettledCase(rule, "GatedDeltaNet", 1, 1, num_requests=3, num_tokens=100, transposed=False)
        assert case.run(Stepper(1 + num_drafts), num_drafts, seed + len(accepted)) < 1e-5
        accepted += case.accepted


SIZES = [(5, 1, 80, 16), (2, 2, 64, 64), (3, 1, 128, 32), (2, 1, 256, 16)]


@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_head_sizes_and_dtypes(sizes: tuple[int, int, int, int], seed: int) -> None:
    heads, kv_heads, size, block_size = sizes
    rule = Settling.of(24, 8, block_size=block_size, caches_prefixes=True, speculates=True)
    dtypes = itertools.cycle(itertools.product((torch.float32, torch.bfloat16, torch.float16), (True, False)))
    for memory, (dtype, exact) in zip(MEMORIES, itertools.islice(dtypes, seed % 6, None), strict=False):
        state_dtype = torch.float32 if exact else torch.bfloat16
        case = SettledCase(
            rule,
            memory,
            heads,
            kv_heads,
            size,
            block_size,
            dtype=dtype,
            state_dtype=state_dtype,
            num_requests=1,
            num_tokens=52,
            transposed=False,
        )
        assert case.run(Stepper(4), 3, seed) < (1e-5 if exact else 0.3)


def test_other_tiles(seed: int) -> None:
    """Narrower and wider than the columns of a page, some of which lie in two."""
    rule = Settling.of(24, 8, block_size=16, caches_prefixes=False, speculates=False)
    for block_v, memory in zip((16, 32, 64), MEMORIES, strict=True):
        case = SettledCase(rule, memory, 2, 1, 64, num_requests=1, num_tokens=70, transposed=False)
        assert case.run(Stepper(1, block_v=block_v, num_warps=2), 0, seed) < 1e-5


def test_a_chunks_tail_in_one_slot(seed: int) -> None:
    """Rows of the next boundary are written over those of the last one, which are read before."""
    rule = Settling.of(24, 8, block_size=16, caches_prefixes=False, speculates=False)
    for memory in MEMORIES:
        case = SettledCase(rule, memory, 2, 1, num_requests=2, num_tokens=110, transposed=False)
        assert case.run(Stepper(16), 15, seed, rejects=False) < 1e-5


def test_a_large_decay_spoils_nothing_after_it(seed: int) -> None:
    rule = Settling.of(24, 8, block_size=16, caches_prefixes=False, speculates=True)
    case = SettledCase(rule, heads=2, decay=1000.0, num_requests=1, num_tokens=90, transposed=False)
    assert case.run(Stepper(4), 3, seed) < 1e-5


def test_one_slot_is_not_enough_for_drafts(seed: int) -> None:
    """The negative control."""
    case = SettledCase(Settling(24, 8), heads=1, kv_heads=1, num_requests=4, num_tokens=100, transposed=False)
    assert case.run(Stepper(9), 8, seed) > 1e-3


def test_steps_are_found_on_the_device() -> None:
    """By hand, W + S = 10: past it, half past it, a chunk, inside it, padding, entering."""
    query_start_loc = torch.tensor([0, 3, 6, 16, 18, 18, 19], dtype=torch.int32)
    seq_lens = torch.tensor([20, 12, 30, 9, 0, 11], dtype=torch.int32)
    first_tokens, counts = (torch.full((6,), -7, dtype=torch.int32) for _ in range(2))
    tokens, positions = torch.full((6, 3), -7, dtype=torch.int32), torch.full((6, 3), -7)
    find_steps(query_start_loc, seq_lens, 10, first_tokens, counts, tokens, positions)
    assert counts.tolist() == [3, 2, 0, 0, 0, 1]
    assert [first for first, count in zip(first_tokens.tolist(), counts.tolist(), strict=True) if count] == [0, 4, 18]
    assert tokens.tolist() == [[0, 1, 2], [4, 5, -1], [-1] * 3, [-1] * 3, [-1] * 3, [18, -1, -1]]
    assert positions.tolist() == [[17, 18, 19], [10, 11, 10], [10] * 3, [10] * 3, [10] * 3, [10] * 3]


def test_what_does_not_fit_is_refused() -> None:
    case = SettledCase(Settling(24, 8), "Mamba2", transposed=False)
    steps = Steps(*map(torch.tensor, ([0], [0], [1], [32])))
    query = case.query[0]
    with pytest.raises(ValueError, match="at most 16 queries"):
        Stepper(17)(case, query, steps)
    with pytest.raises(ValueError, match="query must"):
        Stepper(1)(case, query[:, :3], steps)
    case.A_log = None
    with pytest.raises(ValueError, match="A_log"):
        Stepper(1)(case, query, steps)
    case = SettledCase(Settling(24, 8), transposed=False)
    case.state_table = case.state_table[:, :1]
    with pytest.raises(ValueError, match="too narrow"):
        Stepper(1)(case, query, steps)


@pytest.mark.parametrize("head_size, most", [(64, 0.62), (128, 0.6)])
def test_bytes_of_states_that_decodes_move(head_size: int, most: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Counted from the kernel's own loads and stores in state pages, from one boundary to the next.

    Against a kernel that reads and writes the whole state in every step.
    """
    case = SettledCase(Settling(16, 16), heads=1, kv_heads=1, head_size=head_size, num_requests=1, transposed=False)
    cache = case.window.pages
    is_state = torch.zeros(len(cache), dtype=torch.bool)
    is_state[case.state_table[0].long()] = True
    is_state[0] = False
    page_bytes = cache.stride(0) * cache.element_size()
    moved = 0

    def count(ptrs: np.ndarray, mask: np.ndarray, item: int) -> None:
        nonlocal moved
        block = (ptrs.astype(np.int64) - cache.data_ptr()) // page_bytes
        inside = mask & (block >= 0) & (block < len(cache))
        moved += item * int(is_state.numpy()[block[inside]].sum())

    load, store = InterpreterBuilder.create_masked_load, InterpreterBuilder.create_masked_store

    def counted_load(self: Any, ptrs: Any, mask: Any, *rest: Any) -> Any:
        count(ptrs.data, mask.data, ptrs.get_element_ty().primitive_bitwidth // 8)
        return load(self, ptrs, mask, *rest)

    def counted_store(self: Any, ptrs: Any, value: Any, mask: Any, *rest: Any) -> Any:
        count(ptrs.data, mask.data, ptrs.get_element_ty().primitive_bitwidth // 8)
        return store(self, ptrs, value, mask, *rest)

    monkeypatch.setattr(InterpreterBuilder, "create_masked_load", counted_load)
    monkeypatch.setattr(InterpreterBuilder, "create_masked_store", counted_store)
    by_step = []
    for computed in range(32, 96):
        moved = 0
        steps = Steps(*(torch.tensor([x]) for x in (0, 0, 1, computed)))
        Stepper(1)(case, case.query[0, computed : computed + 1], steps)
        by_step.append(moved)
    square = 4 * head_size**2
    first, *periods = (by_step[start : start + 16] for start in range(0, 64, 16))
    assert sum(first) < sum(periods[0])  # a fresh state is not read
    for period in periods:
        assert [moved >= 2 * square for moved in period] == [False] * 15 + [True]
        share = sum(period) / (16 * 2 * square)
        assert share == pytest.approx(state_bytes(case.spec, head_size) / (2 * square), rel=0.01)
        assert share <= most
