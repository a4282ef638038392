"""The real column of ``vllm-ahn cost`` is what engines report, and what their managers hand out."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from vllm import LLM, SamplingParams
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.engine.arg_utils import EngineArgs
from vllm.model_executor.layers.attention import Attention
from vllm.v1.core.kv_cache_utils import get_kv_cache_capacity, get_kv_cache_configs

from support.cost_case import QWEN2_5, shape, write, write_ahn
from support.engines import cache_manager, engine, worker_layers
from support.golden_data import CONFIGURATIONS
from vllm_ahn.attention.layer import AHNAttention
from vllm_ahn.cache.specs import AHNStateSpec
from vllm_ahn.config import AHNConfig
from vllm_ahn.errors import AHNError
from vllm_ahn.memory.spec import MEMORIES
from vllm_ahn.tools.cost.allocation import FP8, Allocation, EngineSettings, ahn_attention, full_attention
from vllm_ahn.tools.cost.shape import find_model

GDN = CONFIGURATIONS["gdn_qwen2"]
MEMORY = 40 << 30


def engine_config(
    tmp_path: Path,
    size: str,
    memory: str | None,
    cache_dtype: str = "auto",
    state_dtype: str = "auto",
    **arguments: Any,
) -> VllmConfig:
    """An engine's configuration for the published shape and 128,000 tokens; no ``memory`` is the base."""
    ahn: dict[str, Any] = {}
    if memory == "none":
        ahn = {"ahn": "none"}
    elif memory is not None:
        ahn = {"ahn": str(write_ahn(tmp_path / "ahn", size, memory))}
    config = EngineArgs(
        model=str(write(tmp_path / "base", QWEN2_5[size] | {"max_position_embeddings": 131072})),
        load_format="dummy",
        skip_tokenizer_init=True,
        max_model_len=128_000,
        max_num_batched_tokens=8192,
        max_num_seqs=16,
        enforce_eager=True,
        kv_cache_dtype=cache_dtype,
        mamba_ssm_cache_dtype=state_dtype,
        additional_config=ahn,
        **{"block_size": 32, **arguments},
    ).create_engine_config()
    config.cache_config.kv_cache_layout = "LBHNC"
    return config


def what_the_engine_reports(config: VllmConfig) -> tuple[int, float]:
    """Bytes of a block and "Maximum concurrency" for the layers of a model, built as the model builds them."""
    hf = config.model_config.hf_config
    heads, kv_heads = hf.num_attention_heads, hf.num_key_value_heads
    ahn = (config.additional_config or {}).get("ahn")
    with set_current_vllm_config(config):
        for index in range(hf.num_hidden_layers):
            name = f"model.layers.{index}.self_attn.attn"
            base = Attention(heads, 128, 1.0, kv_heads, cache_config=config.cache_config, prefix=name)
            if ahn is not None:
                served = AHNConfig.from_dict(ahn)
                AHNAttention(heads, kv_heads, 128, 1.0, served, None, None, full_attention=False, replaces=base)
    layers = config.compilation_config.static_forward_context
    specs = {name: layer.get_kv_cache_spec(config) for name, layer in layers.items()}
    (cache,) = get_kv_cache_configs(config, [specs], [MEMORY])
    return MEMORY // cache.num_blocks, get_kv_cache_capacity(config, cache)[1]


def settings(config: VllmConfig) -> EngineSettings:
    made = EngineSettings(
        dtype=str(config.model_config.dtype).removeprefix("torch."),
        block_size=config.cache_config.block_size,
        max_num_batched_tokens=config.scheduler_config.max_num_batched_tokens,
        async_scheduling=bool(config.scheduler_config.async_scheduling),
        enable_prefix_caching=bool(config.cache_config.enable_prefix_caching),
        spec_tokens=config.num_speculative_tokens,
    )
    assert made.max_in_flight_tokens == config.max_in_flight_tokens
    return made


def check(allocation: Allocation, reported: tuple[int, float]) -> None:
    block_bytes, concurrency = reported
    assert MEMORY // allocation.block_bytes == MEMORY // block_bytes
    assert allocation.max_concurrency(MEMORY) == concurrency
    blocks = MEMORY // allocation.block_bytes
    assert allocation.reserved_blocks == round(blocks / concurrency)
    assert sum(allocation.parts().values()) == allocation.reserved_bytes
    assert all(value >= 0 for value in allocation.parts().values())


@pytest.mark.parametrize("memory", [*MEMORIES, "none"])
@pytest.mark.parametrize("size", QWEN2_5)
def test_engine_of_published_shape(size: str, memory: str, tmp_path: Path) -> None:
    """Blocks for 128,000 tokens, and the ratios to full attention that README and issue quote."""
    config = engine_config(tmp_path, size, memory)
    ahn = AHNConfig.from_dict(config.additional_config["ahn"])
    for asynchronous in (False, True):
        config.scheduler_config.async_scheduling = asynchronous
        config.compilation_config.static_forward_context.clear()
        made = settings(config)
        check(ahn_attention(shape(size), made, 128_000, ahn), what_the_engine_reports(config))


