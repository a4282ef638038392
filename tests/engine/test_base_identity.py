"""While a sequence fits W + S, an AHN model is its base: same tokens, same logprobs, on the same machine."""

import functools
from pathlib import Path
from typing import Any

import pytest
import torch

from support.engines import engine, greedy
from support.golden_data import CONFIGURATIONS, Golden

MAX_TOKENS = 20
LENGTHS = (1, 2, 31, 32, 33, 100, 180)
WINDOW, SINKS = 180, 20


def results(base: Path, ahn: dict[str, Any] | None, budget: int) -> list[tuple[list[int], torch.Tensor | None]]:
    generator = torch.Generator().manual_seed(budget)
    prompts = [torch.randint(512, (length,), generator=generator) for length in LENGTHS]
    with engine(base, ahn, max_num_batched_tokens=budget, max_num_seqs=16) as llm:
        return greedy(llm, prompts, MAX_TOKENS, logprobs=-1)


@functools.cache
def plain_results(base: Path, budget: int) -> list[tuple[list[int], torch.Tensor | None]]:
    """The base's own, once for all AHNs of it."""
    return results(base, None, budget)


@pytest.mark.parametrize("golden", CONFIGURATIONS.values(), ids=CONFIGURATIONS.keys())
@pytest.mark.parametrize("budget", [64, 1024])
def test_same_tokens_and_logprobs(golden: Golden, budget: int) -> None:
    with_ahn = results(golden.base, {"checkpoint": str(golden.ahn), "window": WINDOW, "sinks": SINKS}, budget)
    plain = plain_results(golden.base, budget)
    for (base_tokens, base_logprobs), (tokens, logprobs) in zip(plain, with_ahn, strict=True):
        assert tokens == base_tokens
        assert base_logprobs is not None and logprobs is not None
        assert (logprobs - base_logprobs).abs().max() <= 1e-4


def test_beyond_it_differs() -> None:
    """The comparison above can fail: one token past W + S the memory speaks."""
    golden = CONFIGURATIONS["gdn_qwen2"]
    prompt = golden.case(100).prompt
    logprobs = []
    for ahn in (None, {"checkpoint": str(golden.ahn), "window": 80, "sinks": 19}):
        with engine(golden.base, ahn) as llm:
            ((_, values),) = greedy(llm, [prompt], 1, logprobs=-1)
            assert values is not None
            logprobs.append(values)
    assert (logprobs[0] - logprobs[1]).abs().max() > 1e-3
