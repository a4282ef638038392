"""What AHN cannot do is refused by name, on the arguments and on whole configurations alike."""

from __future__ import annotations

from typing import Any

import pytest
from vllm import EngineArgs
from vllm.model_executor.model_loader import _LOAD_FORMAT_TO_MODEL_LOADER as LOADERS
from vllm.model_executor.model_loader import DefaultModelLoader
from vllm.model_executor.models.config import MODELS_CONFIG_MAP
from vllm.plugins import load_general_plugins
from vllm.utils.argparse_utils import FlexibleArgumentParser

from vllm_ahn import AHNError
from vllm_ahn.bases import BASES
from vllm_ahn.kernels.settled import GRANULARITY
from vllm_ahn.plugin import limits
from vllm_ahn.plugin.limits import LOAD_FORMATS, MAX_SPEC_TOKENS, SETTINGS, SPEC_METHODS, RequestedFeatures
from vllm_ahn.tools.tiny import TinyPaths, make_tiny

load_general_plugins()

REFUSED: list[tuple[dict[str, Any], str]] = [
    (
        {"spec_method": "draft_model"},
        "method 'draft_model' yet.*one of ngram, .* custom_class$",
    ),
    ({"spec_method": "eagle3"}, "method 'eagle3' yet"),
    ({"spec_method": "mtp"}, "method 'mtp' yet"),
    ({"spec_method": "ngram_gpu"}, "'ngram_gpu' on GPUs only.*ngram on CPUs"),
    ({"spec_tokens": 16}, "steps of 16 drafts.*--spec-tokens.*at most 15"),
    ({"spec_tokens": 8, "window": 8}, "--ahn-window is 8, expected more than the 8 drafts"),
    ({"prefix_cache_retention_interval": 64}, "--prefix-cache-retention-interval 64.*--ahn-checkpoint-interval"),
    ({"decode_context_parallel_size": 2}, "--decode-context-parallel-size 2"),
    ({"prefill_context_parallel_size": 4}, "--prefill-context-parallel-size 4"),
    ({"kv_connector": "SomeConnector"}, r"KV connectors.*\(SomeConnector\)"),
    ({"kv_offloading_size": 2.0}, "--kv-offloading-size 2"),
    ({"cache_dtype": "fp8_e4m3"}, "quantised KV cache.*'fp8_e4m3'"),
    ({"cache_dtype": "bfloat16", "model_dtype": "float32"}, "another dtype.*'bfloat16'.*float32"),
    ({"mamba_cache_dtype": "float32"}, "leave out --mamba-cache-dtype float32"),
    ({"mamba_ssm_cache_dtype": "float16"}, "state in float16: --mamba-ssm-cache-dtype is expected to be auto"),
    ({"separate_checkpoint": True, "load_format": "tensorizer"}, "load format 'tensorizer'"),
    ({"separate_checkpoint": True, "load_format": "bitsandbytes"}, "load format 'bitsandbytes'"),
    ({"block_size": 8}, "blocks of 8 tokens"),
    ({"block_size": 24}, "blocks of 24 tokens"),
    ({"block_size": 256}, "blocks of 256 tokens"),
    ({"disable_hybrid_kv_cache_manager": True}, "--disable-hybrid-kv-cache-manager"),
    ({"kv_sharing_fast_prefill": True}, "--kv-sharing-fast-prefill"),
    ({"microbatches": True}, "microbatching"),
    ({"model_impl": "transformers"}, "--model-impl is 'transformers'"),
    ({"runner": "pooling"}, "--runner is 'pooling'"),
    ({"convert": "embed"}, "--convert is 'embed'"),
    (
        {"base_cache": "kv_cache_scheme of x", "model_dtype": "bfloat16"},
        r"quantised KV cache.*\(kv_cache_scheme of x in its config.json\).*'auto', expected 'bfloat16'",
    ),
    (
        {"base_cache": "kv_cache_scheme of x", "cache_dtype": "fp8", "model_dtype": "bfloat16"},
        "quantised KV cache.*'fp8', expected 'bfloat16'",
    ),
    ({"device_type": "xpu"}, "on CPUs and on GPUs of NVIDIA and AMD.*'xpu'"),
    ({"attention_backend": "TRITON_ATTN"}, "expected to be 'CPU_ATTN' on CPUs, or left out"),
    ({"runs_triton": True, "attention_backend": "FLASHINFER"}, "'FLASHINFER'.*'TRITON_ATTN' or 'FLASH_ATTN' on GPUs"),
    ({"backend_per_kind": True}, "backend_per_kind"),
]

