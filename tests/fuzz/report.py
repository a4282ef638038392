"""Play cases one after the other and count what they covered."""

import dataclasses
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

from fuzz.case import CPU, Case, Limits, draw
from fuzz.check import Compared, against_plain_schedules, against_reference
from fuzz.play import Played, checkpoint, play, reference

MOST_TIES = 0.01
"""Of the positions; with more, the tokens would not say enough."""


@dataclasses.dataclass(frozen=True)
class Switches:
    """What cases are drawn with beside their seed."""

    limits: Limits = CPU
    drafts: bool = False
    inexact: bool = False

    def draw(self, seed: int) -> Case:
        return draw(seed, self.limits, drafts=self.drafts, inexact=self.inexact)


@dataclasses.dataclass
class Summary:
    """What was covered, over all cases."""

    first_seed: int | None = None
    engines: int = 0
    cores: set[str] = dataclasses.field(default_factory=set)
    """The classes that computed the layers."""
    requests: int = 0
    aborts: int = 0
    steps: int = 0
    positions: int = 0
    ties: int = 0
    largest_error: float = 0.0
    preemptions: int = 0
    smallest_pools: int = 0
    hits: int = 0
    """Requests that began with tokens from the prefix cache."""
    deep_hits: int = 0
    """Those that got more than ``W + S`` of them."""
    hit_tokens: int = 0
    accepted_drafts: int = 0
    accepted: Counter[int] = dataclasses.field(default_factory=Counter)
    """How often how many drafts of a step were accepted, of those that are known answers."""
    seconds: float = 0.0
    failures: dict[int, str] = dataclasses.field(default_factory=dict)
    """By seed."""

    def add(self, case: Case, played: Played, compared: Compared) -> None:
        self.cores.add(played.core)
        self.requests += len(played.answers)
        self.aborts += sum(answer.aborted for answer in played.answers)
        self.steps += played.steps
        self.positions += compared.positions
        self.ties += compared.ties
        self.largest_error = max(self.largest_error, compared.largest_error)
        self.preemptions += played.preemptions
        self.smallest_pools += case.spare_blocks == 0
        self.hits += sum(answer.num_cached_tokens > 0 for answer in played.answers)
        self.deep_hits += sum(answer.num_cached_tokens > case.capacity for answer in played.answers)
        self.hit_tokens += played.prefix_hit_tokens
        self.accepted_drafts += played.num_accepted_drafts
        self.accepted.update(played.accepted_drafts)

    @property
    def too_many_ties(self) -> bool:
        """Whether the tokens say too little; a short run proves nothing either way."""
        return self.positions >= 1000 and self.ties > MOST_TIES * self.positions

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self) | {"cores": sorted(self.cores), "accepted": dict(sorted(self.accepted.items()))}

    def describe(self) -> str:
        drafts = f"drafts accepted: {self.accepted_drafts}, by step {dict(sorted(self.accepted.items()))}\n"
        return (
            f"{self.engines} engines on {', '.join(sorted(self.cores))} ({self.smallest_pools} in the smallest pool), "
            f"{self.requests} requests, "
            f"{self.aborts} aborted, {self.steps} steps, {self.seconds:.0f} s\n"
            f"{self.positions} positions compared, {self.ties} ties, largest error {self.largest_error:.1e}\n"
            f"{self.preemptions} preemptions, {self.hits} requests with prefix hits ({self.hit_tokens} tokens), "
            f"{self.deep_hits} beyond W + S\n"
            f"{drafts if self.accepted_drafts else ''}"
            f"{len(self.failures)} failures"
        )


def run_case(case: Case) -> tuple[Played, Compared]:
    """Play a case and compare its answers.

    Raises:
        Failure: something is wrong; whatever else the engine raises.
    """
    with checkpoint(case) as paths:
        model = reference(case, paths)
        played = play(case, paths, model)
        if case.exact:
            return played, against_reference(played.answers, model)
        return played, against_plain_schedules(case, paths, played)


def fuzz(
    seeds: Iterator[int],
    switches: Switches,
    *,
    seconds: float = float("inf"),
    engines: int | None = None,
    most_failures: int = 5,
    say: Callable[[str], None] = print,
) -> Summary:
    """Run the cases of ``seeds`` until time is up, there were so many engines, or so many failures."""
    summary, start = Summary(), time.monotonic()
    for seed in seeds:
        over = time.monotonic() - start >= seconds or summary.engines == engines
        if over or len(summary.failures) >= most_failures:
            break
        summary.first_seed = seed if summary.first_seed is None else summary.first_seed
        summary.engines += 1
        case = switches.draw(seed)
        try:
            played, compared = run_case(case)
        except Exception as error:
            summary.failures[seed] = f"{type(error).__name__}: {error}"
            say(f"{case.describe()}\nFAILED {summary.failures[seed]}")
            if not isinstance(error, AssertionError):
                say(traceback.format_exc())
        else:
            summary.add(case, played, compared)
    summary.seconds = time.monotonic() - start
    return summary
