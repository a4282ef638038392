"""Prefix caching beyond ``W + S``: requests that resume from a checkpoint answer like those that do not.

Where they resume is tested without a model, in ``tests/cache/test_checkpoints.py``.
"""

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from vllm import LLM, SamplingParams

from support import spoilt_drafts
from support.engines import cache_manager, engine, greedy, metric, worker_layers
from support.golden_data import CONFIGURATIONS, GENERATED, Golden
from vllm_ahn.tools.tiny import make_tiny

ALL = 1024
BUDGETS = {16: (7, ALL), 32: (64, 1), 64: (ALL, 64)}
"""Tokens of a step, for each block size: the first for a quick run."""


def setting(golden: Golden, **more: Any) -> dict[str, Any]:
    return {"checkpoint": str(golden.ahn), "window": golden.window, "sinks": golden.sinks, **more}


def tokens(length: int, seed: int) -> list[int]:
    return torch.randint(512, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


def poison(llm: LLM) -> None:
    """Fill every page with what nobody must read."""
    for layer in worker_layers(llm).values():
        layer.kv_cache.fill_(float("nan"))


def served_alone(llm: LLM, prompt: list[int], max_tokens: int = GENERATED) -> tuple[list[int], int]:
    """Tokens of a request, and how many of its prompt's came from the cache."""
    params = SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True, detokenize=False)
    (output,) = llm.generate([{"prompt_token_ids": prompt}], params, use_tqdm=False)
    assert output.num_cached_tokens is not None
    return list(output.outputs[0].token_ids), output.num_cached_tokens


def conversation(golden: Golden) -> list[list[int]]:
    """Prompts that share beginnings: turns of a chat, the same again, ends on blocks, and forks."""
    case = golden.case(300)
    first = case.prompt.tolist()
    second = [*first, *case.tokens.tolist(), *tokens(50, 1)]
    return [
        first,
        second,
        first,
        [*first, *tokens(9, 2)],
        first[:256],
        first[:256],
        [*first[:200], *tokens(40, 3)],
        [*first[:200], *tokens(30, 4)],
        second,
    ]


CASES = [
    pytest.param(name, block_size, budget, marks=[] if index == 0 and quick else [pytest.mark.slow])
    for name in CONFIGURATIONS
    for block_size, budgets in BUDGETS.items()
    for index, budget in enumerate(budgets)
    for quick in [
        (name, block_size) in {("gdn_qwen2", 16), ("mamba2_qwen2", 32), ("dn_qwen3", 64), ("gdn_qwen2_s0", 16)}
    ]
]


@pytest.mark.parametrize(("name", "block_size", "budget"), CASES)
def test_a_conversation(name: str, block_size: int, budget: int) -> None:
    golden = CONFIGURATIONS[name]
    prompts = conversation(golden)
    with engine(golden.base, setting(golden), block_size=block_size, max_num_seqs=16) as llm:
        expected = [result for result, _ in greedy(llm, prompts, GENERATED)]
    assert expected[0] == golden.case(300).tokens.tolist()
    arguments = {"block_size": block_size, "max_num_batched_tokens": budget, "enable_prefix_caching": True}
    served = setting(golden, checkpoint_interval=64)
    with engine(golden.base, served, max_num_seqs=min(16, budget), **arguments) as llm:
        poison(llm)
        hits = []
        for prompt, answer in zip(prompts, expected, strict=True):
            result, cached = served_alone(llm, prompt)
            assert result == answer, (len(hits), cached)
            hits.append(cached)
        # The turns of the chat, the same again, with another end, and a prompt that ends on a block again.
        for index, end in {0: 0, 1: 332, 2: 299, 3: 300, 5: 255, 8: 382}.items():
            assert hits[index] == end // block_size * block_size, (index, hits)
        assert metric(llm, "vllm:prefix_cache_hits") == sum(hits)
        # Together, all of them warm.
        assert [result for result, _ in greedy(llm, prompts, GENERATED)] == expected
        assert cache_manager(llm).usage == 0
        assert llm.reset_prefix_cache()
        assert served_alone(llm, prompts[0]) == (expected[0], 0)


def run(llm: LLM, arrivals: list[tuple[int, str, list[int], int]], aborts: dict[str, int]) -> dict[str, list[int]]:
    """Submit ``(step, id, prompt, max_tokens)`` while others run, take some back; what was generated of each."""
    generated: dict[str, list[int]] = {}
    step = 0
    while arrivals or llm.llm_engine.has_unfinished_requests():
        for arrival in [arrival for arrival in arrivals if arrival[0] <= step]:
            arrivals.remove(arrival)
            _, name, prompt, max_tokens = arrival
            params = SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True, detokenize=False)
            llm.llm_engine.add_request(name, {"prompt_token_ids": prompt}, params)
        llm.llm_engine.abort_request([name for name, at in aborts.items() if at == step])
        for output in llm.llm_engine.step():
            generated[output.request_id] = list(output.outputs[0].token_ids)
        step += 1
        assert step < 10_000
    return generated


