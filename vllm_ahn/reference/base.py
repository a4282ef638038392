"""The base models: their families, and the shape of one."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from vllm_ahn.errors import AHNError


@dataclasses.dataclass(frozen=True)
class Family:
    """What sets the bases of one ``model_type`` apart from others."""

    qkv_bias: bool = False
    """Queries, keys and values have biases, and ``o_proj`` has none; otherwise ``attention_bias`` decides for all
    four."""
    qk_norm: bool = False
    """Queries and keys are normed, each head for itself, before RoPE."""
    head_dim: int | None = None
    """The size of a head where ``config.json`` names none; None is ``hidden_size / num_attention_heads``."""


FAMILIES = {"qwen2": Family(qkv_bias=True), "qwen3": Family(qk_norm=True, head_dim=128)}
"""By ``model_type``."""


@dataclasses.dataclass(frozen=True)
class BaseConfig:
    """Shape of a base model, in the terms of its ``config.json``."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rms_norm_eps: float
    rope_theta: float
    tie_word_embeddings: bool
    qkv_bias: bool
    o_bias: bool
    qk_norm: bool

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> BaseConfig:
        """Read a ``config.json``. Raises `AHNError` for a base of no family, or one that alters attention or MLP."""
        family = FAMILIES.get(config.get("model_type", ""))
        if family is None:
            known = " or ".join(map(repr, FAMILIES))
            raise AHNError(f"config.json: model_type is {config.get('model_type')!r}, expected {known}")
        if config.get("use_sliding_window"):
            raise AHNError("config.json: use_sliding_window is true, expected a base with full attention")
        rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
        if rope.get("rope_type", rope.get("type", "default")) != "default":
            raise AHNError(f"config.json: rope scaling is {rope!r}, expected none")
        if config.get("hidden_act", "silu") != "silu":
            raise AHNError(f"config.json: hidden_act is {config['hidden_act']!r}, expected 'silu'")
        heads = config["num_attention_heads"]
        bias = not family.qkv_bias and bool(config.get("attention_bias", False))
        return cls(
            vocab_size=config["vocab_size"],
            hidden_size=config["hidden_size"],
            intermediate_size=config["intermediate_size"],
            num_hidden_layers=config["num_hidden_layers"],
            num_attention_heads=heads,
            num_key_value_heads=config.get("num_key_value_heads", heads),
            head_dim=config.get("head_dim") or family.head_dim or config["hidden_size"] // heads,
            rms_norm_eps=config["rms_norm_eps"],
            rope_theta=float(rope.get("rope_theta", config.get("rope_theta", 10000.0))),
            tie_word_embeddings=bool(config.get("tie_word_embeddings", False)),
            qkv_bias=family.qkv_bias or bias,
            o_bias=bias,
            qk_norm=family.qk_norm,
        )
