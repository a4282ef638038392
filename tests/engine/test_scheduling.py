"""What the scheduler may do to a request must not show in its tokens: company, preemption, prefix hits, recycling."""

from typing import Any

import pytest
import torch
from vllm import LLM, SamplingParams

from support.engines import cache_manager, engine, greedy, metric, worker_layers
from support.golden_data import CONFIGURATIONS, GENERATED, Golden

GDN = CONFIGURATIONS["gdn_qwen2"]


@pytest.fixture(params=CONFIGURATIONS.values(), ids=lambda golden: golden.name)
def golden(request: pytest.FixtureRequest) -> Golden:
    return request.param


def setting(golden: Golden) -> dict[str, Any]:
    return {"checkpoint": str(golden.ahn), "window": golden.window, "sinks": golden.sinks}


def run_staggered(llm: LLM, arrivals: list[tuple[int, str, list[int]]], max_tokens: int) -> dict[str, list[int]]:
    """Submit requests while others run: ``(step, id, prompt)``; returns their tokens."""
    params = SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True, detokenize=False)
    finished: dict[str, list[int]] = {}
    step = 0
    while len(finished) < len(arrivals):
        for arrival, name, prompt in arrivals:
            if arrival == step:
                llm.llm_engine.add_request(name, {"prompt_token_ids": prompt}, params)
        for output in llm.llm_engine.step():
            if output.finished:
                finished[output.request_id] = list(output.outputs[0].token_ids)
        step += 1
        assert step < 5000
    return finished


def test_requests_of_every_length_come_and_go(golden: Golden) -> None:
    """Prefills, chunks that begin inside W + S and end beyond it, decodes and short requests share steps."""
    cases = golden.cases()
    arrivals = [(7 * i, f"{i}", case.prompt.tolist()) for i, case in enumerate([*cases, *reversed(cases), *cases])]
    with engine(golden.base, setting(golden), max_num_batched_tokens=48, max_num_seqs=8) as llm:
        finished = run_staggered(llm, arrivals, GENERATED)
    expected = [case.tokens.tolist() for case in [*cases, *reversed(cases), *cases]]
    assert [finished[f"{i}"] for i in range(len(expected))] == expected


def test_preemption(golden: Golden) -> None:
    """A pool too small for all: requests lose their pages and their state, and start again."""
    cases = golden.cases() * 2
    with engine(
        golden.base,
        setting(golden),
        block_size=16,
        max_model_len=400,
        max_num_batched_tokens=32,
        max_num_seqs=8,
        num_gpu_blocks_override=14,
    ) as llm:
        results = greedy(llm, [case.prompt for case in cases], GENERATED)
        assert metric(llm, "vllm:num_preemptions") > 0
        assert cache_manager(llm).usage == 0
    assert [tokens for tokens, _ in results] == [case.tokens.tolist() for case in cases]


def test_preemption_with_prefix_caching() -> None:
    """Preempted requests resume where they were, to the block; they and others find what is cached."""
    cases = GDN.cases() * 2
    with engine(
        GDN.base,
        setting(GDN),
        block_size=16,
        max_model_len=400,
        max_num_batched_tokens=32,
        max_num_seqs=8,
        num_gpu_blocks_override=60,
        enable_prefix_caching=True,
    ) as llm:
        results = greedy(llm, [case.prompt for case in cases], GENERATED)
        assert metric(llm, "vllm:num_preemptions") > 0
        assert metric(llm, "vllm:prefix_cache_hits") > 0
    assert [tokens for tokens, _ in results] == [case.tokens.tolist() for case in cases]


POISONS = {"nan": float("nan"), "inf": float("inf"), "large": 1e30}


@pytest.mark.parametrize("budget", [64, 1024])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_what_pages_held_before_does_not_matter(dtype: str, budget: int) -> None:
    """Fill every page with the worst it could hold, and compare with fresh ones, bit by bit."""
    prompts = [case.prompt for case in GDN.cases()]
    with engine(GDN.base, setting(GDN), dtype=dtype, max_num_batched_tokens=budget, max_num_seqs=8) as llm:
        fresh = greedy(llm, prompts, GENERATED, logprobs=-1)
        for _, logprobs in fresh:
            assert logprobs is not None and torch.isfinite(logprobs).all()
        for name, poison in POISONS.items():
            for layer in worker_layers(llm).values():
                largest = torch.finfo(layer.kv_cache.dtype).max
                layer.kv_cache.fill_(min(poison, largest) if name == "large" else poison)
            poisoned = greedy(llm, prompts, GENERATED, logprobs=-1)
            for (fresh_tokens, fresh_logprobs), (tokens, logprobs) in zip(fresh, poisoned, strict=True):
                assert tokens == fresh_tokens, name
                assert fresh_logprobs is not None and logprobs is not None
                assert torch.equal(logprobs, fresh_logprobs), name


def test_bf16_short_requests_after_long_ones_in_a_small_pool() -> None:
    """Window blocks that were states a moment ago: float32 read as bfloat16 is NaN now and then."""
    short = [GDN.case(20).prompt, GDN.case(32).prompt, GDN.case(20).prompt[:5]]
    with engine(GDN.base, setting(GDN), dtype="bfloat16") as llm:
        expected = [greedy(llm, [prompt], 9, logprobs=-1)[0] for prompt in short]
    with engine(
        GDN.base,
        setting(GDN),
        dtype="bfloat16",
        max_model_len=400,
        num_gpu_blocks_override=16,
        max_num_batched_tokens=64,
    ) as llm:
        for _ in range(4):
            greedy(llm, [GDN.case(300).prompt] * 2, 40)
            for prompt, (tokens, logprobs) in zip(short, expected, strict=True):
                ((again, logprobs_again),) = greedy(llm, [prompt], 9, logprobs=-1)
                assert logprobs is not None and logprobs_again is not None
                assert again == tokens
                assert torch.equal(logprobs_again, logprobs)
