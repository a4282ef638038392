"""What is AHN in a model, written once for every base.

A base is served by its own vLLM class with one thing changed: each decoder layer's attention is wrapped by
:class:`AHNSelfAttention`. :class:`AHNForCausalLM` does that and loads the memory's tensors; ``qwen2.py`` shows how
little a base has to say.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from vllm.config import CompilationConfig, VllmConfig
from vllm.model_executor.model_loader.default_loader import DefaultModelLoader

from vllm_ahn.attention.layer import AHNAttention
from vllm_ahn.attention.op import QUALIFIED_NAME
from vllm_ahn.checkpoint.tensors import is_ahn_tensor
from vllm_ahn.config import AHNConfig
from vllm_ahn.memory.base import Memory
from vllm_ahn.memory.router import Router
from vllm_ahn.memory.spec import MEMORIES
from vllm_ahn.plugin import patches


class AHN(nn.Module):
    """Holds the memory under the name that checkpoints give it, ``ahn.fn``."""

    def __init__(self, fn: Memory) -> None:
        super().__init__()
        self.fn = fn


class AHNSelfAttention(nn.Module):
    """A base's self-attention with the two memories in place of full attention.

    The base's projections, norms and rotary embedding keep their names, so that its weights, quantisation and LoRA find
    them where they were. Of the base it asks what vLLM's Llama-like attentions have: ``qkv_proj``, ``rotary_emb``,
    ``o_proj``, maybe ``q_norm`` and ``k_norm`` over each head, and their sizes.

    Args:
        base: the base's own self-attention, which is taken apart.
        config: the AHN that is served.
        memory: the layer's memory, if it has one.
        router: the layer's router, if the checkpoint has them.
        full_attention: the layer keeps full attention (``fa_layer_ids``).
    """

    def __init__(
        self, base: nn.Module, config: AHNConfig, memory: Memory | None, router: Router | None, *, full_attention: bool
    ) -> None:
        super().__init__()
        self.num_heads = base.num_heads
        self.head_dim = base.head_dim
        self.q_size = base.q_size
        self.kv_size = base.kv_size
        self.qkv_proj = base.qkv_proj
        self.rotary_emb = base.rotary_emb
        self.o_proj = base.o_proj
        self.has_qk_norm = hasattr(base, "q_norm")
        if self.has_qk_norm:
            self.q_norm, self.k_norm = base.q_norm, base.k_norm
        # The memory is the decoder layer's module, where checkpoints have it, and not this one's too.
        self._parts = (memory,)
        self.attn = AHNAttention(
            base.num_heads,
            base.num_kv_heads,
            base.head_dim,
            base.scaling,
            config,
            memory,
            router,
            full_attention=full_attention,
            replaces=base.attn,
        )

    @property
    def memory(self) -> Memory | None:
        return self._parts[0]

    def forward(self, positions: torch.Tensor, hidden_states: torch.Tensor) -> torch.Tensor:
        """As the base's: ``positions [num_tokens]``, ``hidden_states [num_tokens, hidden_size]`` in and out."""
        qkv, _ = self.qkv_proj(hidden_states)
        raw_query, key, value = qkv.split([self.q_size, self.kv_size, self.kv_size], dim=-1)
        gates = z = memory_query = None
        if (memory := self.memory) is not None:
            gates, z = memory.project(hidden_states)
            if memory.query_proj is not None:
                # RoPE may work in place, so the memory's query is taken from the raw one before it.
                by_head = raw_query.unflatten(-1, (self.num_heads, self.head_dim))
                memory_query = memory.query_proj(by_head).flatten(-2)
                memory_query, _ = self.rotary_emb(positions, memory_query)
        query = raw_query
        if self.has_qk_norm:
            query, key = (
                norm(x.unflatten(-1, (-1, self.head_dim))).flatten(-2)
                for norm, x in ((self.q_norm, query), (self.k_norm, key))
            )
        query, key = self.rotary_emb(positions, query, key)
        if memory_query is None:
            memory_query = query
        output, _ = self.o_proj(self.attn(query, key, value, memory_query, gates, z))
        return output