@pytest.mark.parametrize(
    ("name", "block_size", "num_blocks", "interval", "drafts"),
    [
        ("gdn_qwen2", 16, 30, 64, 0),
        ("mamba2_qwen2", 16, 24, 0, 5),
        pytest.param("dn_qwen3", 32, 26, 96, 0, marks=pytest.mark.slow),
        pytest.param("gdn_qwen2_s0", 16, 60, 48, 8, marks=pytest.mark.slow),
        pytest.param("dn_qwen3", 16, 200, None, 15, marks=pytest.mark.slow),
        pytest.param("gdn_qwen2", 64, 22, 32, 3, marks=pytest.mark.slow),
    ],
)
def test_requests_at_random(name: str, block_size: int, num_blocks: int, interval: int | None, drafts: int) -> None:
    """Shared trunks, own tails, forks and aborts, in poisoned pages of small pools, with and without drafts."""
    golden = CONFIGURATIONS[name]
    rng = random.Random(num_blocks)
    case = golden.case(300)
    trunks = [[*case.prompt.tolist(), *case.tokens.tolist()], tokens(340, num_blocks)]
    arrivals = []
    for index in range(30):
        shared = rng.choice(trunks)[: rng.choice([rng.randint(20, 330), 304, 288, 333])]
        prompt = [*shared, *tokens(rng.randint(1, 40), index)]
        arrivals.append((rng.randrange(60), f"{index}", prompt, rng.choice([1, 9, 33, 50])))
    aborts = {f"{index}": rng.randrange(20, 80) for index in rng.sample(range(30), 5)}
    arguments = {"block_size": block_size, "max_num_batched_tokens": 64, "max_num_seqs": 6, "max_model_len": 512}
    with engine(golden.base, setting(golden), **(arguments | {"max_num_batched_tokens": ALL})) as llm:
        full = greedy(llm, [prompt for _, _, prompt, _ in arrivals], 50)
    expected = {arrival[1]: result[: arrival[3]] for arrival, (result, _) in zip(arrivals, full, strict=True)}
    if drafts:
        spoilt_drafts.expect((prompt, expected[which]) for _, which, prompt, _ in arrivals)
        arguments["speculative_config"] = {
            "method": "custom_class",
            "model": spoilt_drafts.PROPOSER,
            "num_speculative_tokens": drafts,
        }
    served = setting(golden, checkpoint_interval=interval)
    arguments |= {"enable_prefix_caching": True, "num_gpu_blocks_override": num_blocks}
    with engine(golden.base, served, **arguments) as llm:
        poison(llm)
        generated = run(llm, arrivals, aborts)
        assert metric(llm, "vllm:prefix_cache_hits") > 0
        assert cache_manager(llm).usage == 0
        assert llm.reset_prefix_cache()
    for which, answer in expected.items():
        if which in aborts:
            assert answer[: len(generated.get(which, []))] == generated.get(which, [])
        else:
            assert generated[which] == answer, which


def test_salts_keep_apart() -> None:
    golden = CONFIGURATIONS["gdn_qwen2"]
    prompt = golden.case(300).prompt.tolist()
    params = SamplingParams(temperature=0, max_tokens=3, ignore_eos=True, detokenize=False)
    with engine(golden.base, setting(golden), block_size=16, enable_prefix_caching=True) as llm:
        cached = []
        for salt in (None, "a", "b", "a", None):
            asked: dict[str, Any] = {"prompt_token_ids": prompt} | ({} if salt is None else {"cache_salt": salt})
            (output,) = llm.generate([asked], params, use_tqdm=False)  # type: ignore[list-item]
            assert list(output.outputs[0].token_ids) == golden.case(300).tokens[:3].tolist()
            cached.append(output.num_cached_tokens)
    assert cached == [0, 0, 0, 288, 288]


@pytest.mark.parametrize("layers", ["1", "none"])
def test_other_groups_of_layers(layers: str, tmp_path: Path) -> None:
    """Some layers with full attention, for which every block is kept; and no memory, for which the window is enough."""
    paths = make_tiny(tmp_path, seed=3, **({} if layers == "none" else {"fa_layer_ids": layers}))
    served = {"checkpoint": "none" if layers == "none" else str(paths.ahn), "window": 32, "sinks": 16}
    prompt = [token % 500 for token in tokens(300, 1)]
    prompts = [prompt, [*prompt, 7, 8, 9], prompt[:200], [*prompt[:200], 1, 2, 3]]
    with engine(paths.base, served, block_size=16) as llm:
        expected = [result for result, _ in greedy(llm, prompts, 9)]
    with engine(paths.base, served, block_size=16, enable_prefix_caching=True, max_num_batched_tokens=64) as llm:
        poison(llm)
        results = [served_alone(llm, asked, 9) for asked in prompts]
        assert [result for result, _ in results] == expected
        assert [cached for _, cached in results] == [0, 288, 192, 192]
        assert cache_manager(llm).usage == 0


@pytest.mark.parametrize("window, sinks", [(100, 28), (101, 30), (200, 0)])
def test_windows_and_sinks_that_fill_no_blocks(window: int, sinks: int) -> None:
    """Hits within W + S, and beyond it."""
    golden = CONFIGURATIONS["gdn_qwen2"]
    prompt = golden.case(300).prompt.tolist()
    prompts = [prompt, prompt, prompt[:150], prompt[:140] + prompt[:90]]
    served = {"checkpoint": str(golden.ahn), "window": window, "sinks": sinks}
    with engine(golden.base, served, max_num_batched_tokens=100) as llm:
        expected = [greedy(llm, [asked], GENERATED)[0][0] for asked in prompts]
    with engine(golden.base, served, max_num_batched_tokens=100, enable_prefix_caching=True) as llm:
        results = [served_alone(llm, asked) for asked in prompts]
        assert [result for result, _ in results] == expected
        assert [cached for _, cached in results] == [0, 288, 128, 128]
        # Together, with all of them warm.
        assert [result for result, _ in greedy(llm, prompts, GENERATED)] == expected
