"""Specs of the two memories of one layer, small."""

import torch

from vllm_ahn.cache.specs import AHNStateSpec, AHNWindowSpec, state_spec, window_spec
from vllm_ahn.kernels.pages import StatePageLayout, WindowPageLayout


def specs(window: int, sinks: int, max_in_flight_tokens: int, block_size: int) -> tuple[AHNWindowSpec, AHNStateSpec]:
    layout = WindowPageLayout(2, 64, 14, block_size, torch.bfloat16)
    states = StatePageLayout(14, 64, layout.page_bytes)
    return (
        window_spec(layout, window=window, sinks=sinks, max_in_flight_tokens=max_in_flight_tokens),
        state_spec(states, block_size=block_size, dtype=layout.dtype, capacity=window + sinks),
    )
