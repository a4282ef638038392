"""The cache that vLLM allocates: block counts from the specs that an engine would have, and from vLLM's own sums.

A sequence's cache has two sizes. *Reserved* is the max of blocks it ever holds, which is in the middle of its prefill:
the window before the oldest chunk in flight, and all chunks in flight. vLLM counts with it at startup, where it prints
"Maximum concurrency", and when it admits a request. *Held* is what a sequence has while it decodes, which it does for
most of its time: the blocks of sinks and window, and its state.
"""

from __future__ import annotations

import dataclasses
import functools
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from vllm.utils.math_utils import cdiv
from vllm.utils.torch_utils import STR_DTYPE_TO_TORCH_DTYPE
from vllm.v1.core.kv_cache_utils import get_kv_cache_capacity
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec, get_kv_quant_mode

from vllm_ahn.cache.layer import LayerSizes, layer_specs, state_layout
from vllm_ahn.cache.specs import AHNStateSpec, AHNWindowSpec
from vllm_ahn.config import AHNConfig
from vllm_ahn.errors import AHNError
from vllm_ahn.plugin.limits import BLOCK_SIZES
from vllm_ahn.tools.cost.shape import ModelShape

if TYPE_CHECKING:
    from vllm.config import VllmConfig

FP8 = "fp8"
"""vLLM's name for a cache in 8 bits, which only full attention has here."""


