"""The table of base models that AHN serves. Standard library only.

To add a base, add a row here and its thin module in ``vllm_ahn/models/``; everything else reads this table.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from vllm_ahn.errors import AHNError


@dataclasses.dataclass(frozen=True)
class Base:
    """One base architecture."""

    architecture: str
    """As in ``architectures`` of the base's ``config.json``."""

    ahn_architecture: str
    """What vLLM loads in its place when the base is served with an AHN."""

    model_class: str
    """``module:class`` of `ahn_architecture`, in the form that vLLM's ``ModelRegistry`` imports lazily."""

    model_type: str
    """As in the base's ``config.json``."""

    layer_implementation: str
    """``_layer_implementation`` in the ``config.json`` of the AHN checkpoints made for this base."""

    default_head_dim: int | None = None
    """The head size that a ``config.json`` without ``head_dim`` means; None: hidden size / heads."""

    may_have_window: bool = False
    """Its ``config.json`` has ``use_sliding_window`` and the lengths that go with it, used or not."""


BASES = (
    Base(
        architecture="Qwen2ForCausalLM",
        ahn_architecture="AHNQwen2ForCausalLM",
        model_class="vllm_ahn.models.qwen2:AHNQwen2ForCausalLM",
        model_type="qwen2",
        layer_implementation="Qwen2MemDecoderLayer",
        may_have_window=True,
    ),
    Base(
        architecture="Qwen3ForCausalLM",
        ahn_architecture="AHNQwen3ForCausalLM",
        model_class="vllm_ahn.models.qwen3:AHNQwen3ForCausalLM",
        model_type="qwen3",
        layer_implementation="Qwen3MemDecoderLayer",
        default_head_dim=128,
        may_have_window=True,
    ),
)


def find_base(hf_config: Any, name: str) -> Base:
    """Return the row for a base model.

    Args:
        hf_config: the base's ``config.json`` (a mapping) or its Hugging Face config (an object).
        name: what errors call the base.

    Raises:
        AHNError: AHN has no model for any of its ``architectures``.
    """
    if isinstance(hf_config, Mapping):
        named = hf_config.get("architectures")
    else:
        named = getattr(hf_config, "architectures", None)
    architectures = list(named or [])
    for base in BASES:
        if base.architecture in architectures:
            return base
    raise AHNError(
        f"{name}: architectures in config.json is {architectures}, but AHN is implemented only for "
        f"{', '.join(base.architecture for base in BASES)}"
    )


def base_of_type(model_type: object) -> Base | None:
    """Return the row for a ``model_type``, None if there is none."""
    return next((base for base in BASES if base.model_type == model_type), None)
