"""How vLLM's model runner comes to plan a step for the two cache groups."""

from typing import Any, ClassVar

import torch
from vllm.config import VllmConfig
from vllm.v1.attention.backend import (
    AttentionBackend,
    AttentionImplBase,
    AttentionMetadataBuilder,
    CommonAttentionMetadata,
    MultipleOf,
)
from vllm.v1.kv_cache_interface import AttentionSpec
from vllm.v1.kv_cache_layout import KVCacheLayout

from vllm_ahn.attention.batch import AHNMetadata
from vllm_ahn.attention.planner import AHNPlanner
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
    def get_builder_cls() -> type["AHNMetadataBuilder"]:
        return AHNMetadataBuilder


class AHNStateBackend(_AHNBackend):
    """Hands the state group's block table to the layers."""

    @staticmethod
    def get_name() -> str:
        return "AHN_STATE"

    @staticmethod
    def get_builder_cls() -> type["AHNStateTableBuilder"]:
        return AHNStateTableBuilder


class AHNMetadataBuilder(AttentionMetadataBuilder[AHNMetadata]):
    """Builds :class:`AHNMetadata` once a step, for all layers of the window group."""

    def __init__(
        self, kv_cache_spec: AttentionSpec, layer_names: list[str], vllm_config: VllmConfig, device: torch.device
    ) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        assert isinstance(kv_cache_spec, AHNWindowSpec)
        self.planner = AHNPlanner(
            kv_cache_spec,
            num_heads=vllm_config.model_config.get_num_attention_heads(vllm_config.parallel_config),
            dtype=vllm_config.model_config.dtype,
        )

    def build(
        self, common_prefix_len: int, common_attn_metadata: CommonAttentionMetadata, fast_build: bool = False
    ) -> AHNMetadata:
        return self.planner.plan(common_attn_metadata)


class AHNStateTableBuilder(AttentionMetadataBuilder[torch.Tensor]):
    """The metadata of the state group is its block table, ``[num_requests, width]`` int32."""

    def __init__(
        self, kv_cache_spec: AttentionSpec, layer_names: list[str], vllm_config: VllmConfig, device: torch.device
    ) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)

    def build(
        self, common_prefix_len: int, common_attn_metadata: CommonAttentionMetadata, fast_build: bool = False
    ) -> torch.Tensor:
        return common_attn_metadata.block_table_tensor
