"""Specs of the two memories of one layer, small."""

import torch

from vllm_ahn.cache.specs import AHNStateSpec, AHNWindowSpec, state_spec, window_spec
from vllm_ahn.kernels.pages import StatePageLayout, WindowPageLayout
from vllm_ahn.kernels.settled import GRANULARITY, Settling


def specs(
    window: int,
    sinks: int,
    max_in_flight_tokens: int,
    block_size: int,
    *,
    caches_prefixes: bool = False,
    speculates: bool = False,
    checkpoint_interval: int = 0,
    retain_all: bool = False,
    num_heads: int = 14,
) -> tuple[AHNWindowSpec, AHNStateSpec]:
    layout = WindowPageLayout(2, 64, num_heads, block_size, torch.bfloat16)
    states = StatePageLayout(num_heads, 64, layout.page_bytes, kept=GRANULARITY)
    settling = Settling.of(window, sinks, block_size=block_size, caches_prefixes=caches_prefixes, speculates=speculates)
    return (
        window_spec(layout, settling, max_in_flight_tokens=max_in_flight_tokens, retain_all=retain_all),
        state_spec(
            states, settling, block_size=block_size, dtype=layout.dtype, checkpoint_interval=checkpoint_interval
        ),
    )
