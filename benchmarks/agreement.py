"""Whether two engines with the same weights give the same greedy answers, as far as rounding lets them.

Tokens alone cannot tell. Between the two most likely of 150,000 tokens there is often less than what bfloat16 rounds
off, and after one token that differs everything does. So the log-probabilities of the most likely tokens are compared
at every step, to a tolerance; the first step at which the engines choose differently, allowed only if by their own
figures both tokens were about as likely, ends the comparison of that answer, as the contexts differ from there on.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from stepped_engine import Choice

LEAST_COMPARED = 0.5
"""Share of the tokens that must have been compared for an agreement to count."""


class Mismatch(Exception):
    """Two engines differ by more than rounding; the message says where."""


@dataclasses.dataclass(frozen=True)
class Agreement:
    """What was compared, and how near it was."""

    tokens: int
    """Tokens that were asked for."""
    compared: int
    """Steps that were compared."""
    equal: int
    """Steps of these at which both chose the same token."""
    difference: float
    """Largest difference between two log-probabilities of one token."""

    def describe(self) -> str:
        """In a line."""
        ties = self.compared - self.equal
        ended = f", {ties} answers ended early at a near-tie" if ties else ""
        within = f"log-probabilities differ by at most {self.difference:.2g}"
        return f"{self.equal} of {self.tokens} tokens equal{ended}; {within}"


def compare(
    expected: Sequence[Sequence[Choice]], got: Sequence[Sequence[Choice]], tolerance: float, names: Sequence[str]
) -> Agreement:
    """Compares answers to the same prompts, step by step.

    ``tolerance`` is the largest difference of a log-probability, in nats; ``names`` are the answers' for messages.
    Raises `Mismatch` where they differ by more, or if too little could be compared.
    """
    tokens = sum(len(answer) for answer in expected)
    compared = equal = 0
    difference = 0.0
    for name, mine, theirs in zip(names, expected, got, strict=True):
        for step, (one, other) in enumerate(zip(mine, theirs, strict=True)):
            differences = {
                token: abs(one.logprobs[token] - other.logprobs[token])
                for token in one.logprobs.keys() & other.logprobs
            }
            for token in (one.token, other.token):
                if token not in differences:
                    raise Mismatch(f"{name}, token {step}: {token} is the best of one and not among the other's best")
            worst = max(differences, key=lambda token: differences[token])
            # Written so that a NaN is a mismatch.
            if not differences[worst] <= tolerance:
                raise Mismatch(
                    f"{name}, token {step}: the log-probability of {worst} is {one.logprobs[worst]:.4f} and "
                    f"{other.logprobs[worst]:.4f}, expected at most {tolerance:g} between them"
                )
            difference = max(difference, differences[worst])
            compared += 1
            if one.token != other.token:
                break  # both within the tolerance, so no more than twice that apart in either
            equal += 1
    if compared < LEAST_COMPARED * tokens:
        raise Mismatch(f"only {compared} of {tokens} tokens could be compared, expected {LEAST_COMPARED:.0%}")
    return Agreement(tokens, compared, equal, difference)


def largest_difference(one: Sequence[Sequence[Choice]], other: Sequence[Sequence[Choice]]) -> float:
    """How far apart the first tokens of any two answers are: the largest difference of a log-probability, in nats.

    A token that is among the most likely of one alone counts as far as it is off at least.
    """
    largest = 0.0
    for mine, theirs in zip(one, other, strict=True):
        for a, b in ((mine[0].logprobs, theirs[0].logprobs), (theirs[0].logprobs, mine[0].logprobs)):
            lowest = min(b.values())
            largest = max(largest, *(abs(a[token] - b[token]) if token in b else a[token] - lowest for token in a))
    return largest