FLASH = RequestedFeatures(runs_triton=True, has_flash_attention=True, attention_backend="FLASH_ATTN")
REFUSED_OF_FLASH_ATTENTION: list[tuple[dict[str, Any], str]] = [
    ({"has_flash_attention": False}, "compute capability 8.0"),
    ({"model_dtype": "float32"}, "float32.*one of float16, bfloat16"),
    ({"head_size": 320}, "head sizes.*320"),
    ({"head_size": 60}, "head sizes.*60"),
    ({"block_size": 64}, "--block-size is 64, expected one of 16, 32, 48"),
    ({"sinks": 24}, "--ahn-sinks is 24, expected a multiple of the block size, 16"),
    ({"sinks": 16, "block_size": 32}, "--ahn-sinks is 16, expected a multiple of the block size, 32"),
    ({"window": 20, "block_size": 32}, "--ahn-window is 20, expected at least the block size, 32"),
    ({"window": 18, "spec_method": "ngram", "spec_tokens": 3}, "--ahn-window is 18, .*16, and the 3 of --spec-tokens"),
]

ARGUMENTS: list[tuple[dict[str, Any], str]] = [
    ({"speculative_config": {"model": "some/drafter", "num_speculative_tokens": 2}}, "method 'draft_model'"),
    ({"spec_model": "some/drafter", "spec_tokens": 2}, "method 'draft_model'"),
    ({"spec_method": "eagle", "spec_model": "some/head", "spec_tokens": 2}, "method 'eagle'"),
    ({"speculative_config": {"method": "qwen3_next_mtp", "num_speculative_tokens": 1}}, "method 'qwen3_next_mtp'"),
    ({"speculative_config": {"method": "ngram", "num-speculative-tokens": 16}}, "at most 15"),
    ({"spec_method": "ngram", "spec_tokens": 16}, "at most 15"),
    ({"prefix_cache_retention_interval": 4096}, "--prefix-cache-retention-interval 4096"),
    ({"decode_context_parallel_size": 2}, "decode context parallelism"),
    ({"prefill_context_parallel_size": 2}, "prefill context parallelism"),
    ({"kv_offloading_size": 1}, "KV offloading"),
    ({"kv_cache_dtype": "fp8"}, "quantised KV cache"),
    ({"mamba_cache_dtype": "bfloat16"}, "--mamba-cache-dtype bfloat16"),
    ({"mamba_ssm_cache_dtype": "float16"}, "--mamba-ssm-cache-dtype"),
    ({"load_format": "sharded_state"}, "load format 'sharded_state'"),
    ({"block_size": 8}, "blocks of 8 tokens"),
    ({"disable_hybrid_kv_cache_manager": True}, "hybrid KV cache manager"),
    ({"kv_sharing_fast_prefill": True}, "KV sharing"),
    ({"enable_dbo": True}, "microbatching"),
    ({"ubatch_size": 2}, "microbatching"),
    ({"model_impl": "transformers"}, "--model-impl"),
    ({"runner": "pooling"}, "text generation only"),
    ({"convert": "embed"}, "text generation only"),
    ({"attention_backend": "FLASH_ATTN"}, "'FLASH_ATTN'.*'CPU_ATTN' on CPUs"),
    ({"attention_config": {"backend": "TRITON_ATTN"}}, "'TRITON_ATTN'.*'CPU_ATTN' on CPUs"),
    ({"attention_config": {"backend_per_kind": {"full_attention": "CPU_ATTN"}}}, "backend_per_kind"),
]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> TinyPaths:
    return make_tiny(tmp_path_factory.mktemp("tiny"))


def engine_args(tiny: TinyPaths, **arguments: Any) -> EngineArgs:
    extra = {"ahn": {"checkpoint": str(tiny.ahn), "window": 24, "sinks": 8}}
    return EngineArgs(model=str(tiny.base), additional_config=extra, **arguments)


def changed(features: RequestedFeatures, **values: Any) -> RequestedFeatures:
    return RequestedFeatures(**(vars(features) | values))


@pytest.mark.parametrize(("change", "pattern"), REFUSED)
def test_refused(change: dict[str, Any], pattern: str) -> None:
    limits.check(RequestedFeatures())
    with pytest.raises(AHNError, match=pattern) as caught:
        limits.check(RequestedFeatures(**change))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("change", "pattern"), REFUSED_OF_FLASH_ATTENTION)
