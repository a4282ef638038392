"""What the tokens of an engine with an AHN must be before it is timed: full attention's inside the window, past it the
reference's.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from agreement import Mismatch
from engine_process import EngineProcess

if TYPE_CHECKING:
    from vllm_ahn.reference import ReferenceModel


def check_inside(full: EngineProcess, other: EngineProcess, prompts: Sequence[Sequence[int]], answer: int) -> str:
    """Compares greedy answers of ``answer`` tokens, all prompts at once, which must stay inside the window.

    Returns what was found; raises `Mismatch` unless all tokens are those of full attention.
    """
    if other.throughput(prompts, answer).tokens != full.throughput(prompts, answer).tokens:
        raise Mismatch("inside the window the tokens are not the base's")
    return f"{len(prompts)} requests, {answer} tokens each: equal to the base's"


def check_past(
    full: EngineProcess,
    other: EngineProcess,
    reference: ReferenceModel,
    prompts: Sequence[Sequence[int]],
    answer: int,
    tolerance: float,
) -> str:
    """Compares greedy answers of ``answer`` tokens to prompts past the window with what ``reference`` computes.

    Each token's logit may be ``tolerance`` less than the reference's best. Returns what was found; raises `Mismatch` if
    one is further off, or if full attention gives all the same answers, which would show nothing.
    """
    answers = other.throughput(prompts, answer).tokens
    short_of_best = 0.0
    for prompt, tokens in zip(prompts, answers, strict=True):
        with torch.no_grad():
            logits = reference(torch.tensor([[*prompt, *tokens[:-1]]]), last=answer)[0]
        chosen = logits.gather(1, torch.tensor(tokens)[:, None])[:, 0]
        worst = float((logits.amax(-1) - chosen).max())
        if not worst <= tolerance:
            raise Mismatch(f"past the window a token is {worst:.3f} below the reference's best, allowed is {tolerance}")
        short_of_best = max(short_of_best, worst)
    if full.throughput(prompts, answer).tokens == answers:
        raise Mismatch("past the window the tokens are those of full attention, so they show nothing")
    found = f"each at most {short_of_best:.3f} below the float32 reference's best logit"
    return f"{len(prompts)} requests, {answer} tokens after {len(prompts[0])}: {found}"