NGRAM = {"method": "ngram", "num_speculative_tokens": 3}


@pytest.mark.parametrize(
    ("arguments", "slots"),
    [
        ({"enable_prefix_caching": False}, 1),
        ({"enable_prefix_caching": False, "speculative_config": NGRAM}, 2),
        ({"block_size": 16}, 2),
        ({"block_size": 16, "speculative_config": NGRAM}, 2),
        ({"block_size": 32}, 3),
        ({"block_size": 64, "speculative_config": NGRAM}, 4),
    ],
    ids=str,
)
def test_slots_of_an_engine(arguments: dict[str, Any], slots: int, tmp_path: Path) -> None:
    """With prefix caching and drafts a sequence holds more states than one."""
    config = engine_config(tmp_path, "3B", "GatedDeltaNet", **arguments)
    ahn = AHNConfig.from_dict(config.additional_config["ahn"])
    allocation = ahn_attention(shape("3B"), settings(config), 128_000, ahn)
    check(allocation, what_the_engine_reports(config))
    parts = allocation.parts()
    assert parts["slots"] == parts["state"] * (slots * (128 + 16) - 128) // 128
    state = allocation.specs[1]
    assert isinstance(state, AHNStateSpec)
    assert state.pages_per_request == slots * state.num_pages
    assert allocation.checkpoint_blocks == (state.num_pages if config.cache_config.enable_prefix_caching else 0)


@pytest.mark.parametrize("memory", MEMORIES)
def test_engine_with_states_in_bfloat16(memory: str, tmp_path: Path) -> None:
    config = engine_config(tmp_path, "3B", memory, state_dtype="bfloat16")
    ahn = AHNConfig.from_dict(config.additional_config["ahn"])
    assert ahn.state_dtype == "bfloat16"
    allocation = ahn_attention(shape("3B"), settings(config), 128_000, ahn)
    check(allocation, what_the_engine_reports(config))
    wide = ahn_attention(shape("3B"), settings(config), 128_000, dataclasses.replace(ahn, state_dtype="float32"))
    assert wide.parts()["state"] == 2 * allocation.parts()["state"]
    assert wide.held_blocks > allocation.held_blocks


@pytest.mark.parametrize("cache_dtype", ["auto", FP8])
@pytest.mark.parametrize("size", ["3B", "14B"])
def test_base_of_published_shape(size: str, cache_dtype: str, tmp_path: Path) -> None:
    config = engine_config(tmp_path, size, None, cache_dtype)
    dtype = "bfloat16" if cache_dtype == "auto" else FP8
    check(full_attention(shape(size), settings(config), 128_000, dtype), what_the_engine_reports(config))


HELD = {
    ("3B", "GatedDeltaNet"): 29.0,
    ("3B", "DeltaNet"): 28.2,
    ("3B", "Mamba2"): 28.0,
    ("7B", "GatedDeltaNet"): 28.6,
    ("7B", "DeltaNet"): 27.9,
    ("7B", "Mamba2"): 27.8,
    ("14B", "GatedDeltaNet"): 27.8,
    ("14B", "DeltaNet"): 27.3,
    ("14B", "Mamba2"): 27.1,
}


@pytest.mark.parametrize(("size", "memory"), HELD)
def test_share_of_full_attention(size: str, memory: str) -> None:
    """What README says; whatever is added to pages or kept longer shows here."""
    made = EngineSettings("bfloat16")
    ahn = ahn_attention(shape(size), made, 128_000, AHNConfig(memory))
    full = full_attention(shape(size), made, 128_000, "bfloat16")
    assert round(100 * ahn.held_bytes / full.held_bytes, 1) == HELD[size, memory]
    parts = {name: 100 * value / full.held_bytes for name, value in ahn.parts().items()}
    assert parts["keys_and_values"] == pytest.approx(25.6)
    assert parts["rounding"] < 0.07
    assert ahn.held_bytes < 0.59 * full_attention(shape(size), made, 128_000, FP8).held_bytes


@pytest.mark.slow
@pytest.mark.parametrize(
    ("setting", "block_size", "caches_prefixes"),
    [
        ({"checkpoint": str(GDN.ahn)}, 16, False),
        ({"checkpoint": str(GDN.ahn)}, 16, True),
        ({"checkpoint": str(GDN.ahn)}, 32, True),
        ({"checkpoint": "none"}, 16, True),
        (None, 32, False),
    ],
    ids=["ahn-16", "ahn-16-caching", "ahn-32-caching", "window-16-caching", "base-32"],
)
def test_running_engine(setting: dict[str, Any] | None, block_size: int, caches_prefixes: bool) -> None:
    """A real engine's blocks and concurrency, and what its managers hold at every step of a request."""
    ahn = None if setting is None else setting | {"window": 33, "sinks": 17}
    model = find_model(str(GDN.base))
    arguments = {"block_size": block_size, "max_num_batched_tokens": 48, "enable_prefix_caching": caches_prefixes}
    with engine(GDN.base, ahn, **arguments) as llm:
        config = llm.llm_engine.vllm_config
        made = settings(config)
        if ahn is None:
            allocation = full_attention(model.shape, made, 1024, "float32")
        else:
            resolved = AHNConfig.from_dict(config.additional_config["ahn"])
            allocation = ahn_attention(model.shape, made, 1024, resolved)
        assert config.cache_config.num_gpu_blocks == (64 << 20) // allocation.block_bytes
        assert config.cache_config.kv_cache_max_concurrency == allocation.max_concurrency(64 << 20)
        caches = [layer.kv_cache for layer in worker_layers(llm).values() if hasattr(layer, "kv_cache")]
        assert all(cache[0].numel() * 4 * model.shape.layers == allocation.block_bytes for cache in caches)
        most = steps = 0
        for length, held in held_at_every_step(llm, 90, 60):
            most = max(most, held)
            if length > 90:  # decoding
                steps += 1
                if ahn is None:
                    expected = full_attention(model.shape, made, length, "float32")
                else:
                    expected = ahn_attention(model.shape, made, length, resolved)
                assert held == expected.held_blocks
    assert steps > 40
    assert most <= allocation.reserved_blocks


