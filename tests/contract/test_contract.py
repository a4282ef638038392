"""What this package takes for granted in vLLM. ``make contract`` asks another release's sources the same."""

import ast
import dataclasses
import inspect
import os
import textwrap
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import vllm
from vllm.config import CompilationConfig, VllmConfig
from vllm.engine.arg_utils import EngineArgs
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
from vllm.v1.attention.backend import AttentionCGSupport, AttentionMetadataBuilder, CommonAttentionMetadata
from vllm.v1.attention.backends import fa_utils
from vllm.v1.attention.backends.registry import AttentionBackendEnum
from vllm.v1.core.block_pool import BlockPool
from vllm.v1.core.single_type_kv_cache_manager import SingleTypeKVCacheManager
from vllm.v1.kv_cache_interface import KVCacheConfig, KVCacheSpec
from vllm.v1.kv_cache_spec_registry import KVCacheSpecRegistry

from support import flash_emulation
from support.golden_data import CONFIGURATIONS
from vllm_ahn.attention.backend import AHNStateBackend, AHNWindowBackend
from vllm_ahn.attention.gpu.compute import GPUCore
from vllm_ahn.bases import find_base
from vllm_ahn.cache.managers import AHNStateManager, AHNWindowManager
from vllm_ahn.cache.specs import AHNStateSpec, AHNWindowSpec, state_spec, window_spec
from vllm_ahn.kernels.pages import StatePageLayout, WindowPageLayout
from vllm_ahn.kernels.settled import Settling
from vllm_ahn.models.ahn import cut_out_of_graphs
from vllm_ahn.plugin import compat, register

GDN = CONFIGURATIONS["gdn_qwen2"]
NUM_LAYERS = 28


def test_this_is_the_release_that_was_asked_for() -> None:
    compat.check_vllm_version(vllm.__version__)
    assert vllm.__version__.startswith(os.environ.get("AHN_CONTRACT_VLLM", "0."))


@pytest.fixture(scope="module")
def config() -> VllmConfig:
    """An engine's configuration for a golden checkpoint, made of arguments alone."""
    register()
    return EngineArgs(
        model=str(GDN.base),
        dtype="float32",
        max_model_len=1024,
        block_size=32,
        enforce_eager=True,
        skip_tokenizer_init=True,
        additional_config={"ahn": {"checkpoint": str(GDN.ahn), "window": GDN.window, "sinks": GDN.sinks}},
    ).create_engine_config()


def test_arguments_come_to_a_resolved_model(config: VllmConfig) -> None:
    base = find_base({"architectures": ["Qwen2ForCausalLM"]}, "golden")
    assert config.model_config.architecture == base.ahn_architecture
    ahn = config.additional_config["ahn"]
    assert (ahn["memory"], ahn["window"], ahn["sinks"]) == (GDN.memory, GDN.window, GDN.sinks)
    model_class, _ = config.model_config.registry.resolve_model_cls(
        [config.model_config.architecture], config.model_config
    )
    assert f"{model_class.__module__}:{model_class.__name__}" == base.model_class
    assert hasattr(torch.ops.vllm, "ahn_attention")


def specs(config: VllmConfig) -> dict[str, KVCacheSpec]:
    layout = WindowPageLayout(2, 128, 16, 32, torch.bfloat16)
    settling = Settling.of(512, 64, block_size=32, caches_prefixes=True, speculates=False)
    window = window_spec(layout, settling, max_in_flight_tokens=config.max_in_flight_tokens)
    state = state_spec(
        StatePageLayout(16, 128, layout.page_bytes, kept=16), settling, block_size=32, dtype=torch.bfloat16
    )
    layers = [f"model.layers.{i}.self_attn.attn" for i in range(NUM_LAYERS)]
    return dict.fromkeys(layers, window) | {f"{layer}.state": state for layer in layers}


def test_specs_have_their_managers(config: VllmConfig) -> None:
    window, state = dict.fromkeys(specs(config).values())
    assert KVCacheSpecRegistry.get_manager_class(window) is AHNWindowManager
    assert KVCacheSpecRegistry.get_manager_class(state) is AHNStateManager


def kv_cache_config(config: VllmConfig) -> KVCacheConfig:
    """What the engine makes of the layers' specs and a GiB of memory."""
    config.cache_config.kv_cache_layout = AHNWindowBackend.supported_kv_cache_layouts()[0].name
    memory = [1 << 30]
    if compat.is_release(0, 32):
        from vllm.v1.core.kv_cache_utils import get_kv_cache_configs

        (result,) = get_kv_cache_configs(config, [specs(config)], memory)
    else:
        from vllm.v1.core.kv_cache_planning import get_global_kv_cache_groups, get_kv_cache_configs

        groups = get_global_kv_cache_groups(config, [specs(config)])
        (result,) = get_kv_cache_configs(config, [specs(config)], memory, groups)
    return result


def test_layers_come_in_two_groups_of_one_pool(config: VllmConfig) -> None:
    result = kv_cache_config(config)
    assert [type(group.kv_cache_spec) for group in result.kv_cache_groups] == [AHNWindowSpec, AHNStateSpec]
    assert [len(group.layer_names) for group in result.kv_cache_groups] == [NUM_LAYERS, NUM_LAYERS]
    page = result.kv_cache_groups[0].kv_cache_spec.page_size_bytes
    assert page == result.kv_cache_groups[1].kv_cache_spec.page_size_bytes
    assert result.num_blocks == (1 << 30) // (page * NUM_LAYERS)


