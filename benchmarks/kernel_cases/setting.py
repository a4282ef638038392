"""What a run of the benchmark measures, and on what."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

from kernel_cases.timing import Timer, Times
from vllm_ahn.kernels.settled import Settling


@dataclass(frozen=True)
class Model:
    """Attention of one layer."""

    name: str
    heads: int
    kv_heads: int
    head_size: int

    @property
    def group(self) -> int:
        """Query heads of a KV head."""
        return self.heads // self.kv_heads


MODELS = {model.name: model for model in (Model("3B", 16, 2, 128), Model("7B", 28, 4, 128), Model("14B", 40, 8, 128))}
"""Qwen2.5's."""


@dataclass(frozen=True)
class Setting:
    """Sizes are in tokens, batches in requests."""

    device: torch.device
    timer: Timer | None
    """None: verify only."""
    attention: str = "auto"
    """Which paged attention: ``vllm``, ``own``, or ``auto``, vLLM's where it can be imported."""
    window: int = 32640
    sinks: int = 128
    context: int = 131072
    block_size: int = 16
    decode_batches: tuple[int, ...] = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
    verified_batches: tuple[int, ...] = (1, 3, 33)
    stretches: tuple[tuple[int, ...], ...] = ((2048,), (8192,), (32768,), (1, 65, 703, 2000, 5423, 24576))
    """Tokens that a prefill absorbs, by request."""
    verified_stretches: tuple[tuple[int, ...], ...] = ((1,), (63, 64, 130))
    attention_batches: tuple[int, ...] = (1, 2, 4, 8, 16, 32, 64)
    chunks: tuple[int, ...] = (2048, 8192)
    written: tuple[int, ...] = (1, 32, 512, 8192)
    dtype: torch.dtype = torch.bfloat16
    state_dtype: torch.dtype = torch.float32

    @property
    def on_gpu(self) -> bool:
        """Whether kernels run on a device of their own."""
        return self.device.type == "cuda"

    @property
    def capacity(self) -> int:
        """W + S."""
        return self.window + self.sinks

    @property
    def rule(self) -> Settling:
        """Of boundaries; without prefix caching and drafts a request has one state."""
        return Settling(self.window, self.sinks)

    def sizes(self) -> dict[str, Any]:
        """Return all but the device, for a result."""
        sizes = {name: value for name, value in vars(self).items() if name not in ("device", "timer")}
        return sizes | {name: str(sizes[name]) for name in ("dtype", "state_dtype")}


QUICK: dict[str, Any] = {
    "decode_batches": (1, 32, 256),
    "stretches": ((8192,),),
    "attention_batches": (1, 32),
    "chunks": (2048,),
    "written": (32, 8192),
}
"""What a shorter run measures."""

TINY = Model("tiny", 6, 2, 64)
TINY_SIZES: dict[str, Any] = {
    "window": 40,
    "sinks": 8,
    "context": 150,
    "decode_batches": (2,),
    "verified_batches": (5,),
    "stretches": ((70,),),
    "verified_stretches": ((1, 3),),
    "attention_batches": (2,),
    "chunks": (21,),
    "written": (3,),
}
"""What the interpreter can do in a minute."""


@dataclass
class Row:
    """One measurement: a kernel, or several that do the same thing, at one size."""

    case: str
    model: str
    memory: str
    sizes: dict[str, int]
    times: dict[str, Times] = field(default_factory=dict)
    ratios: dict[str, float] = field(default_factory=dict)

    def microseconds(self, name: str) -> float:
        """Return the median of one of the times."""
        return self.times[name].median

    def faster(self, one: str, other: str) -> float:
        """Return how many times as long ``one`` takes as ``other``."""
        return self.microseconds(one) / self.microseconds(other)
