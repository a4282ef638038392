"""Steps over settled states in plain torch against the naive recurrence over the whole sequence."""

import itertools

import pytest
import torch

from support.settled_case import SettledCase
from vllm_ahn.kernels.recurrence.settled import absorb_and_read_steps
from vllm_ahn.kernels.settled import Settling
from vllm_ahn.kernels.steps import Steps


def step(case: SettledCase, query: torch.Tensor, steps: Steps) -> torch.Tensor:
    return absorb_and_read_steps(
        query,
        case.window,
        case.window_table,
        case.state,
        case.state_table,
        steps,
        memory=case.spec,
        settling=case.rule,
        scale=case.scale,
        A_log=case.A_log,
    )


MEMORIES = ("GatedDeltaNet", "DeltaNet", "Mamba2")


@pytest.fixture(autouse=True)
def seed() -> int:
    """A new one in every run, in the captured output of a test that fails."""
    seed = torch.seed()
    print("torch seed", seed)
    return seed


@pytest.mark.parametrize(
    "memory, drafts, caches", itertools.product(MEMORIES, (0, 1, 3, 8, 15), (False, True)), ids=str
)
def test_steps_equal_the_naive_recurrence(memory: str, drafts: int, caches: bool, seed: int) -> None:
    for window, sinks, block_size in ((24, 8, 16), (33, 0, 32), (20, 5, 48)):
        rule = Settling.of(window, sinks, block_size=block_size, caches_prefixes=caches, speculates=drafts > 0)
        case = SettledCase(rule, memory, block_size=block_size)
        assert case.run(step, drafts, seed) < 1e-5


@pytest.mark.parametrize("memory", MEMORIES)
def test_other_sizes_and_dtypes(memory: str, seed: int) -> None:
    rule = Settling.of(24, 8, block_size=16, caches_prefixes=True, speculates=True)
    assert SettledCase(rule, memory, heads=5, kv_heads=1, head_size=80).run(step, 3, seed) < 1e-5
    assert SettledCase(rule, memory, dtype=torch.bfloat16).run(step, 3, seed) < 1e-5
    assert SettledCase(rule, memory, state_dtype=torch.bfloat16).run(step, 3, seed) < 0.2


def test_a_large_decay_spoils_nothing_after_it(seed: int) -> None:
    rule = Settling.of(24, 8, block_size=16, caches_prefixes=False, speculates=True)
    assert SettledCase(rule, decay=1000.0).run(step, 3, seed) < 1e-5


@pytest.mark.parametrize("memory", MEMORIES)
def test_one_slot_is_not_enough_for_drafts(memory: str, seed: int) -> None:
    """The negative control: what a rejected draft has settled cannot be taken back."""
    assert SettledCase(Settling(24, 8), memory, num_requests=8).run(step, 8, seed) > 1e-3
