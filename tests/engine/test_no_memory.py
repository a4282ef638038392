"""Sinks and window alone, ``--ahn none``: the baseline whose only difference to an AHN is the memory."""

from pathlib import Path
from typing import Any

import pytest
import torch

from support.engines import cache_manager, engine, greedy, worker_layers
from vllm_ahn.reference import from_folders
from vllm_ahn.tools.tiny import make_tiny

MAX_TOKENS = 12
TOLERANCE = 1e-3
WINDOW = 64


def prompts(capacity: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(capacity)
    return [torch.randint(500, (n,), generator=generator) for n in (1, capacity, capacity + 1, 150, 333)]


@pytest.mark.parametrize("budget", [50, 1000])
@pytest.mark.parametrize("sinks", [32, 7, 0], ids=["rearranged", "gathered", "no-sinks"])
@pytest.mark.parametrize("model_type", ["qwen2", "qwen3"])
def test_logits(model_type: str, sinks: int, budget: int, tmp_path: Path) -> None:
    base = make_tiny(tmp_path, seed=3, model_type=model_type).base
    asked = prompts(WINDOW + sinks)
    setting = {"checkpoint": "none", "window": WINDOW, "sinks": sinks}
    with engine(base, setting, max_num_batched_tokens=budget, logprobs_mode="raw_logits") as llm:
        results = greedy(llm, asked, MAX_TOKENS, logprobs=-1)
        assert all("state" not in name for name in worker_layers(llm))
    reference = from_folders(base, "none", WINDOW, sinks)
    full = from_folders(base)
    for prompt, (tokens, logits) in zip(asked, results, strict=True):
        sequence = torch.cat((prompt, torch.tensor(tokens[:-1], dtype=torch.long)))[None]
        with torch.no_grad():
            expected = reference(sequence, last=MAX_TOKENS)[0]
            attending_to_all = full(sequence, last=MAX_TOKENS)[0]
        assert logits is not None
        assert (logits - expected).abs().max() <= TOLERANCE
        if len(prompt) > 2 * WINDOW:
            assert (logits - attending_to_all).abs().max() > 2 * TOLERANCE


def test_blocks_and_prefix_hits(tmp_path: Path) -> None:
    """As many blocks as an AHN's window has, no state, no gates; hits beyond W + S give the same tokens."""
    base = make_tiny(tmp_path, seed=4).base
    prompt = torch.randint(500, (400,), generator=torch.Generator().manual_seed(0))
    setting = {"checkpoint": "none", "window": WINDOW, "sinks": 32}
    most_held = 0
    with engine(base, setting, enable_prefix_caching=True, max_num_batched_tokens=64) as llm:
        manager = cache_manager(llm)
        first = greedy(llm, [prompt], MAX_TOKENS)
        llm.llm_engine.add_request("again", {"prompt_token_ids": prompt.tolist()}, params(MAX_TOKENS))
        again: list[int] = []
        while llm.llm_engine.has_unfinished_requests():
            for output in llm.llm_engine.step():
                again = list(output.outputs[0].token_ids)
                assert output.num_cached_tokens == 399 // 32 * 32
            blocks = next(iter(manager.coordinator.single_type_managers[0].req_to_blocks.values()), [])
            most_held = max(most_held, sum(not block.is_null for block in blocks))
        assert again == first[0][0]
        assert len(manager.kv_cache_config.kv_cache_groups) == 1
        page = manager.kv_cache_config.kv_cache_groups[0].kv_cache_spec.page_size_bytes
        layer = next(iter(worker_layers(llm).values()))
        assert page == 32 * layer.num_kv_heads * 2 * layer.head_size * 4
    # Sinks, a window that starts anywhere in a block, and the 64 tokens of a step.
    assert 0 < most_held <= 1 + (WINDOW + 64) // 32 + 1


def params(max_tokens: int) -> Any:
    from vllm import SamplingParams

    return SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True, detokenize=False)


def test_a_merged_memory_can_be_left_out(tmp_path: Path) -> None:
    merged = make_tiny(tmp_path, seed=2, merged=True, use_router=True)
    apart = make_tiny(tmp_path / "apart", seed=2, use_router=True)
    asked = prompts(WINDOW + 8)
    results = []
    for base in (merged.base, apart.base):
        with engine(base, {"checkpoint": "none", "window": WINDOW, "sinks": 8}) as llm:
            results.append(greedy(llm, asked, MAX_TOKENS))
    assert results[0] == results[1]