def test_refused_of_flash_attention(change: dict[str, Any], pattern: str) -> None:
    good = {"model_dtype": "bfloat16", "head_size": 80, "block_size": 16, "sinks": 128, "window": 32640}
    limits.check(FLASH)
    limits.check(changed(FLASH, **good))
    for features in (changed(FLASH, **change), changed(FLASH, **(good | change))):
        with pytest.raises(AHNError, match=pattern) as caught:
            limits.check(features)
        assert str(caught.value).startswith("--attention-backend is 'FLASH_ATTN'") and "\n" not in str(caught.value)
        # What Triton's attention can do all of.
        limits.check(changed(features, attention_backend="TRITON_ATTN"))


@pytest.mark.parametrize(
    "change",
    [
        *({"spec_method": method, "spec_tokens": 15, "device_type": "cuda"} for method in SPEC_METHODS),
        {"spec_tokens": 7, "window": 8},
        {"prefix_cache_retention_interval": None},
        {"block_size": 16},
        {"block_size": 128},
        {"cache_dtype": "bfloat16", "model_dtype": "bfloat16"},
        {"base_cache": "kv_cache_scheme of x", "cache_dtype": "bfloat16", "model_dtype": "bfloat16"},
        {"mamba_ssm_cache_dtype": "float32"},
        {"mamba_ssm_cache_dtype": "bfloat16"},
        {"separate_checkpoint": True, "load_format": "dummy"},
        {"load_format": "sharded_state"},  # of a merged model, which has no second source
        {"runner": "auto", "convert": "auto"},
        {"model_impl": "vllm"},
        {"attention_backend": "CPU_ATTN"},
        {"runs_triton": True, "attention_backend": "TRITON_ATTN"},
    ],
)
def test_not_refused(change: dict[str, Any]) -> None:
    limits.check(RequestedFeatures(**change))


@pytest.mark.parametrize(("arguments", "pattern"), ARGUMENTS)
def test_refused_on_the_arguments(tiny: TinyPaths, arguments: dict[str, Any], pattern: str) -> None:
    with pytest.raises(AHNError, match=pattern):
        engine_args(tiny, **arguments).create_engine_config()


def test_refused_by_the_whole_configuration_alone(tiny: TinyPaths) -> None:
    """What the arguments do not show yet; the sentence comes out of pydantic's report as it went in."""
    with pytest.raises(AHNError, match=r"^AHN does not work with a KV cache of another dtype"):
        engine_args(tiny, dtype="float32", kv_cache_dtype="bfloat16").create_engine_config()


@pytest.mark.parametrize(
    "asked",
    [
        {"speculative_config": {"method": "ngram", "num_speculative_tokens": MAX_SPEC_TOKENS}},
        {"spec_model": "ngram", "spec_tokens": 4},
        {"speculative_config": {"model": "some.module.Proposer", "num_speculative_tokens": 4}},
        {"prefix_cache_retention_interval": 0},
    ],
    ids=str,
)
def test_not_refused_on_the_arguments(tiny: TinyPaths, asked: dict[str, Any]) -> None:
    engine_args(tiny, **asked).create_engine_config()


def test_steps_of_drafts_cross_one_boundary_at_most() -> None:
    assert 1 + MAX_SPEC_TOKENS == GRANULARITY


def test_more_drafts_than_a_window_has_tokens(tiny: TinyPaths) -> None:
    args = engine_args(tiny, spec_method="ngram", spec_tokens=4)
    args.additional_config["ahn"]["window"] = 4
    with pytest.raises(AHNError, match="--ahn-window is 4, expected more than the 4 drafts of a step"):
        args.create_engine_config()


@pytest.mark.parametrize(("asked", "expected"), [(None, 16), (32, 32), (128, 128)])
def test_blocks_on_cpus(tiny: TinyPaths, asked: int | None, expected: int) -> None:
    args = engine_args(tiny, block_size=asked)
    for _ in range(2):
        assert args.create_engine_config().cache_config.block_size == expected
    assert args.block_size == asked
    plain = EngineArgs(model=str(tiny.base), block_size=asked).create_engine_config().cache_config
    assert plain.user_specified_block_size is (asked is not None)


