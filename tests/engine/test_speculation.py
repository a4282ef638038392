"""Speculative decoding: whatever becomes of drafts, tokens are those without."""

import re
from typing import Any

import pytest
import torch
from vllm import SamplingParams
from vllm.sampling_params import StructuredOutputsParams

from support import spoilt_drafts
from support.engines import cache_manager, engine, greedy, metric, worker_layers
from support.golden_data import CONFIGURATIONS, GENERATED, LOGIT_TOLERANCE, Golden
from support.paths import ROOT


@pytest.fixture(params=CONFIGURATIONS.values(), ids=lambda golden: golden.name)
def golden(request: pytest.FixtureRequest) -> Golden:
    return request.param


def setting(golden: Golden) -> dict[str, Any]:
    return {"checkpoint": str(golden.ahn), "window": golden.window, "sinks": golden.sinks}


def drafts(num_drafts: int) -> dict[str, Any]:
    return {
        "speculative_config": {
            "method": "custom_class",
            "model": spoilt_drafts.PROPOSER,
            "num_speculative_tokens": num_drafts,
        }
    }


@pytest.mark.parametrize("num_drafts", [1, 3, 8, 15])
@pytest.mark.parametrize("caching", [False, True], ids=["", "caching"])
def test_any_number_of_drafts_is_accepted(golden: Golden, num_drafts: int, caching: bool) -> None:
    """In pages full of NaN, in steps of few tokens, prompts beside decodes."""
    cases = golden.cases()
    spoilt_drafts.expect((case.prompt.tolist(), case.tokens.tolist()) for case in cases)
    with engine(
        golden.base,
        setting(golden),
        block_size=32 if num_drafts == 3 else 16,
        max_num_batched_tokens=64,
        max_num_seqs=8,
        logprobs_mode="raw_logits",
        enable_prefix_caching=caching,
        **drafts(num_drafts),
    ) as llm:
        for layer in worker_layers(llm).values():
            layer.kv_cache.fill_(float("nan"))
        for _ in range(1 if num_drafts < 8 else 3):
            results = greedy(llm, [case.prompt for case in cases], GENERATED, logprobs=-1)
            for case, (tokens, logits) in zip(cases, results, strict=True):
                assert tokens == case.tokens.tolist(), case.length
                assert logits is not None
                assert (logits - case.logits).abs().max() <= LOGIT_TOLERANCE, case.length
        assert cache_manager(llm).usage == 0
    assert set(spoilt_drafts.accepted) >= set(range(num_drafts + 1)), spoilt_drafts.accepted


def test_preemption(golden: Golden) -> None:
    """A pool too small for all."""
    cases = golden.cases() * 2
    spoilt_drafts.expect((case.prompt.tolist(), case.tokens.tolist()) for case in cases)
    with engine(
        golden.base,
        setting(golden),
        block_size=16,
        max_model_len=400,
        max_num_batched_tokens=32,
        max_num_seqs=8,
        num_gpu_blocks_override=26,
        **drafts(5),
    ) as llm:
        results = greedy(llm, [case.prompt for case in cases], GENERATED)
        assert metric(llm, "vllm:num_preemptions") > 0
        assert cache_manager(llm).usage == 0
    assert [tokens for tokens, _ in results] == [case.tokens.tolist() for case in cases]


def test_n_grams(golden: Golden) -> None:
    """vLLM's own drafts, on prompts that repeat themselves."""
    prompts = [case.prompt.repeat(3)[:250] for case in golden.cases()]
    with engine(golden.base, setting(golden), max_num_batched_tokens=100) as llm:
        expected = greedy(llm, prompts, 60)
    threads = torch.get_num_threads()
    config = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 3, "prompt_lookup_min": 1}
    try:
        with engine(golden.base, setting(golden), max_num_batched_tokens=100, speculative_config=config) as llm:
            assert greedy(llm, prompts, 60) == expected
            assert metric(llm, "vllm:spec_decode_num_accepted_tokens") > 0
    finally:
        torch.set_num_threads(threads)  # vLLM's proposer leaves torch with two


def test_one_slot_is_not_enough(golden: Golden, monkeypatch: pytest.MonkeyPatch) -> None:
    """The negative control: what a rejected draft has settled cannot be taken back."""
    from vllm_ahn.kernels.settled import Settling

    monkeypatch.setattr(Settling, "of", lambda window, sinks, **_: Settling(window, sinks))
    cases = [case for case in golden.cases() if case.length >= 100]
    spoilt_drafts.expect((case.prompt.tolist(), case.tokens.tolist()) for case in cases)
    with engine(golden.base, setting(golden), block_size=16, logprobs_mode="raw_logits", **drafts(8)) as llm:
        results = greedy(llm, [case.prompt for case in cases], GENERATED, logprobs=-1)
    errors = [float((logits - case.logits).abs().max()) for case, (_, logits) in zip(cases, results, strict=True)]
    assert max(errors) > LOGIT_TOLERANCE


def test_structured_output_beside_drafts() -> None:
    """With drafts and without, the same text, which fits the grammar."""
    small_model = ROOT / "examples" / "small_model"
    ahn = {"checkpoint": str(small_model / "gdn"), "window": 64, "sinks": 0}
    prompt = "def area(width, height):\n    return width * height\n\n\n" * 4
    params = SamplingParams(
        temperature=0, max_tokens=80, structured_outputs=StructuredOutputsParams(regex="(def [a-z]{3,9}[0-9]{2}\n){4}")
    )
    threads, texts = torch.get_num_threads(), []
    config = {"method": "ngram", "num_speculative_tokens": 5, "prompt_lookup_max": 4, "prompt_lookup_min": 2}
    try:
        for drafting in ({}, {"speculative_config": config}):
            with engine(small_model / "base", ahn, skip_tokenizer_init=False, **drafting) as llm:
                (output,) = llm.generate([prompt], params, use_tqdm=False)
                texts.append(output.outputs[0].text)
                if drafting:
                    assert metric(llm, "vllm:spec_decode_num_accepted_tokens") > 0
    finally:
        torch.set_num_threads(threads)
    assert texts[0] == texts[1]
    assert re.fullmatch("(def [a-z]{3,9}[0-9]{2}\n){4}", texts[0]), texts[0]