@dataclasses.dataclass(frozen=True)
class EngineSettings:
    """The arguments of an engine that its cache depends on, under vLLM's names. Raises `AHNError` for a bad one."""

    dtype: str
    """Of the model and, but for `FP8`, its cache: a name of torch's."""
    block_size: int = 16
    tensor_parallel_size: int = 1
    max_num_batched_tokens: int = 8192
    """vLLM's default for a server on GPUs of 70 GiB and more; others and offline use have others."""
    async_scheduling: bool = True
    """vLLM's default on GPUs: a step is scheduled while the one before it runs."""
    enable_prefix_caching: bool = True
    """vLLM's default: a sequence keeps states of block boundaries for those who begin like it."""
    spec_tokens: int = 0
    """Max drafts of a step; 0 without speculative decoding."""

    def __post_init__(self) -> None:
        if self.block_size not in BLOCK_SIZES:
            raise AHNError(f"--block-size is {self.block_size}, expected one of {', '.join(map(str, BLOCK_SIZES))}")

    @property
    def concurrent_steps(self) -> int:
        """Steps that may be scheduled and not yet settled at a time."""
        return 2 if self.async_scheduling else 1

    @property
    def max_in_flight_tokens(self) -> int:
        """Max tokens of one sequence in such steps."""
        return self.concurrent_steps * self.max_num_batched_tokens

    def vllm_config(self, length: int) -> VllmConfig:
        """Return as much of an engine's configuration, for sequences of up to `length` tokens, as cache specs read.

        A whole one needs the device that vLLM was built for.
        """
        values: Any = SimpleNamespace(
            model_config=SimpleNamespace(max_model_len=length),
            parallel_config=SimpleNamespace(decode_context_parallel_size=1),
            cache_config=SimpleNamespace(enable_prefix_caching=self.enable_prefix_caching),
            scheduler_config=SimpleNamespace(max_num_batched_tokens=self.max_num_batched_tokens),
            num_speculative_tokens=self.spec_tokens,
            max_in_flight_tokens=self.max_in_flight_tokens,
        )
        return values

    def layer_sizes(self, shape: ModelShape) -> LayerSizes:
        """Return the heads of a layer on one rank; where ranks outnumber KV heads, these are copied, as in vLLM."""
        size = self.tensor_parallel_size
        if shape.heads % size:
            raise AHNError(f"--tensor-parallel-size is {size}, expected a divisor of the model's {shape.heads} heads")
        if shape.kv_heads % size and size % shape.kv_heads:
            raise AHNError(
                f"--tensor-parallel-size is {size}, expected a divisor or a multiple of the model's "
                f"{shape.kv_heads} key/value heads"
            )
        return LayerSizes(shape.heads // size, max(1, shape.kv_heads // size), shape.head_size)


@dataclasses.dataclass(frozen=True)
class Allocation:
    """The cache of one sequence on one rank, over all layers."""

    length: int
    """Tokens of the sequence."""
    layers: int
    specs: tuple[FullAttentionSpec | AHNWindowSpec | AHNStateSpec, ...]
    """Of one layer, each of which is one of vLLM's groups. All have pages of one size."""
    settings: EngineSettings
    state_bytes: int = 0
    """Of one sequence's state, in all layers that have one."""
    slots_bytes: int = 0
    """Of all that the sequence keeps of it: the states of some boundaries, and the updates since each."""

    @property
    def block_bytes(self) -> int:
        """Bytes of a block: a page of every layer."""
        return self.layers * self.specs[0].page_size_bytes

    @functools.cached_property
    def reserved_blocks(self) -> int:
        """Max blocks that the sequence ever holds."""
        config = self.settings.vllm_config(self.length)
        return sum(cdiv(spec.max_memory_usage_bytes(config), spec.page_size_bytes) for spec in self.specs)

    @functools.cached_property
    def held_blocks(self) -> int:
        """Blocks that the sequence holds when it has decoded up to its length."""
        settled = self.length - self.settings.concurrent_steps
        blocks = 0
        for spec in self.specs:
            if isinstance(spec, AHNWindowSpec):
                blocks += spec.num_held_blocks(self.length, settled)
            elif isinstance(spec, AHNStateSpec):
                blocks += spec.num_held_blocks(self.length)
            else:
                blocks += cdiv(self.length, spec.block_size)
        return blocks

    @property
    def checkpoint_blocks(self) -> int:
        """Blocks of a checkpoint in the prefix cache. They are free, and go when they are needed."""
        if not self.settings.enable_prefix_caching:
            return 0
        return sum(spec.num_pages for spec in self.specs if isinstance(spec, AHNStateSpec))

    @property
    def reserved_bytes(self) -> int:
        return self.reserved_blocks * self.block_bytes

    @property
    def held_bytes(self) -> int:
        return self.held_blocks * self.block_bytes

    def max_concurrency(self, memory_bytes: int) -> float:
        """Return vLLM's own "Maximum concurrency" for sequences of this length, in a cache of `memory_bytes` a rank."""
        names = [f"layers.{index}" for index in range(self.layers)]
        cache = KVCacheConfig(
            num_blocks=memory_bytes // self.block_bytes,
            kv_cache_tensors=[],
            kv_cache_groups=[KVCacheGroupSpec(names, spec) for spec in self.specs],
        )
        return get_kv_cache_capacity(self.settings.vllm_config(self.length), cache)[1]

    def max_decoding(self, memory_bytes: int) -> int:
        """Return how many sequences of this length such a cache can hold at a time while they decode.

        vLLM keeps one block to itself, and admits a sequence only where as much is free as is reserved for it; the
        sequences before it hold less by then.
        """
        blocks = memory_bytes // self.block_bytes - 1 - self.reserved_blocks
        return 0 if blocks < 0 else 1 + blocks // self.held_blocks

    def parts(self) -> dict[str, int]:
        """Split the reserved bytes: lossless tokens; the state, and what is kept of it beyond that; what filling blocks
        and pages adds; chunks in flight."""
        lossless = self.specs[0]
        tokens = self.length
        if isinstance(lossless, AHNWindowSpec) and not lossless.retain_all:
            tokens = min(tokens, lossless.capacity)
        elements = 2 * lossless.head_size * lossless.num_kv_heads
        keys_and_values = self.layers * tokens * elements * lossless.dtype.itemsize
        content = self.layers * tokens * lossless.num_kv_heads * lossless.state_content_size_bytes
        has_state = any(isinstance(spec, AHNStateSpec) and spec.num_held_blocks(self.length) for spec in self.specs)
        state, slots = (self.state_bytes, self.slots_bytes) if has_state else (0, 0)
        return {
            "keys_and_values": keys_and_values,
            "gates": content - keys_and_values,
            "state": state,
            "slots": slots - state,
            "rounding": self.held_bytes - content - slots,
            "in_flight": self.reserved_bytes - self.held_bytes,
        }


def full_attention(shape: ModelShape, settings: EngineSettings, length: int, cache_dtype: str) -> Allocation:
    """Return the cache of vLLM's own attention, in `cache_dtype`: a name of torch's or `FP8`."""
    sizes = settings.layer_sizes(shape)
    spec = FullAttentionSpec(
        block_size=settings.block_size,
        num_kv_heads=sizes.num_kv_heads,
        head_size=sizes.head_size,
        dtype=STR_DTYPE_TO_TORCH_DTYPE[cache_dtype],
        kv_quant_mode=get_kv_quant_mode(cache_dtype),
    )
    return Allocation(length, shape.layers, (spec,), settings)


def ahn_attention(shape: ModelShape, settings: EngineSettings, length: int, config: AHNConfig) -> Allocation:
    """Return the cache of an AHN, or of sinks and window alone where `config` has no memory."""
    sizes = settings.layer_sizes(shape)
    window, state = layer_specs(
        config,
        sizes,
        block_size=settings.block_size,
        dtype=STR_DTYPE_TO_TORCH_DTYPE[settings.dtype],
        vllm_config=settings.vllm_config(length),
    )
    if state is None:
        return Allocation(length, shape.layers, (window,), settings)
    layers_with_state = shape.layers - len(config.full_attention_layers)
    layout = state_layout(config, sizes, state.page_size_bytes)
    state_bytes = layers_with_state * layout.num_heads * layout.head_size**2 * layout.dtype.itemsize
    slots_bytes = layers_with_state * state.settling.num_slots * layout.state_bytes
    return Allocation(length, shape.layers, (window, state), settings, state_bytes, slots_bytes)
