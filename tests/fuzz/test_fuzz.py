"""A minute of random engines and requests, from another seed each time; and what the harness finds if it is there."""

import itertools
import json
import re
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fuzz.__main__ import ENVIRONMENT, main
from fuzz.case import draw
from fuzz.play import case_engine, checkpoint
from fuzz.report import Summary, Switches, fuzz
from vllm_ahn.cache.managers import AHNStateManager
from vllm_ahn.cache.specs import AHNWindowSpec
from vllm_ahn.memory.base import Memory

pytestmark = pytest.mark.slow

SECONDS = 60
FEW = 12
"""Engines within which each fault below is found: most faults show in the first or second."""


def test_a_minute_of_it() -> None:
    first = int(time.time())
    print(f"first seed {first}")
    summary = fuzz(itertools.count(first), Switches(), seconds=SECONDS)
    print(summary.describe())
    replay = [f"PYTHONPATH=tests python -m fuzz --replay {seed}" for seed in summary.failures]
    assert not summary.failures, (summary.failures, replay)
    assert not summary.too_many_ties
    assert summary.engines >= 3 and summary.positions > 0


def keep_other_gates(monkeypatch: pytest.MonkeyPatch) -> None:
    """What tokens keep until they are absorbed is off by 5 %."""
    project = Memory.project

    def wrong(self: Any, hidden_states: Any) -> Any:
        gates, z = project(self, hidden_states)
        return 1.05 * gates, z

    monkeypatch.setattr(Memory, "project", wrong)


def give_back_too_early(monkeypatch: pytest.MonkeyPatch) -> None:
    """The oldest block of the window goes back to the pool while it is still needed."""
    first_kept = AHNWindowSpec.first_kept_block

    def wrong(self: Any, num_settled_tokens: int) -> int:
        first = first_kept(self, num_settled_tokens)
        return first + 1 if first else 0

    monkeypatch.setattr(AHNWindowSpec, "first_kept_block", wrong)


def save_another_state(monkeypatch: pytest.MonkeyPatch) -> None:
    """Checkpoints in the prefix cache are of the block before."""
    slot = AHNStateManager._slot

    def wrong(self: Any, held: Any, boundary: int) -> Any:
        return slot(self, held, boundary - self.block_size)

    monkeypatch.setattr(AHNStateManager, "_slot", wrong)


def lose_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pages of states do not come back when their requests end."""

    def wrong(self: Any, request_id: str, *args: Any, **kwargs: Any) -> None:
        self.req_to_blocks.pop(request_id, None)

    monkeypatch.setattr(AHNStateManager, "free", wrong)


FAULTS: list[Callable[[pytest.MonkeyPatch], None]] = [
    keep_other_gates,
    give_back_too_early,
    save_another_state,
    lose_blocks,
]


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
def test_a_fault_is_found(fault: Callable[[pytest.MonkeyPatch], None], monkeypatch: pytest.MonkeyPatch) -> None:
    """The negative controls."""
    fault(monkeypatch)
    summary = fuzz(iter(range(FEW)), Switches(), most_failures=1)
    assert summary.failures
    (failure,) = summary.failures.values()
    assert failure.startswith("Failure: "), failure


def test_a_fault_is_found_in_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    """Plain schedules, with which bfloat16 is compared, cache no prefix."""
    save_another_state(monkeypatch)
    summary = fuzz(iter(range(FEW)), Switches(inexact=True), most_failures=1)
    assert summary.failures


def test_a_failing_seed_is_printed_and_replayed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    for name, value in ENVIRONMENT.items():
        monkeypatch.setenv(name, value)  # `main` sets them, this takes them back
    with monkeypatch.context() as broken:
        lose_blocks(broken)
        broken.setattr(sys, "argv", ["fuzz", "--seed", "0", "--engines", str(FEW)])
        assert main() == 1
    seeds = re.findall(r"python -m fuzz --replay (\d+)$", capsys.readouterr().out, re.MULTILINE)
    monkeypatch.setattr(sys, "argv", ["fuzz", "--replay", seeds[0], "--json", str(tmp_path / "summary.json")])
    assert main() == 0
    assert f"seed {seeds[0]}: " in capsys.readouterr().out
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert (summary["engines"], summary["failures"]) == (1, {})
    assert summary["positions"] > 0


def test_a_case_is_its_seed() -> None:
    assert draw(7).describe() == draw(7).describe() != draw(8).describe()
    assert draw(7).requests == draw(7, drafts=True).requests
    for seed in range(300):
        case = draw(seed)
        assert case.requests and case.engine["max_num_seqs"] <= case.engine["max_num_batched_tokens"]
        assert all(case.longest(index) <= case.engine["max_model_len"] for index in range(len(case.requests)))


def test_the_smallest_pool_is_the_smallest() -> None:
    """One block fewer, and vLLM does not start."""
    case = next(case for case in map(draw, itertools.count()) if case.spare_blocks == 0)
    with checkpoint(case) as paths:
        with case_engine(case, paths):
            pass
        case.spare_blocks = -1
        with pytest.raises(ValueError, match="To serve at least one request"), case_engine(case, paths):
            pass


def test_too_many_ties_are_a_failure() -> None:
    assert Summary(positions=1000, ties=11).too_many_ties
    assert not Summary(positions=1000, ties=10).too_many_ties
    assert not Summary(positions=10, ties=1).too_many_ties