@pytest.mark.parametrize(
    "asked",
    [
        {"quant_method": "compressed-tensors", "kv_cache_scheme": {"num_bits": 8, "type": "float"}},
        {"quant_method": "modelopt", "kv_cache_quant_algo": "FP8"},
        {"quant_method": "modelopt", "quantization": {"kv_cache_quant_algo": "FP8"}},
    ],
)
def test_a_base_that_asks_for_a_quantised_cache(
    tiny: TinyPaths, asked: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """vLLM would follow it where the cache's dtype is "auto", for some formats only when the model is built."""
    config = engine_args(tiny, dtype="bfloat16").create_engine_config()
    monkeypatch.setattr(config.model_config.hf_config, "quantization_config", asked, raising=False)
    with pytest.raises(AHNError, match=r"\(kv_cache_.* of quantization_config in its config.json\).*'bfloat16'"):
        limits.check_config(config)
    config.cache_config.cache_dtype = "bfloat16"
    limits.check_config(config)


def test_the_hook_sees_configurations_that_no_argument_led_to(tiny: TinyPaths) -> None:
    config = engine_args(tiny).create_engine_config()
    hook = MODELS_CONFIG_MAP[config.model_config.architecture]
    hook.verify_and_update_config(config)
    config.cache_config.cache_dtype = "fp8"
    with pytest.raises(AHNError, match="quantised KV cache"):
        hook.verify_and_update_config(config)
    config.cache_config.cache_dtype = "auto"
    config.additional_config = {}
    with pytest.raises(AHNError, match="AHNQwen2ForCausalLM is chosen by vllm-ahn itself"):
        hook.verify_and_update_config(config)


def test_every_ahn_model_has_the_hook() -> None:
    assert all("AHN" in MODELS_CONFIG_MAP[base.ahn_architecture].__name__ for base in BASES)


@pytest.mark.parametrize(("flag", "dtype"), [("auto", "float32"), ("float32", "float32"), ("bfloat16", "bfloat16")])
def test_the_flag_for_the_state_reaches_the_configuration(tiny: TinyPaths, flag: str, dtype: str) -> None:
    """By the AHN's own setting: on some CPUs vLLM resets its own to float32."""
    args = engine_args(tiny, mamba_ssm_cache_dtype=flag)
    for _ in range(2):
        assert args.create_engine_config().additional_config["ahn"]["state_dtype"] == dtype


def test_the_flag_for_the_state_may_not_contradict_a_resolved_setting(tiny: TinyPaths) -> None:
    args = engine_args(tiny, mamba_ssm_cache_dtype="bfloat16")
    args.additional_config = args.create_engine_config().additional_config
    args.mamba_ssm_cache_dtype = "float32"
    with pytest.raises(AHNError, match=r"'state_dtype': 'bfloat16'.*expected.*'state_dtype': 'float32'"):
        args.create_engine_config()


def test_the_block_size_that_the_platform_chooses_is_accepted(tiny: TinyPaths) -> None:
    config = engine_args(tiny).create_engine_config()
    assert config.cache_config.block_size in limits.BLOCK_SIZES


def test_load_formats_are_those_of_the_default_loader() -> None:
    """Every other loader of vLLM reads the model's own weights only, so it must be among the refused."""
    default = {name for name, loader in LOADERS.items() if loader is DefaultModelLoader}
    # These three read files of other names or kinds, in the second source too.
    assert set(LOAD_FORMATS) == default - {"mistral", "npcache", "pt"} | {"dummy"}
    for name in LOADERS:
        refused = list(limits.refusals(RequestedFeatures(separate_checkpoint=True, load_format=name)))
        assert [f"load format {name!r}" in sentence for sentence in refused] == [True] * (name not in LOAD_FORMATS)
        assert not list(limits.refusals(RequestedFeatures(load_format=name))), "a merged model has no second source"


def test_every_flag_in_the_table_is_one_of_vllms() -> None:
    parser = EngineArgs.add_cli_args(FlexibleArgumentParser())
    known = {flag for action in parser._actions for flag in action.option_strings}
    assert {flag for setting in SETTINGS for flag in setting.flags} <= known


def test_a_setting_that_is_not_in_the_table() -> None:
    with pytest.raises(TypeError, match="no such setting: block_sizes"):
        RequestedFeatures(block_sizes=16)


def test_every_setting_is_read_from_both_sides(tiny: TinyPaths) -> None:
    asked = {"mamba_ssm_cache_dtype": "float32", "attention_backend": "cpu_attn"}
    args = engine_args(tiny, block_size=32, max_model_len=1000, dtype="float32", **asked)
    config = args.create_engine_config()
    ours, theirs = RequestedFeatures.from_engine_args(args), RequestedFeatures.from_vllm_config(config)
    head_size = config.model_config.get_head_size()
    decided = {"model_dtype": "float32", "runner": "generate", "convert": "none", "head_size": head_size}
    assert theirs == changed(ours, **decided)
    assert ours.separate_checkpoint
    assert (ours.block_size, ours.window, ours.sinks) == (32, 24, 8)
    assert ours.attention_backend == "CPU_ATTN"
