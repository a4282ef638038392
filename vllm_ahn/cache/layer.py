"""What one attention layer keeps, from its sizes: the layout of its pages, and the specs that it gives vLLM.

The layer in the engine and ``vllm-ahn cost`` both ask here, so that the one reserves what the other prints.
"""

from dataclasses import dataclass

import torch
from vllm.config import VllmConfig

from vllm_ahn.cache.specs import AHNStateSpec, AHNWindowSpec, state_spec, window_spec
from vllm_ahn.config import AHNConfig
from vllm_ahn.kernels.pages import StatePageLayout, WindowPageLayout
from vllm_ahn.memory.spec import MEMORIES


@dataclass(frozen=True)
class LayerSizes:
    """Heads of one layer on one tensor-parallel rank."""

    num_heads: int
    num_kv_heads: int
    head_size: int


def window_layout(config: AHNConfig, sizes: LayerSizes, block_size: int, dtype: torch.dtype) -> WindowPageLayout:
    """Pages of the lossless memory, of ``block_size`` tokens in ``dtype``.

    A layer without a memory of its own (``fa_layer_ids``) takes the same pages as the others, so that all share a
    group.
    """
    num_gates = 0 if config.memory is None else MEMORIES[config.memory].num_gates
    return WindowPageLayout(
        num_kv_heads=sizes.num_kv_heads,
        head_size=sizes.head_size,
        gates_per_kv_head=num_gates * sizes.num_heads // sizes.num_kv_heads,
        block_size=block_size,
        dtype=dtype,
    )


def state_layout(config: AHNConfig, sizes: LayerSizes, page_bytes: int) -> StatePageLayout:
    """Pages of the compressed memory, as large as those of the lossless one, in the dtype that `config` says."""
    return StatePageLayout(sizes.num_heads, sizes.head_size, page_bytes, getattr(torch, config.state_dtype))


def layer_specs(
    config: AHNConfig, sizes: LayerSizes, *, block_size: int, dtype: torch.dtype, vllm_config: VllmConfig
) -> tuple[AHNWindowSpec, AHNStateSpec | None]:
    """The specs of a layer's lossless and compressed memory, the second None where there is no memory.

    Args:
        config: the AHN that is served.
        sizes: heads on this rank.
        block_size: tokens in a block.
        dtype: of keys, values and gates.
        vllm_config: only ``max_in_flight_tokens`` is read.
    """
    layout = window_layout(config, sizes, block_size, dtype)
    window = window_spec(
        layout,
        window=config.window,
        sinks=config.sinks,
        max_in_flight_tokens=vllm_config.max_in_flight_tokens,
        retain_all=bool(config.full_attention_layers),
    )
    if config.memory is None:
        return window, None
    states = state_layout(config, sizes, layout.page_bytes)
    return window, state_spec(states, block_size=block_size, dtype=dtype, capacity=config.capacity)