def test_runners_leave_our_tables_alone(config: VllmConfig) -> None:
    """Entries below the window are nulled for other groups' specs only, and states have no slots."""
    for spec in specs(config).values():
        assert not hasattr(spec, "num_retained_tokens") and not hasattr(spec, "sliding_window")
        assert spec.uses_slot_mapping is isinstance(spec, AHNWindowSpec)
        assert not spec.dcp_sharded


def test_graphs_are_cut_at_the_attention() -> None:
    from vllm.compilation.partition_rules import should_split

    node = torch.fx.Graph().call_function(torch.ops.vllm.ahn_attention.default, ())
    for operations, cut in ((["vllm::unified_attention_with_output"], True), ([], False)):
        compilation = CompilationConfig(splitting_ops=operations)
        for _ in range(2):
            cut_out_of_graphs(compilation)
        assert compilation.splitting_ops is not None
        assert len(compilation.splitting_ops) == 2 * cut
        assert should_split(node, compilation.splitting_ops) is cut


def test_graphs_of_decodes_may_hold_everything(config: VllmConfig) -> None:
    spec, _ = dict.fromkeys(specs(config).values())
    decode = AttentionCGSupport.UNIFORM_SINGLE_TOKEN_DECODE
    assert GPUCore().cudagraph_support(config) is decode
    drafts: Any = SimpleNamespace(num_speculative_tokens=3)
    assert GPUCore().cudagraph_support(drafts) is AttentionCGSupport.UNIFORM_BATCH
    assert AHNStateBackend.get_builder_cls().get_cudagraph_support(config, spec).value >= decode.value


def names(function: Any) -> set[str]:
    return set(inspect.signature(function).parameters)


def keywords(method: Any, callee: str) -> set[str]:
    """The keywords with which ``method`` calls ``callee``."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(method)))
    calls = (node for node in ast.walk(tree) if isinstance(node, ast.Call))
    (call,) = (call for call in calls if ast.unparse(call.func).split(".")[-1] == callee)
    assert not call.args
    return {str(keyword.arg) for keyword in call.keywords}


def takes(function: Any, given: set[str]) -> bool:
    """Whether ``function`` can be called with these keywords and no others."""
    parameters = inspect.signature(function).parameters
    required = {name for name, parameter in parameters.items() if parameter.default is inspect.Parameter.empty}
    return required <= given <= set(parameters)


def test_interfaces_of_the_attention() -> None:
    from vllm.v1.attention.ops.triton_unified_attention import unified_attention

    from vllm_ahn.attention.paged.flash import FlashAttention
    from vllm_ahn.attention.paged.triton import TritonAttention

    assert takes(unified_attention, keywords(TritonAttention.attend, "unified_attention"))
    flash = flash_emulation.interface()
    assert takes(flash.flash_attn_varlen_func, keywords(FlashAttention.attend, "flash_attn_varlen_func"))
    assert takes(flash.get_scheduler_metadata, keywords(FlashAttention._work_out_schedule, "get_scheduler_metadata"))
    assert {"head_size", "kv_cache_block_size"} <= names(fa_utils.get_flash_attn_version)
    assert {"FLASH_ATTN", "TRITON_ATTN", "CPU_ATTN"} <= set(AttentionBackendEnum.__members__)


def test_interfaces_of_the_scheduler() -> None:
    """What the managers override, and what they call of the block pool's; tests/cache runs them in schedulers."""
    for manager in (AHNWindowManager, AHNStateManager):
        for name, method in vars(manager).items():
            if name.startswith("_") or not inspect.isfunction(getattr(manager, name)):
                continue
            assert names(method) == names(getattr(SingleTypeKVCacheManager, name)), name
        find = manager.find_longest_cache_hit
        assert names(find) == names(SingleTypeKVCacheManager.find_longest_cache_hit)
    assert "_pending_cow_copies" in inspect.getsource(SingleTypeKVCacheManager.__init__)
    assert names(BlockPool._insert_block_hash) == {"self", "block_hash_with_group_id", "block", "num_tokens"}
    assert names(BlockPool.move_block_hashes) == {"self", "src_block", "dst_block"}
    assert names(BlockPool.evict_blocks) == {"self", "block_ids"}
    assert names(BlockPool._emit_block_removed_events) == {"self", "block_hashes"}
    assert names(BlockPool.emit_cached_block_events) == {
        "self",
        "request",
        "num_cached_blocks",
        "block_size",
        "kv_cache_group_id",
    }


def test_interfaces_of_the_runners() -> None:
    fields = {field.name for field in dataclasses.fields(CommonAttentionMetadata)}
    assert {
        "query_start_loc",
        "query_start_loc_cpu",
        "seq_lens",
        "seq_lens_cpu_upper_bound",
        "num_actual_tokens",
        "max_query_len",
        "block_table_tensor",
        "slot_mapping",
    } <= fields
    assert AttentionCGSupport.UNIFORM_SINGLE_TOKEN_DECODE.value < AttentionCGSupport.ALWAYS.value
    builder = AttentionMetadataBuilder
    assert names(builder.__init__) == {"self", "kv_cache_spec", "layer_names", "vllm_config", "device"}
    assert names(builder.build) == {"self", "common_prefix_len", "common_attn_metadata", "fast_build"}
    assert names(builder.build_for_cudagraph_capture) == {"self", "common_attn_metadata"}
    assert {"get_attn_backend", "get_kv_cache_spec"} <= set(dir(AttentionLayerBase))
