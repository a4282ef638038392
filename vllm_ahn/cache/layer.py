"""What one attention layer keeps, from its sizes: the layout of its pages, and the specs that it gives vLLM.

The layer in the engine and ``vllm-ahn cost`` both ask here, so that the one reserves what the other prints.
"""

from dataclasses import dataclass

import torch
from vllm.config import VllmConfig

from vllm_ahn.cache.specs import AHNStateSpec, AHNWindowSpec, state_spec, window_spec
from vllm_ahn.config import AHNConfig
from vllm_ahn.kernels.pages import StatePageLayout, WindowPageLayout
from vllm_ahn.kernels.settled import GRANULARITY, Settling
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
    """Pages of the compressed memory, as large as those of the lossless one, in the dtype that `config` says.

    Without the delta rule an update is a token's value times its rate, both of which are in the window's pages.
    """
    kept = GRANULARITY if config.memory is not None and MEMORIES[config.memory].delta else 0
    return StatePageLayout(sizes.num_heads, sizes.head_size, page_bytes, getattr(torch, config.state_dtype), kept)


def settling(config: AHNConfig, *, block_size: int, vllm_config: VllmConfig) -> Settling:
    """When and where states are settled in this process's engine."""
    return Settling.of(
        config.window,
        config.sinks,
        block_size=block_size,
        caches_prefixes=bool(vllm_config.cache_config.enable_prefix_caching),
        speculates=bool(vllm_config.num_speculative_tokens),
    )


def layer_specs(
    config: AHNConfig, sizes: LayerSizes, *, block_size: int, dtype: torch.dtype, vllm_config: VllmConfig
) -> tuple[AHNWindowSpec, AHNStateSpec | None]:
    """The specs of a layer's lossless and compressed memory, the second None where there is no memory.

    Args:
        config: the AHN that is served.
        sizes: heads on this rank.
        block_size: tokens in a block.
        dtype: of keys, values and gates.
        vllm_config: says how many tokens may be in flight, and whether prefixes are cached and drafts made.
    """
    layout = window_layout(config, sizes, block_size, dtype)
    rule = settling(config, block_size=block_size, vllm_config=vllm_config)
    window = window_spec(
        layout,
        rule,
        max_in_flight_tokens=vllm_config.max_in_flight_tokens,
        retain_all=bool(config.full_attention_layers),
        max_drafts=vllm_config.num_speculative_tokens,
        checkpointed=config.memory is not None and bool(vllm_config.cache_config.enable_prefix_caching),
    )
    if config.memory is None:
        return window, None
    state = state_spec(
        state_layout(config, sizes, layout.page_bytes),
        rule,
        block_size=block_size,
        dtype=dtype,
        checkpoint_interval=checkpoint_interval(config, vllm_config),
    )
    return window, state


def checkpoint_interval(config: AHNConfig, vllm_config: VllmConfig) -> int:
    """Tokens of a prompt between checkpoints: as was asked for, else as many as a step may have."""
    if config.checkpoint_interval is not None:
        return config.checkpoint_interval
    return vllm_config.scheduler_config.max_num_batched_tokens
