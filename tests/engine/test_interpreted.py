"""The GPU path end to end: vLLM's V2 model runner and Triton kernels in the interpreter give the golden tokens.

In the interpreter a step of three decodes takes a second and 100 tokens of a prompt take five. So the prompts are the
shorter ones, and the tokens the first: requests pass W + S, and the end of a block, in a prompt and in a decode.
"""

from typing import Any

import pytest
import torch

from support.golden_data import CONFIGURATIONS, Golden
from support.interpreted_engine import TWO_PROCESSES, run
from support.spoilt_drafts import PROPOSER
from vllm_ahn.reference import from_folders

pytestmark = [pytest.mark.slow, pytest.mark.gpu_path]

V2_RUNNER = "vllm.v1.worker.cpu.model_runner.CPUModelRunner"
UP_TO = 100
"""Tokens of the longest prompt, three times W + S."""
FIRST = 14
"""Tokens for each prompt: the shortest, of 20, crosses W + S = 32."""
FROM_THE_EDGE = 5
"""Tokens for each prompt where the shortest has 32 itself."""
FEW_SEGMENTS = {"paged.triton.SEGMENTS": 4}
"""Of the 16 parts of a decode's keys, which the interpreter takes one after the other. Engines of several processes and
``test_v1_runner`` have all of them."""


def continuations(golden: Golden, lengths: tuple[int, ...], generated: int = FIRST, **arguments: Any) -> dict[str, Any]:
    """Run the golden prompts of these lengths, check the tokens and return what else there is to see."""
    cases = [golden.case(length) for length in lengths]
    ahn = {"checkpoint": str(golden.ahn), "window": golden.window, "sinks": golden.sinks}
    result = run(golden.base, ahn, [case.prompt.tolist() for case in cases], generated, **arguments)
    assert {worker["core"] for worker in result["workers"]} == {"GPUCore"}
    for case, tokens in zip(cases, result["tokens"], strict=True):
        assert tokens == case.tokens[:generated].tolist(), case.length
    return result


def short(golden: Golden) -> tuple[int, ...]:
    """Lengths of the golden prompts that are used here."""
    return tuple(length for length in golden.lengths if length <= UP_TO)


@pytest.mark.parametrize("golden", CONFIGURATIONS.values(), ids=lambda golden: golden.name)
def test_all_lengths_in_one_batch(golden: Golden) -> None:
    constants = {"gpu.plan.MASKED_QUERIES": 40, **FEW_SEGMENTS}
    result = continuations(golden, short(golden), block_size=16, max_num_seqs=8, constants=constants)
    assert [worker["runner"] for worker in result["workers"]] == [V2_RUNNER]


def test_sinks_and_window_without_a_memory() -> None:
    golden = CONFIGURATIONS["gdn_qwen2"]
    asked = [golden.case(length).prompt.tolist() for length in short(golden)]
    setting = {"checkpoint": "none", "window": golden.window, "sinks": golden.sinks}
    result = run(golden.base, setting, asked, 3, block_size=16, max_num_seqs=8, constants=FEW_SEGMENTS)
    reference = from_folders(golden.base, "none", golden.window, golden.sinks)
    expected = [reference.generate(torch.tensor([prompt]), 3).tokens[0].tolist() for prompt in asked]
    assert (result["workers"][0]["core"], result["tokens"]) == ("GPUCore", expected)


def test_flash_attention() -> None:
    """The golden configuration that FlashAttention can serve: without sinks."""
    golden = CONFIGURATIONS["gdn_qwen2_s0"]
    result = continuations(golden, (20, 29), block_size=16, max_num_seqs=2, flash_version=3)
    decode = {"version": 3, "max_seqlen_q": 1, "window": golden.window - 1, "scheduled": True}
    assert any(call.items() >= decode.items() for call in result["flash_calls"])


@pytest.mark.parametrize("flash_version", [None, 2], ids=["triton", "flash"])
def test_sinks_that_fill_their_blocks(flash_version: int | None) -> None:
    """Attention by a sliding window over rearranged tables: decodes, and a chunk longer than the window beside one."""
    golden, window, sinks, generated = CONFIGURATIONS["gdn_qwen2"], 32, 16, 3
    asked = [golden.case(length).prompt.tolist() for length in (37, 100)]
    setting = {"checkpoint": str(golden.ahn), "window": window, "sinks": sinks}
    result = run(
        golden.base,
        setting,
        asked,
        generated,
        block_size=16,
        max_num_seqs=2,
        flash_version=flash_version,
        constants=FEW_SEGMENTS,
    )
    reference = from_folders(golden.base, golden.ahn, window, sinks)
    expected = [reference.generate(torch.tensor([prompt]), generated).tokens[0].tolist() for prompt in asked]
    assert (result["workers"][0]["core"], result["tokens"]) == ("GPUCore", expected)
    assert bool(result["flash_calls"]) == (flash_version is not None)


