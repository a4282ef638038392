"""What computes AHN layers: the interface of the two wings, ``cpu`` and ``gpu``."""

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from vllm.config import VllmConfig
from vllm.v1.attention.backend import AttentionCGSupport, CommonAttentionMetadata

from vllm_ahn.cache.specs import AHNWindowSpec
from vllm_ahn.config import AHNConfig
from vllm_ahn.kernels.pages import StatePages, WindowPages
from vllm_ahn.memory.base import Memory
from vllm_ahn.memory.router import Router


class StateLayer(Protocol):
    """What a core needs of the compressed memory's layer."""

    @property
    def pages(self) -> StatePages | None: ...


class Layer(Protocol):
    """What a core needs of a layer; :class:`AHNAttention` has it."""

    core: "Core"
    config: AHNConfig
    vllm_config: VllmConfig
    num_heads: int
    scale: float
    full_attention: bool

    @property
    def memory(self) -> Memory | None: ...

    @property
    def router(self) -> Router | None: ...

    @property
    def pages(self) -> WindowPages | None: ...

    @property
    def state(self) -> StateLayer | None: ...


@dataclass
class LayerInputs:
    """The tensors of one call of a layer, split by heads."""

    query: torch.Tensor
    """``[num_tokens, num_heads, head_size]``, after RoPE."""
    key: torch.Tensor
    """``[num_tokens, num_kv_heads, head_size]``, after RoPE."""
    value: torch.Tensor
    """Shaped like ``key``."""
    memory_query: torch.Tensor
    """Shaped like ``query``, what the memory is read with."""
    gates: torch.Tensor | None
    """``[num_tokens, num_heads, num_gates]`` float32, from :meth:`Memory.project`; None without memory."""
    z: torch.Tensor | None
    """``[num_tokens, num_heads]`` float32, likewise."""
    output: torch.Tensor
    """Shaped like ``query``, is written: the input of ``o_proj``."""


class Planner(Protocol):
    """Turns vLLM's batch into a core's plan of a step, once for all layers."""

    def plan(self, common: CommonAttentionMetadata, for_capture: bool = False) -> Any:
        """Plan a step.

        Args:
            common: the window group's batch.
            for_capture: a CUDA graph of the step will be replayed for other batches of as many requests with as many
                new tokens each, so that it has to do all that any of them needs.
        """


class Core(Protocol):
    """Computes layers on one kind of device."""

    compiles: bool
    """Kernels are compiled when they are first launched, and want warming up."""

    def cudagraph_support(self, vllm_config: VllmConfig) -> AttentionCGSupport:
        """Of which batches CUDA graphs can be captured."""

    def make_planner(self, spec: AHNWindowSpec, vllm_config: VllmConfig, device: torch.device) -> Planner:
        """The planner for the layers of a window group."""

    def reserve(self, layer: Layer, query: torch.Tensor) -> None:
        """Take for a moment the memory that a batch ``query [num_tokens, num_heads, head_size]`` may take.

        vLLM finds out how much memory is left for its cache by a run without requests.
        """

    def run(self, layer: Layer, inputs: LayerInputs, plan: Any, state_table: torch.Tensor | None) -> None:
        """Write the pages, attend, absorb, read, add.

        Args:
            layer: the layer.
            inputs: its tensors.
            plan: what the core's planner made of the step.
            state_table: ``[num_requests, width]`` int32, the state group's block table; None without memory.
        """