def held_at_every_step(llm: LLM, prompt: int, tokens: int) -> list[tuple[int, int]]:
    """Tokens of a request and blocks it holds, after each step but the last."""
    manager = cache_manager(llm)
    null = manager.block_pool.null_block
    params = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True, detokenize=False)
    ids = torch.arange(prompt) % 500
    llm.llm_engine.add_request("0", {"prompt_token_ids": ids.tolist()}, params)
    (request,) = llm.llm_engine.engine_core.engine_core.scheduler.requests.values()
    seen = []
    while llm.llm_engine.has_unfinished_requests():
        llm.llm_engine.step()
        blocks = [
            block
            for single in manager.coordinator.single_type_managers
            for block in single.req_to_blocks.get(request.request_id, ())
            if block is not null
        ]
        if blocks:
            seen.append((request.num_computed_tokens, len(blocks)))
    return seen


@pytest.mark.slow
def test_sequences_that_decode_at_a_time() -> None:
    """An engine with a pool for exactly three sequences, and one with a block less: three run at a time, and two."""
    model = find_model(str(GDN.base))
    setting = {"checkpoint": str(GDN.ahn), "window": 64, "sinks": 32}
    config = AHNConfig("GatedDeltaNet", 64, 32)
    made = EngineSettings(
        "float32", block_size=32, max_num_batched_tokens=32, async_scheduling=False, enable_prefix_caching=False
    )
    allocation = ahn_attention(model.shape, made, 300, config)
    block = allocation.block_bytes
    pool = next(n for n in range(1000) if allocation.max_decoding(n * block) == 3)
    assert allocation.max_decoding((pool - 1) * block) == 2
    for blocks, running in ((pool, 3), (pool - 1, 2)):
        arguments = {"num_gpu_blocks_override": blocks, "max_num_batched_tokens": 32, "max_model_len": 512}
        with engine(GDN.base, setting, **arguments) as llm:
            assert most_running(llm, prompt=200, tokens=100, requests=4) == running


def most_running(llm: LLM, prompt: int, tokens: int, requests: int) -> int:
    """Most requests that decode in one step, where none is ever preempted."""
    params = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True, detokenize=False)
    scheduler = llm.llm_engine.engine_core.engine_core.scheduler
    most = 0
    for index in range(requests):
        llm.llm_engine.add_request(str(index), {"prompt_token_ids": [index + 5] * prompt}, params)
    while llm.llm_engine.has_unfinished_requests():
        llm.llm_engine.step()
        most = max(most, sum(request.num_computed_tokens > prompt for request in scheduler.running))
    return most


@pytest.mark.parametrize(
    ("size", "arguments", "sentence"),
    [
        ("3B", {"block_size": 24}, "--block-size is 24, expected one of 16, 32, "),
        ("3B", {"tensor_parallel_size": 3}, "--tensor-parallel-size is 3, expected a divisor of the model's 16 heads"),
        ("7B", {"tensor_parallel_size": 14}, "a divisor or a multiple of the model's 4 key/value heads"),
    ],
)
def test_settings_that_cannot_be(size: str, arguments: dict[str, int], sentence: str) -> None:
    with pytest.raises(AHNError, match=sentence):
        EngineSettings("bfloat16", **arguments).layer_sizes(shape(size))  # type: ignore[arg-type]


def test_ranks_share_the_cache_and_copy_scarce_heads() -> None:
    config = AHNConfig("GatedDeltaNet")
    alone, two, four = (
        ahn_attention(shape("3B"), EngineSettings("bfloat16", tensor_parallel_size=ranks), 128_000, config)
        for ranks in (1, 2, 4)
    )
    assert alone.parts()["state"] == 2 * two.parts()["state"] == 4 * four.parts()["state"]
    assert alone.parts()["keys_and_values"] == 2 * two.parts()["keys_and_values"]
    assert two.parts()["keys_and_values"] == four.parts()["keys_and_values"]  # two KV heads, four ranks
    assert two.parts()["gates"] == 2 * four.parts()["gates"]