def test_chunks_of_64_tokens() -> None:
    """Chunks that begin inside ``W + S`` and end past it, beside decodes and short requests."""
    golden = CONFIGURATIONS["gdn_qwen2"]
    arguments = {"max_num_batched_tokens": 64, "max_num_seqs": 8, "constants": FEW_SEGMENTS}
    continuations(golden, short(golden), warm_up=True, **arguments)


def test_preemption_and_stale_rows() -> None:
    """Requests lose pages and state and start again, in rows of the tables where others left longer tails."""
    golden = CONFIGURATIONS["mamba2_qwen2"]
    result = continuations(
        golden,
        (100, 37, 100, 20, 37, 32),
        block_size=16,
        max_model_len=160,
        max_num_seqs=3,
        max_num_batched_tokens=64,
        num_gpu_blocks_override=15,
        constants=FEW_SEGMENTS,
    )
    assert result["preemptions"] > 0


def test_a_hit_beyond_the_window() -> None:
    """The second request goes on where the first one's prompt left a checkpoint."""
    golden = CONFIGURATIONS["gdn_qwen2"]
    arguments = {"block_size": 16, "max_num_seqs": 1, "enable_prefix_caching": True, "constants": FEW_SEGMENTS}
    result = continuations(golden, (100, 100), FROM_THE_EDGE, **arguments)
    assert result["hits"] == 96 > golden.capacity


def test_n_grams_as_drafts() -> None:
    """Under the V2 runner, beside chunks, where lengths are known to the device alone."""
    config = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 2, "prompt_lookup_min": 1}
    result = continuations(
        CONFIGURATIONS["gdn_qwen2"],
        (20, 37, 100),
        block_size=16,
        max_num_seqs=4,
        max_num_batched_tokens=64,
        speculative_config=config,
        constants=FEW_SEGMENTS,
    )
    assert [worker["runner"] for worker in result["workers"]] == [V2_RUNNER]
    assert result["drafted"] > 0


def test_drafts_under_the_v1_runner() -> None:
    """Any number of them is accepted, and prefixes are cached beside."""
    golden = CONFIGURATIONS["dn_qwen3"]
    lengths = (32, 37, 100)
    config = {"method": "custom_class", "model": PROPOSER, "num_speculative_tokens": 3}
    result = continuations(
        golden,
        lengths,
        environment={"VLLM_USE_V2_MODEL_RUNNER": "0"},
        answers=[golden.case(length).tokens.tolist() for length in lengths],
        max_num_seqs=4,
        block_size=16,
        enable_prefix_caching=True,
        speculative_config=config,
    )
    assert result["workers"][0]["runner"] != V2_RUNNER
    assert set(result["accepted"]) == {"0", "1", "2", "3"}


def test_v1_runner() -> None:
    golden = CONFIGURATIONS["dn_qwen3"]
    environment = {"VLLM_USE_V2_MODEL_RUNNER": "0"}
    result = continuations(golden, (32, 37), FROM_THE_EDGE, environment=environment, max_num_seqs=2)
    assert result["workers"][0]["runner"] != V2_RUNNER


def test_two_tensor_parallel_processes() -> None:
    """Heads, gates and states are split; Mamba2's norm is a sum over both."""
    result = continuations(
        CONFIGURATIONS["mamba2_qwen2"],
        (32, 37),
        FROM_THE_EDGE,
        environment=TWO_PROCESSES,
        distributed_executor_backend="mp",
        tensor_parallel_size=2,
        max_num_batched_tokens=64,
        max_num_seqs=4,
    )
    assert [worker["runner"] for worker in result["workers"]] == [V2_RUNNER] * 2


def test_two_pipeline_stages() -> None:
    """Each process has layers, weights, pages and states of its own, and metadata for them."""
    result = continuations(
        CONFIGURATIONS["gdn_qwen2"],
        (32, 37),
        FROM_THE_EDGE,
        environment=TWO_PROCESSES,
        distributed_executor_backend="mp",
        pipeline_parallel_size=2,
        max_num_batched_tokens=64,
        max_num_seqs=4,
    )
    assert [worker["runner"] for worker in result["workers"]] == [V2_RUNNER] * 2
    layers = [set(worker["layers"]) for worker in result["workers"]]
    assert all(layers) and not set.intersection(*layers)
