"""The layer that stands where a base model has vLLM's ``Attention``.

For vLLM it is two layers: the lossless memory under the attention's own name, and the compressed one beside it, so that
each has a cache spec, a manager and a block table of its own.
"""

from abc import abstractmethod
from typing import Generic, TypeVar

import torch
from torch import nn
from vllm.config import VllmConfig, get_current_vllm_config
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase

from vllm_ahn.attention.backend import AHNStateBackend, AHNWindowBackend
from vllm_ahn.attention.choose import choose_core
from vllm_ahn.attention.op import ahn_attention, encode_layer_name
from vllm_ahn.attention.warm_up import warm_up_once
from vllm_ahn.cache.layer import LayerSizes, layer_specs, state_layout, window_layout
from vllm_ahn.cache.specs import AHNStateSpec, AHNWindowSpec
from vllm_ahn.config import AHNConfig
from vllm_ahn.kernels.pages import StatePages, WindowPages
from vllm_ahn.memory.base import Memory
from vllm_ahn.memory.router import Router

Pages = TypeVar("Pages", WindowPages, StatePages)


class PagedLayer(AttentionLayerBase, Generic[Pages]):
    """A layer in vLLM's eyes: it has a name, a spec, a cache that vLLM binds and takes back, and views of its pages."""

    layer_name: str
    pages: Pages | None
    """Views of the cache; None while vLLM has none bound."""

    def register(self, prefix: str) -> None:
        """Make the layer known to vLLM's runner, which asks it for its spec and hands it cache and metadata."""
        layers = get_current_vllm_config().compilation_config.static_forward_context
        if prefix in layers:
            raise ValueError(f"Duplicate layer name: {prefix}")
        layers[prefix] = self
        self.layer_name = prefix
        self.kv_cache = torch.tensor([])

    @property
    def kv_cache(self) -> torch.Tensor:
        """All pages of the layer as vLLM binds them, ``[num_blocks, ...]``; empty while it has none bound."""
        return self._kv_cache

    @kv_cache.setter
    def kv_cache(self, kv_cache: torch.Tensor) -> None:
        self._kv_cache = kv_cache
        self.pages = self.view_pages(kv_cache) if kv_cache.numel() else None
        if self.pages is not None:
            self.bound()

    @abstractmethod
    def bound(self) -> None:
        """Called when vLLM has bound a cache."""

    @abstractmethod
    def view_pages(self, kv_cache: torch.Tensor) -> Pages:
        """The pages of a cache just bound."""


class AHNAttention(nn.Module, PagedLayer[WindowPages]):
    """Sliding-window attention with sinks, plus what a compressed memory adds past ``W + S`` tokens.

    Without a memory what leaves the window is forgotten.

    Args:
        num_heads: query heads on this rank.
        num_kv_heads: KV heads on this rank.
        head_size: size of a head.
        scale: factor on attention scores.
        config: the AHN that is served.
        memory: the layer's memory, if it has one.
        router: the layer's router, if the checkpoint has them.
        full_attention: the layer is plain full attention, without window and memory (``fa_layer_ids``).
        replaces: the base's own attention layer, whose name and place in vLLM's table of layers this one takes.
    """

    def __init__(
        self,
        num_heads: int,
        num_kv_heads: int,
        head_size: int,
        scale: float,
        config: AHNConfig,
        memory: Memory | None,
        router: Router | None,
        *,
        full_attention: bool,
        replaces: nn.Module,
    ) -> None:
        super().__init__()
        self.core = choose_core()
        self.num_heads = num_heads
        self.num_kv_heads = num_kv_heads
        self.head_size = head_size
        self.scale = scale
        self.config = config
        self.full_attention = full_attention
        self.vllm_config = get_current_vllm_config()
        # Held in a tuple: both are the decoder layer's modules, where checkpoints have them, and not this one's too.
        self._parts = (memory, router)
        name = replaces.layer_name
        del self.vllm_config.compilation_config.static_forward_context[name]
        self.register(name)
        # Layers of full attention have one too, unused, so that the groups have as many layers each.
        self.state = AHNState(self, f"{name}.state") if config.memory is not None else None

    @property
    def memory(self) -> Memory | None:
        return self._parts[0]

    @property
    def router(self) -> Router | None:
        return self._parts[1]

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        memory_query: torch.Tensor,
        gates: torch.Tensor | None,
        z: torch.Tensor | None,
    ) -> torch.Tensor:
        """One opaque operation: the two memories of all requests in the batch.

        Args:
            query: ``[num_tokens, num_heads * head_size]``, after RoPE.
            key: ``[num_tokens, num_kv_heads * head_size]``, after RoPE.
            value: shaped like ``key``.
            memory_query: shaped like ``query``, what the memory is read with.
            gates: ``[num_tokens, num_heads, num_gates]`` float32, from :meth:`Memory.project`; None without memory.
            z: ``[num_tokens, num_heads]`` float32, likewise.

        Returns:
            ``[num_tokens, num_heads * head_size]``, the input of ``o_proj``.
        """
        output = torch.empty_like(query)
        heads = (-1, self.num_heads, self.head_size)
        kv_heads = (-1, self.num_kv_heads, self.head_size)
        ahn_attention(
            query.view(heads),
            key.view(kv_heads),
            value.view(kv_heads),
            memory_query.view(heads),
            gates,
            z,
            output.view(heads),
            encode_layer_name(self.layer_name),
        )
        return output

    @property
    def sizes(self) -> LayerSizes:
        return LayerSizes(self.num_heads, self.num_kv_heads, self.head_size)

    def specs(self, vllm_config: VllmConfig) -> tuple[AHNWindowSpec, AHNStateSpec | None]:
        """The specs of both memories; the second is None where there is no memory."""
        return layer_specs(
            self.config,
            self.sizes,
            block_size=vllm_config.cache_config.block_size,
            dtype=vllm_config.model_config.dtype,
            vllm_config=vllm_config,
        )

    def get_attn_backend(self) -> type[AHNWindowBackend]:
        return AHNWindowBackend

    def get_kv_cache_spec(self, vllm_config: VllmConfig) -> AHNWindowSpec:
        return self.specs(vllm_config)[0]

    def bound(self) -> None:
        if self.memory is not None and self.state is not None and self.state.pages is not None:
            warm_up_once(self)

    def view_pages(self, kv_cache: torch.Tensor) -> WindowPages:
        return WindowPages(kv_cache, window_layout(self.config, self.sizes, kv_cache.shape[2], kv_cache.dtype))


class AHNState(PagedLayer[StatePages]):
    """The compressed memory's place among vLLM's layers: a name, a spec, and the pages."""

    def __init__(self, window_layer: AHNAttention, prefix: str) -> None:
        self._window_layer = window_layer
        self.register(prefix)

    def get_attn_backend(self) -> type[AHNStateBackend]:
        return AHNStateBackend

    def get_kv_cache_spec(self, vllm_config: VllmConfig) -> AHNStateSpec:
        spec = self._window_layer.specs(vllm_config)[1]
        assert spec is not None
        return spec

    def bound(self) -> None:
        if self._window_layer.pages is not None:
            self._window_layer.bound()

    def view_pages(self, kv_cache: torch.Tensor) -> StatePages:
        page_bytes = kv_cache[0].numel() * kv_cache.element_size()
        return StatePages(kv_cache, state_layout(self._window_layer.config, self._window_layer.sizes, page_bytes))
