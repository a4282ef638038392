"""The rule of boundaries and slots, by bookkeeping: what a step will need is in its slot, whatever was computed how."""

import random

import numpy as np
import pytest
import torch

from vllm_ahn.attention.plan import StepRequests
from vllm_ahn.kernels.settled import GRANULARITY, Settling


def rules() -> list[tuple[int, int, Settling]]:
    return [
        (
            block_size,
            drafts,
            Settling.of(window, sinks, block_size=block_size, caches_prefixes=caches, speculates=drafts > 0),
        )
        for block_size in (16, 32, 48, 64, 128)
        for window, sinks in ((24, 8), (32, 0), (100, 30))
        for caches in (False, True)
        for drafts in (0, 1, 3, 15)
    ]


class Slots:
    """What each slot of a request holds: the boundary its state is settled for."""

    def __init__(self, rule: Settling) -> None:
        self.rule, self.held = rule, {}

    def read(self, boundary: int) -> None:
        if boundary > self.rule.capacity:
            assert self.held.get(self.rule.slot(boundary)) == boundary

    def write(self, boundary: int) -> None:
        assert 0 <= self.rule.slot(boundary) < self.rule.num_slots
        self.held[self.rule.slot(boundary)] = boundary

    def advance(self, num_computed: int, seq_len: int) -> None:
        """A step as both wings plan it."""
        starts = np.array([0, seq_len - num_computed])
        requests = StepRequests(starts, np.array([seq_len]), self.rule)
        for stretches in requests.passes:
            for stretch in stretches:
                assert stretch.target - stretch.num_reads == stretch.first_position
                assert stretch.first_token == stretch.first_position - num_computed
                self.read(stretch.source)
                self.write(stretch.target)
        num_steps = int(requests.num_steps[0])
        assert num_steps <= GRANULARITY
        if num_steps:
            source, target = self.rule.boundary(seq_len - num_steps), self.rule.boundary(seq_len)
            self.read(source)
            assert target - source in (0, GRANULARITY)
            if target > source:
                self.write(target)


@pytest.mark.parametrize("block_size, drafts, rule", rules(), ids=str)
def test_the_state_that_a_step_needs_is_in_its_slot(block_size: int, drafts: int, rule: Settling) -> None:
    for seed in range(10):
        rng = random.Random(seed)
        slots, computed = Slots(rule), 0
        while computed < 900:
            # A prompt's chunks, of which nothing is taken back, then decodes with drafts.
            chunk = computed < 300 * seed / 5
            length = rng.choice((1, 7, 16, 17, 64, block_size, rng.randint(1, 300))) if chunk else 1 + drafts
            slots.advance(computed, computed + length)
            computed += length if chunk else rng.randint(1, length)
            if rule.period > 1 or (rule.turns == 2 and not drafts):  # prefixes are cached
                for boundary in {computed // block_size * block_size, (computed - 1) // block_size * block_size}:
                    slots.read(boundary)


def test_one_slot_is_not_enough_for_drafts() -> None:
    """The negative control."""
    with pytest.raises(AssertionError):
        test_the_state_that_a_step_needs_is_in_its_slot(16, 3, Settling(24, 8))


def test_the_rule_is_the_same_for_tensors() -> None:
    for _, _, rule in rules():
        counts = range(0, 400, 7)
        for method in (rule.boundary, rule.absorbed):
            assert method(torch.tensor(counts)).tolist() == [method(count) for count in counts]
        boundaries = range(0, 800, GRANULARITY)
        assert rule.slot(torch.tensor(boundaries)).tolist() == [rule.slot(boundary) for boundary in boundaries]
