"""What is AHN in a model, written once for every base.

A base model gives its decoder layer and its ``Model`` class; :class:`AHNDecoderLayer` and :class:`AHNForCausalLM` add
the rest. See ``qwen2.py`` for how little a base has to say.
"""

from collections.abc import Iterable
from typing import Any, ClassVar

import torch
from torch import nn
from vllm.config import CompilationConfig, VllmConfig, get_current_vllm_config
from vllm.distributed import get_pp_group
from vllm.model_executor.layers.logits_processor import LogitsProcessor
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead
from vllm.model_executor.model_loader.default_loader import DefaultModelLoader
from vllm.model_executor.models.interfaces import SupportsLoRA, SupportsPP, SupportsQuant
from vllm.model_executor.models.utils import (
    AutoWeightsLoader,
    PPMissingLayer,
    extract_layer_index,
    maybe_prefix,
)
from vllm.sequence import IntermediateTensors

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


class AHNDecoderLayer(nn.Module):
    """A decoder layer of the base whose attention has the two memories.

    Comes before the base's layer class among the bases of a concrete class. The base's layer is built as it is; then
    its ``self_attn.attn`` is replaced, and the memory is put where checkpoints have it.
    """

    def __init__(self, config: Any, cache_config: Any = None, quant_config: Any = None, prefix: str = "") -> None:
        super().__init__(config=config, cache_config=cache_config, quant_config=quant_config, prefix=prefix)
        vllm_config = get_current_vllm_config()
        ahn_config = AHNConfig.from_vllm_config(vllm_config)
        attention = self.self_attn
        name = attention.attn.layer_name
        # The base's own attention has entered itself as a layer with a cache; ours takes its place under its name.
        del vllm_config.compilation_config.static_forward_context[name]

        memory, router = None, None
        full_attention = extract_layer_index(prefix) in ahn_config.full_attention_layers
        if ahn_config.memory is not None and not full_attention:
            memory = MEMORIES[ahn_config.memory].layer_class()(
                config.hidden_size,
                attention.total_num_heads,
                attention.head_dim,
                use_q_proj=ahn_config.use_q_proj,
            )
            self.ahn = AHN(memory)
            if ahn_config.use_router:
                router = Router(attention.total_num_heads, ahn_config.window, ahn_config.sinks)
                self.ahn_router = router
        attention.attn = AHNAttention(
            attention.num_heads,
            attention.num_kv_heads,
            attention.head_dim,
            attention.scaling,
            ahn_config,
            memory,
            router,
            full_attention=full_attention,
            prefix=name,
        )

    def forward(
        self, positions: torch.Tensor, hidden_states: torch.Tensor, residual: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """As the base's layer: ``[num_tokens, hidden_size]`` in and out."""
        if residual is None:
            residual = hidden_states
            hidden_states = self.input_layernorm(hidden_states)
        else:
            hidden_states, residual = self.input_layernorm(hidden_states, residual)
        hidden_states = self._attend(positions, hidden_states)
        hidden_states, residual = self.post_attention_layernorm(hidden_states, residual)
        return self.mlp(hidden_states), residual

    def _attend(self, positions: torch.Tensor, hidden_states: torch.Tensor) -> torch.Tensor:
        attention = self.self_attn
        memory = attention.attn.memory
        qkv, _ = attention.qkv_proj(hidden_states)
        raw_query, key, value = qkv.split([attention.q_size, attention.kv_size, attention.kv_size], dim=-1)
        gates = z = memory_query = None
        if memory is not None:
            gates, z = memory.project(hidden_states)
            if memory.query_proj is not None:
                # RoPE may work in place, so the memory's query is taken from the raw one before it.
                by_head = raw_query.unflatten(-1, (attention.num_heads, attention.head_dim))
                memory_query = memory.query_proj(by_head).flatten(-2)
                memory_query, _ = attention.rotary_emb(positions, memory_query)
        query = raw_query
        if hasattr(attention, "q_norm"):
            query = _norm_by_head(query, attention.q_norm, attention.head_dim)
            key = _norm_by_head(key, attention.k_norm, attention.head_dim)
        query, key = attention.rotary_emb(positions, query, key)
        if memory_query is None:
            memory_query = query
        output, _ = attention.o_proj(attention.attn(query, key, value, memory_query, gates, z))
        return output


def _norm_by_head(x: torch.Tensor, norm: nn.Module, head_dim: int) -> torch.Tensor:
    return norm(x.unflatten(-1, (-1, head_dim))).flatten(-2)


def cut_out_of_graphs(config: CompilationConfig) -> None:
    """Have the compiler cut graphs at the attention operation, so that piecewise CUDA graphs leave it out.

    To be called when a model is built: before, vLLM fills the list of such operations with its own unless anything is
    in it; later, it reads it to compile. An empty list says that graphs are not to be cut at all.
    """
    if config.splitting_ops and QUALIFIED_NAME not in config.splitting_ops:
        config.splitting_ops.append(QUALIFIED_NAME)


class AHNForCausalLM(nn.Module, SupportsLoRA, SupportsPP, SupportsQuant):
    """A causal language model over a base's ``Model`` class, with AHN tensors from a second source.

    Subclasses set :attr:`model_class`, and what quantisation and LoRA have to know of the base's names:
    ``hf_to_vllm_mapper``, ``packed_modules_mapping`` and ``embedding_modules``. Nothing of the AHN is quantised or
    takes LoRA, since none of its modules is a linear layer of vLLM's.
    """

    has_ahn: ClassVar[bool] = True
    """How `vllm_ahn.plugin.patches` knows these models, without importing them."""

    model_class: ClassVar[type[nn.Module]]
    """The base's ``Model`` class over AHN decoder layers, compiled by vLLM."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__()
        cut_out_of_graphs(vllm_config.compilation_config)
        if vllm_config.lora_config is not None:
            patches.patch_lora_workers()
        config = vllm_config.model_config.hf_config.get_text_config()
        self.config = config
        self.model = self.model_class(vllm_config=vllm_config, prefix=maybe_prefix(prefix, "model"))
        if not get_pp_group().is_last_rank:
            self.lm_head: nn.Module = PPMissingLayer()
        else:
            lm_head = ParallelLMHead(
                config.vocab_size,
                config.hidden_size,
                quant_config=self.quant_config,
                prefix=maybe_prefix(prefix, "lm_head"),
            )
            tied = config.tie_word_embeddings
            self.lm_head = lm_head.tie_weights(self.model.embed_tokens) if tied else lm_head
        self.logits_processor = LogitsProcessor(config.vocab_size)
        self.make_empty_intermediate_tensors = self.model.make_empty_intermediate_tensors

        ahn_config = AHNConfig.from_vllm_config(vllm_config)
        self.has_memory = ahn_config.memory is not None
        self.full_attention_layers = ahn_config.full_attention_layers
        self.secondary_weights: list[DefaultModelLoader.Source] = []
        if ahn_config.checkpoint is not None:
            self.secondary_weights.append(
                DefaultModelLoader.Source(
                    ahn_config.checkpoint,
                    ahn_config.revision,
                    fall_back_to_pt=False,
                    allow_patterns_overrides=["*.safetensors"],
                )
            )

    def embed_input_ids(self, input_ids: torch.Tensor) -> torch.Tensor:
        return self.model.embed_input_ids(input_ids)

    def forward(
        self,
        input_ids: torch.Tensor | None,
        positions: torch.Tensor,
        intermediate_tensors: IntermediateTensors | None = None,
        inputs_embeds: torch.Tensor | None = None,
    ) -> torch.Tensor | IntermediateTensors:
        return self.model(input_ids, positions, intermediate_tensors, inputs_embeds)

    def compute_logits(self, hidden_states: torch.Tensor) -> torch.Tensor | None:
        return self.logits_processor(self.lm_head, hidden_states)

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        """Load the base's tensors as the base does, and AHN's by their own rules.

        The base's loader renames by substring, and would take the memory's ``q_proj`` for the attention's.
        """
        loaded: set[str] = set()

        def base_weights() -> Iterable[tuple[str, torch.Tensor]]:
            for name, weight in weights:
                if is_ahn_tensor(name):
                    if (parameter := self._load_ahn_weight(name, weight)) is not None:
                        loaded.add(parameter)
                else:
                    yield name, weight

        return AutoWeightsLoader(self).load_weights(base_weights()) | loaded

    def _load_ahn_weight(self, name: str, weight: torch.Tensor) -> str | None:
        """Load one AHN tensor; returns the name of the parameter that took it, None if no module here needs it."""
        for part in (".ahn.fn.", ".ahn_router."):
            before, found, tensor_name = name.partition(part)
            if found:
                break
        if not self.has_memory:  # a merged checkpoint whose memory is not wanted
            return None
        index = int(before.rpartition(".")[2])
        if not self.model.start_layer <= index < self.model.end_layer:
            return None
        if index in self.full_attention_layers:  # the published trainer saves a memory for these too
            return None
        prefix = before + part
        module: Any = self.get_submodule(prefix.rstrip("."))
        parameter = module.load_weight(tensor_name, weight)
        return None if parameter is None else prefix + parameter
