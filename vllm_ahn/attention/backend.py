"""How vLLM's model runner comes to plan a step for the two cache groups."""

from typing import Any, ClassVar

import torch
from vllm.config import VllmConfig
from vllm.v1.attention.backend import (
    AttentionBackend,
    AttentionCGSupport,
    AttentionImplBase,
    AttentionMetadataBuilder,
    CommonAttentionMetadata,
    MultipleOf,
)
from vllm.v1.kv_cache_interface import AttentionSpec, KVCacheSpec
from vllm.v1.kv_cache_layout import KVCacheLayout

from vllm_ahn.attention.choose import choose_core
from vllm_ahn.cache.specs import AHNWindowSpec


class _AHNBackend(AttentionBackend):
    supported_dtypes: ClassVar[list[torch.dtype]] = [torch.float16, torch.bfloat16, torch.float32]

    @staticmethod
    def get_supported_kernel_block_sizes(kv_cache_spec: Any = None) -> list[int | MultipleOf]:
        return [MultipleOf(16)]

    @staticmethod
    def get_impl_cls() -> type[AttentionImplBase]:
        raise NotImplementedError("AHN layers compute by themselves, without an implementation object")

    @classmethod
    def supported_kv_cache_layouts(cls) -> tuple[KVCacheLayout, ...]:
        # The planes of a KV head must be contiguous within a block.
        return (KVCacheLayout.LBHNC,)


class AHNWindowBackend(_AHNBackend):
    """Plans the step. Its metadata serves both groups but for the state group's block table."""

    @staticmethod
    def get_name() -> str:
        return "AHN_WINDOW"

    @staticmethod
    def get_builder_cls() -> type["AHNPlanBuilder"]:
        return AHNPlanBuilder


class AHNStateBackend(_AHNBackend):
    """Hands the state group's block table to the layers."""

    @staticmethod
    def get_name() -> str:
        return "AHN_STATE"

    @staticmethod
    def get_builder_cls() -> type["AHNStateTableBuilder"]:
        return AHNStateTableBuilder


class AHNPlanBuilder(AttentionMetadataBuilder[Any]):
    """Has the core plan the step, once for all layers of the window group."""

    def __init__(
        self, kv_cache_spec: AttentionSpec, layer_names: list[str], vllm_config: VllmConfig, device: torch.device
    ) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        assert isinstance(kv_cache_spec, AHNWindowSpec)
        self.planner = choose_core().make_planner(kv_cache_spec, vllm_config, device)

    @classmethod
    def get_cudagraph_support(cls, vllm_config: VllmConfig, kv_cache_spec: KVCacheSpec) -> AttentionCGSupport:
        return choose_core().cudagraph_support(vllm_config)

    def build(
        self, common_prefix_len: int, common_attn_metadata: CommonAttentionMetadata, fast_build: bool = False
    ) -> Any:
        return self.planner.plan(common_attn_metadata)

    def build_for_cudagraph_capture(self, common_attn_metadata: CommonAttentionMetadata) -> Any:
        return self.planner.plan(common_attn_metadata, for_capture=True)


class AHNStateTableBuilder(AttentionMetadataBuilder[torch.Tensor]):
    """The metadata of the state group is its block table, ``[num_requests, width]`` int32."""

    # A CUDA graph finds the table where it was: what it may hold is for the window group's builder to say.
    _cudagraph_support = AttentionCGSupport.ALWAYS

    def __init__(
        self, kv_cache_spec: AttentionSpec, layer_names: list[str], vllm_config: VllmConfig, device: torch.device
    ) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)

    def build(
        self, common_prefix_len: int, common_attn_metadata: CommonAttentionMetadata, fast_build: bool = False
    ) -> torch.Tensor:
        return common_attn_metadata.block_table_tensor
