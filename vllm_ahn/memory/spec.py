"""The table of memories: what sets one apart from another, for everyone who has to know. Standard library only.

All memories are one recurrence (arXiv 2510.07318; `vllm_ahn.kernels.recurrence.naive` is its plain form). For each
token that leaves the window, with the state ``M [D, D]`` of a query head::

    M <- exp(g) M;   u = b (v - (M^T k if delta else 0));   M <- M + k u^T;   o = scale * M^T q

They differ in how the decay ``g`` and the rate ``b`` come from a token's hidden state, in whether the delta rule
applies, and in how ``o`` is normalised. A row says which; ``docs/add-a-memory.md`` lists what a new one takes.
"""

from __future__ import annotations

import dataclasses
import importlib
from typing import Any

NORM_EPS = 1e-5
"""Epsilon of every memory's norm, whatever the base model's is."""


@dataclasses.dataclass(frozen=True)
class MemorySpec:
    """One memory."""

    name: str
    """``_ahn_implementation`` of a checkpoint's ``config.json``."""

    short_name: str
    """As the published checkpoints and our commands abbreviate it."""

    module: str
    """``module:class`` of its layer in the engine, imported when it is first needed."""

    projections: tuple[str, ...]
    """Projections of the hidden state to one value a query head, by their names in checkpoints: gates first, the
    read-out gate ``g_proj`` last."""

    delta: bool
    """The delta rule subtracts from a value what the state already answers to its key."""

    keeps_decay: bool = False
    """A token keeps ``g`` and ``b`` until it is absorbed; otherwise ``b`` alone."""

    decay_from_rate: bool = False
    """``g = -exp(A_log) b``; if neither this nor `keeps_decay`, ``g = 0``."""

    projection_bias: bool = False
    """The projections have a bias each."""

    head_parameters: tuple[str, ...] = ()
    """Parameters of one value a query head, float32 whatever the model's dtype."""

    norm_all_heads: bool = False
    """The norm of the read-out runs over all heads at once, after the gate; otherwise over each head, before it."""

    scaled: bool = True
    """``scale`` is ``D^-1/2``; otherwise 1."""

    own_query: bool = False
    """A checkpoint may have a query projection of the memory's own (``use_q_proj``)."""

    unused: tuple[str, ...] = ()
    """Parameters of one value a query head that published checkpoints hold and no formula has."""

    @property
    def num_gates(self) -> int:
        """Values a query head that a token keeps in its window page until it is absorbed."""
        return 2 if self.keeps_decay else 1

    @property
    def has_decay(self) -> bool:
        """Whether heads forget."""
        return self.keeps_decay or self.decay_from_rate

    @property
    def norm(self) -> str:
        """The name of the norm's module in checkpoints."""
        return "norm" if self.norm_all_heads else "o_norm"

    def scale(self, head_size: int) -> float:
        """The factor on what is read."""
        return head_size**-0.5 if self.scaled else 1.0

    def tensors(self, num_heads: int, head_size: int, hidden_size: int, own_query: bool) -> dict[str, tuple[int, ...]]:
        """Name below ``ahn.fn.`` and shape of every tensor of one layer's memory; `own_query` is ``use_q_proj``."""
        shapes: dict[str, tuple[int, ...]] = dict.fromkeys(self.head_parameters, (num_heads,))
        for name in self.projections:
            shapes[f"{name}.weight"] = (num_heads, hidden_size)
            if self.projection_bias:
                shapes[f"{name}.bias"] = (num_heads,)
        shapes[f"{self.norm}.weight"] = (num_heads * head_size if self.norm_all_heads else head_size,)
        shapes["o_proj.weight"] = (num_heads, head_size, head_size)
        if own_query:
            shapes["q_proj.weight"] = (num_heads, head_size, head_size)
        return shapes

    def layer_class(self) -> Any:
        """The class that `module` names, a subclass of `vllm_ahn.memory.base.Memory`."""
        module, _, name = self.module.partition(":")
        return getattr(importlib.import_module(module), name)


MEMORIES: dict[str, MemorySpec] = {
    memory.name: memory
    for memory in (
        MemorySpec(
            name="GatedDeltaNet",
            short_name="gdn",
            module="vllm_ahn.memory.gated_delta_net:GatedDeltaNet",
            projections=("a_proj", "b_proj", "g_proj"),
            delta=True,
            keeps_decay=True,
            head_parameters=("A_log", "dt_bias"),
            own_query=True,
            unused=("D",),
        ),
        MemorySpec(
            name="DeltaNet",
            short_name="dn",
            module="vllm_ahn.memory.delta_net:DeltaNet",
            projections=("b_proj", "g_proj"),
            delta=True,
        ),
        MemorySpec(
            name="Mamba2",
            short_name="mamba2",
            module="vllm_ahn.memory.mamba2:Mamba2",
            projections=("dt_proj", "g_proj"),
            delta=False,
            decay_from_rate=True,
            projection_bias=True,
            head_parameters=("A_log", "dt_bias"),
            norm_all_heads=True,
            scaled=False,
        ),
    )
}
"""By `MemorySpec.name`."""

SHORT_NAMES: dict[str, MemorySpec] = {memory.short_name: memory for memory in MEMORIES.values()}
"""By `MemorySpec.short_name`."""
