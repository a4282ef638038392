"""Whether an engine's greedy answers are those they should be, as far as rounding lets them.

Tokens alone cannot tell: between the two most likely of 150,000 there is often less than what bfloat16 rounds off, and
after one that differs everything does. So `compare` compares the log-probabilities of the most likely
tokens at every step, to a tolerance; the first step at which two engines choose differently, allowed only if by their
own figures both tokens were about as likely, ends the comparison of that answer, as the contexts differ from there on.
Where weights are on disk, `check_past` asks the reference in float32 instead.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from engines import Choice, EngineProcess, Prompt
from models import FULL, ROWS, Comparison
from report import Mismatch
from vllm_ahn.config import NO_MEMORY
from vllm_ahn.reference import from_folders

Prompts = Sequence[Prompt]
Answers = Sequence[Sequence[Choice]]
Engines = dict[str, EngineProcess]
Reference = Callable[..., torch.Tensor]
"""As `vllm_ahn.reference.ReferenceModel` is called."""

LEAST_COMPARED = 0.5
"""Share of the tokens that must have been compared for an agreement to count."""


@dataclasses.dataclass(frozen=True)
class Agreement:
    """What was compared: of so many ``tokens``, steps that were, those of them at which both chose the same token, and
    the largest difference between two log-probabilities of one token."""

    tokens: int
    compared: int
    equal: int
    difference: float

    def __str__(self) -> str:
        ties = self.compared - self.equal
        ended = f", {ties} answers ended early at a near-tie" if ties else ""
        within = f"log-probabilities differ by at most {self.difference:.2g}"
        return f"{self.equal} of {self.tokens} tokens equal{ended}; {within}"


def compare(expected: Answers, got: Answers, tolerance: float, names: Sequence[str]) -> Agreement:
    """Compare two engines' answers to the same prompts, step by step.

    ``tolerance`` is the largest difference of a log-probability, in nats; ``names`` are the answers', for messages.
    Raises `Mismatch` if they differ by more, or too little could be compared.
    """
    tokens = sum(len(answer) for answer in expected)
    compared = equal = 0
    difference = 0.0
    for name, mine, theirs in zip(names, expected, got, strict=True):
        for step, (one, other) in enumerate(zip(mine, theirs, strict=True)):
            both = one.logprobs.keys() & other.logprobs
            differences = {token: abs(one.logprobs[token] - other.logprobs[token]) for token in both}
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


def largest_difference(one: Answers, other: Answers) -> float:
    """Return how far apart the first tokens of any two answers are: the largest difference of a log-probability, nats.

    A token that is among the most likely of one alone counts as far as it is off at least.
    """
    largest = 0.0
    for mine, theirs in zip(one, other, strict=True):
        for a, b in ((mine[0].logprobs, theirs[0].logprobs), (theirs[0].logprobs, mine[0].logprobs)):
            lowest = min(b.values())
            largest = max(largest, *(abs(a[token] - b[token]) if token in b else a[token] - lowest for token in a))
    return largest


def check_inside(full: EngineProcess, other: EngineProcess, prompts: Prompts, answer: int) -> str:
    """Compare greedy answers of ``answer`` tokens, all prompts at once, which must stay inside the window.

    Returns what was found. Raises `Mismatch` unless all tokens are those of full attention.
    """
    if other.generate(prompts, answer).tokens != full.generate(prompts, answer).tokens:
        raise Mismatch("inside the window the tokens are not the base's")
    return f"{len(prompts)} requests, {answer} tokens each: equal to the base's"


def check_past(
    full: EngineProcess, other: EngineProcess, reference: Reference, prompts: Prompts, answer: int, tolerance: float
) -> str:
    """Compare greedy answers of ``answer`` tokens to prompts past the window with what ``reference`` computes.

    Each token's logit may be ``tolerance`` less than the reference's best. Returns what was found. Raises `Mismatch` if
    one is further off, or if full attention gives all the same answers, which would show nothing.
    """
    answers = other.generate(prompts, answer).tokens
    short_of_best = 0.0
    for prompt, tokens in zip(prompts, answers, strict=True):
        with torch.no_grad():
            logits = reference(torch.tensor([[*prompt, *tokens[:-1]]]), last=answer)[0]
        chosen = logits.gather(1, torch.tensor(tokens)[:, None])[:, 0]
        worst = float((logits.amax(-1) - chosen).max())
        if not worst <= tolerance:
            raise Mismatch(f"past the window a token is {worst:.3f} below the reference's best, allowed is {tolerance}")
        short_of_best = max(short_of_best, worst)
    if full.generate(prompts, answer).tokens == answers:
        raise Mismatch("past the window the tokens are those of full attention, so they show nothing")
    found = f"each at most {short_of_best:.3f} below the float32 reference's best logit"
    return f"{len(prompts)} requests, {answer} tokens after {len(prompts[0])}: {found}"


def check_rows(
    setting: Comparison, engines: Engines, folders: dict[str, Path], inside: Prompts, past: Prompts, answer: int
) -> dict[str, str]:
    """Check every row but full attention as `check_inside` and `check_past` do; return what was found."""
    found = {}
    for name, row in ((name, ROWS[name]) for name in setting.rows[1:]):
        full, engine, ahn = engines[FULL], engines[name], folders.get(str(row.memory), NO_MEMORY)
        reference = from_folders(folders["base"], ahn, setting.window, setting.sinks)
        found[f"{row.text}, inside the window"] = check_inside(full, engine, inside, answer)
        found[f"{row.text}, past it"] = check_past(full, engine, reference, past, answer, setting.tolerance)
    return found