def wrap_attention(layer: nn.Module, index: int, config: AHNConfig, hidden_size: int) -> None:
    """Give the base's decoder layer ``index`` the AHN of ``config``, memory and router where checkpoints have them."""
    base = layer.self_attn
    memory, router = None, None
    full_attention = index in config.full_attention_layers
    if config.memory is not None and not full_attention:
        memory = MEMORIES[config.memory].layer_class()(
            hidden_size, base.total_num_heads, base.head_dim, use_q_proj=config.use_q_proj
        )
        layer.ahn = AHN(memory)
        if config.use_router:
            router = layer.ahn_router = Router(base.total_num_heads)
    layer.self_attn = AHNSelfAttention(base, config, memory, router, full_attention=full_attention)


def cut_out_of_graphs(config: CompilationConfig) -> None:
    """Have the compiler cut graphs at the attention operation, so that piecewise CUDA graphs leave it out.

    To be called when a model is built: before, vLLM fills the list of such operations with its own unless anything is
    in it; later, it reads it to compile. An empty list says that graphs are not to be cut at all.
    """
    if config.splitting_ops and QUALIFIED_NAME not in config.splitting_ops:
        config.splitting_ops.append(QUALIFIED_NAME)


class AHNForCausalLM(nn.Module):
    """Comes before a base's ``ForCausalLM`` among the bases of a class, and makes an AHN model of it.

    The base's ``model`` has ``layers`` from ``start_layer`` to ``end_layer``, each with a ``self_attn``. Nothing of the
    AHN is quantised or takes LoRA, since none of its modules is a linear layer of vLLM's.
    """

    has_ahn = True
    """What tells an AHN model from others, for those who must not import this module."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        cut_out_of_graphs(vllm_config.compilation_config)
        if vllm_config.lora_config is not None:
            patches.patch_lora_workers()
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        self.ahn_config = AHNConfig.from_vllm_config(vllm_config)
        for index in self.own_layers:
            wrap_attention(self.model.layers[index], index, self.ahn_config, self.config.hidden_size)
        self.secondary_weights: list[DefaultModelLoader.Source] = []
        if self.ahn_config.checkpoint is not None:
            self.secondary_weights.append(
                DefaultModelLoader.Source(
                    self.ahn_config.checkpoint,
                    self.ahn_config.revision,
                    fall_back_to_pt=False,
                    allow_patterns_overrides=["*.safetensors"],
                )
            )

    @property
    def own_layers(self) -> range:
        """Indices of the layers on this pipeline rank."""
        return range(self.model.start_layer, self.model.end_layer)

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        """Load the base's tensors as the base does, and the AHN's by their own rules.

        The base's loader renames by substring, and would take the memory's ``q_proj`` for the attention's.
        """
        loaded: set[str] = set()

        def base_weights() -> Iterable[tuple[str, torch.Tensor]]:
            for name, weight in weights:
                if not is_ahn_tensor(name):
                    yield name, weight
                elif (parameter := self._load_ahn_weight(name, weight)) is not None:
                    loaded.add(parameter)

        return super().load_weights(base_weights()) | loaded

    def _load_ahn_weight(self, name: str, weight: torch.Tensor) -> str | None:
        """Load ``model.layers.N.{ahn.fn,ahn_router}.TENSOR``.

        Returns:
            The name of the parameter that took it, or None if no module here needs it: the layer is another rank's or
            keeps full attention, or the memory of a merged checkpoint is not wanted.
        """
        before, _, after = name.partition(".layers.")
        index, _, rest = after.partition(".")
        module_name = next(part for part in ("ahn.fn", "ahn_router") if rest.startswith(f"{part}."))
        if self.ahn_config.memory is None or int(index) not in self.own_layers:
            return None
        if int(index) in self.ahn_config.full_attention_layers:
            return None
        prefix = f"{before}.layers.{index}.{module_name}"
        module: Any = self.get_submodule(prefix)
        parameter = module.load_weight(rest.removeprefix(f"{module_name}."), weight)
        return None if parameter is None else f"{prefix}.{parameter}"
