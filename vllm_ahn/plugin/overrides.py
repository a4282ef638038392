"""What changes in a base model's configuration when it is served with an AHN: architecture and lengths."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vllm_ahn.bases import find_base
from vllm_ahn.checkpoint import looks_merged
from vllm_ahn.config import AHNConfig
from vllm_ahn.errors import AHNError

DEFAULT_LENGTH_FACTOR = 4
"""Without ``max_model_len``, this multiple of W + S is served: at W + S the memory is never used."""


def has_sliding_window(base_config: Any) -> bool:
    """Return whether the base model, as Transformers reads its config, has a sliding window of its own."""
    types = getattr(base_config, "layer_types", None) or []
    return any(kind != "full_attention" for kind in types) or getattr(base_config, "sliding_window", None) is not None


def overrides(config: AHNConfig, base_config: Any, *, base: str, max_model_len: int | None) -> dict[str, Any]:
    """Return the fields of `base_config` to replace, for vLLM's ``hf_overrides``.

    `max_model_len` is what the user asked for in tokens, None or -1 where vLLM is to choose. Raises
    `AHNError` for a base model that cannot be served with an AHN.
    """
    changed: dict[str, Any] = {"architectures": [find_base(base_config, base).ahn_architecture]}
    if has_sliding_window(base_config):
        if not looks_merged(base_config):
            raise AHNError(
                f"{base}: the base model has a sliding window of its own (use_sliding_window in "
                "config.json), expected full attention in every layer"
            )
        # In a merged checkpoint this is the window that the AHN was trained with. It says nothing about
        # serving.
        layers = base_config.num_hidden_layers
        changed |= {
            "use_sliding_window": False,
            "sliding_window": None,
            "layer_types": ["full_attention"] * layers,
        }
    positions = rope_positions(config, base_config, max_model_len)
    if positions is not None:
        changed["max_position_embeddings"] = positions
    return changed


def rope_positions(config: AHNConfig, base_config: Any, max_model_len: int | None) -> int | None:
    """Return how many positions the rotary tables must have, None where the base model's own number is to stay.

    vLLM sizes the tables by ``max_position_embeddings`` and takes it for the longest sequence where the user
    asks for none. AHN uses true positions, unscaled. A base that scales its positions means to: then its own
    length holds.
    """
    own = getattr(base_config, "max_position_embeddings", None)
    if own is None or _scales_positions(base_config):
        return None
    if max_model_len is None or max_model_len == -1:
        return max(own, DEFAULT_LENGTH_FACTOR * config.capacity)
    return max(own, max_model_len)


def unused_memory(config: AHNConfig, max_model_len: int) -> str | None:
    """Return a warning where no sequence of at most `max_model_len` tokens outgrows window and sinks, else None."""
    if max_model_len > config.capacity:
        return None
    never = "the window would never be left" if config.memory is None else "the AHN memory would never be used"
    return (
        f"The longest sequence that will be served, max_model_len = {max_model_len}, is not longer than the "
        f"AHN's window and sinks together, {config.window} + {config.sinks} = {config.capacity}: {never}. "
        "Serve a greater --max-model-len, or a smaller --ahn-window."
    )


def _scales_positions(base_config: Any) -> bool:
    for name in ("rope_parameters", "rope_scaling"):
        rope = getattr(base_config, name, None)
        if isinstance(rope, Mapping) and rope.get("rope_type", rope.get("type", "default")) != "default":
            return True
    return False


class ConfigOverrides:
    """vLLM's ``hf_overrides`` for users who gave a function themselves: theirs first, then `changed`."""

    def __init__(self, first: Any, changed: dict[str, Any]) -> None:
        self.first = first
        self.changed = changed

    def __call__(self, config: Any) -> Any:
        config = self.first(config)
        config.update(self.changed)
        return config
