"""The engine against the published implementation: tokens and logits of every golden configuration."""

import pytest
import torch

from support.engines import engine, greedy
from support.golden_data import CONFIGURATIONS, GENERATED, LOGIT_TOLERANCE, Golden
from vllm_ahn.attention.choose import choose_core
from vllm_ahn.attention.cpu.compute import CPUCore

BUDGETS = {"1 token": 1, "7 tokens": 7, "64 tokens": 64, "all": 1024}


@pytest.fixture(params=CONFIGURATIONS.values(), ids=lambda golden: golden.name)
def golden(request: pytest.FixtureRequest) -> Golden:
    return request.param


def setting(golden: Golden) -> dict[str, object]:
    return {"checkpoint": str(golden.ahn), "window": golden.window, "sinks": golden.sinks}


@pytest.mark.parametrize("budget", BUDGETS.values(), ids=BUDGETS.keys())
def test_tokens_and_logits(golden: Golden, budget: int) -> None:
    """All lengths in one batch, whatever the number of tokens a step may take."""
    cases = golden.cases()
    seqs = min(budget, len(cases))
    with engine(
        golden.base, setting(golden), max_num_batched_tokens=budget, max_num_seqs=seqs, logprobs_mode="raw_logits"
    ) as llm:
        results = greedy(llm, [case.prompt for case in cases], GENERATED, logprobs=-1)
    for case, (tokens, logits) in zip(cases, results, strict=True):
        assert tokens == case.tokens.tolist(), case.length
        assert logits is not None
        assert (logits - case.logits).abs().max() <= LOGIT_TOLERANCE, case.length


@pytest.mark.parametrize("block_size", [16, 64, 128])
def test_block_sizes(golden: Golden, block_size: int) -> None:
    cases = golden.cases()
    with engine(golden.base, setting(golden), block_size=block_size, max_num_batched_tokens=96) as llm:
        results = greedy(llm, [case.prompt for case in cases], GENERATED)
    assert [tokens for tokens, _ in results] == [case.tokens.tolist() for case in cases]


def test_one_request_at_a_time_and_again(golden: Golden) -> None:
    """No trace of what ran before, in any order, is left in the pages."""
    cases = golden.cases()
    with engine(golden.base, setting(golden)) as llm:
        for case in [*cases, *reversed(cases)]:
            ((tokens, _),) = greedy(llm, [case.prompt], GENERATED)
            assert torch.equal(torch.tensor(tokens), case.tokens), case.length


def test_without_a_compiled_kernel(golden: Golden, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where there is no compiler steps run in plain torch."""
    core = choose_core()
    assert isinstance(core, CPUCore) and core.library is not None
    monkeypatch.setattr(core, "library", None)
    cases = golden.cases()
    with engine(golden.base, setting(golden), max_num_batched_tokens=64) as llm:
        results = greedy(llm, [case.prompt for case in cases], GENERATED)
    assert [tokens for tokens, _ in results] == [case.tokens.tolist() for case in cases]
