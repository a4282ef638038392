"""The sizes of a base model that its costs depend on, from ``config.json`` alone."""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

from vllm_ahn import published
from vllm_ahn.bases import find_base
from vllm_ahn.checkpoint import looks_merged, resolve
from vllm_ahn.checkpoint.find import local_folder, split_revision
from vllm_ahn.checkpoint.options import read_config, read_config_file, read_memory, read_options
from vllm_ahn.checkpoint.tensors import BaseShape, positive_field
from vllm_ahn.config import AHNConfig
from vllm_ahn.errors import AHNError


@dataclasses.dataclass(frozen=True)
class ModelShape:
    """Sizes of a base model."""

    layers: int
    hidden: int
    """D"""
    heads: int
    """Nq"""
    kv_heads: int
    """Nkv"""
    head_size: int
    """H"""
    intermediate: int
    """I, width of the MLP."""
    vocabulary: int
    dtype: str
    """What vLLM runs the model in if not told otherwise: a name of torch's."""

    @classmethod
    def from_config(cls, config: Mapping[str, Any], label: str) -> ModelShape:
        """Read the values of a ``config.json``. Raises `AHNError`, with `label` for it, if one is missing or wrong."""
        base = BaseShape.from_config(config, label)
        return cls(
            base.num_hidden_layers,
            base.hidden_size,
            base.num_attention_heads,
            base.num_key_value_heads,
            base.head_dim,
            positive_field(config, "intermediate_size", label),
            positive_field(config, "vocab_size", label),
            # vLLM never serves float32 unless it is asked to.
            "float16" if config.get("dtype", config.get("torch_dtype")) == "float16" else "bfloat16",
        )


@dataclasses.dataclass(frozen=True)
class Model:
    """A model that was found."""

    name: str
    """As the user gave it."""
    label: str
    """Its ``config.json`` in messages."""
    config: Mapping[str, Any]
    shape: ModelShape

    def ahn(self, checkpoint: str | None, window: int, sinks: int, state_dtype: str) -> AHNConfig | None:
        """Return the AHN in `checkpoint`, or the one merged into this model, or None if there is neither.

        Of a checkpoint only ``config.json`` is read, and of a published one nothing: `vllm_ahn.published` knows it.
        Raises `AHNError` for what would be refused when serving.
        """
        lengths: dict[str, Any] = {"window": window, "sinks": sinks, "state_dtype": state_dtype}
        published_ahn = None if checkpoint is None else published.find_ahn(checkpoint)
        if published_ahn is not None:
            self._check_fit(published_ahn)
            return AHNConfig(published_ahn.memory, checkpoint=checkpoint, **lengths)
        base_config = SimpleNamespace(**self.config)
        if checkpoint is not None:
            return resolve(
                {"checkpoint": checkpoint, "window": window, "sinks": sinks},
                base=self.name,
                base_revision=None,
                base_config=base_config,
                weights=False,
                state_dtype=state_dtype,
            )
        if not looks_merged(base_config):
            return None
        options = read_options(self.config, BaseShape.from_config(self.config, self.label), self.label)
        return AHNConfig(
            read_memory(self.config, self.label),
            use_q_proj=options.use_q_proj,
            use_router=options.use_router,
            full_attention_layers=options.full_attention_layers,
            **lengths,
        )

    def _check_fit(self, ahn: published.PublishedAHN) -> None:
        if BaseShape.from_config(ahn.config) != BaseShape.from_config(self.config, self.label):
            raise AHNError(
                f"{ahn.name}: this AHN was made for another base than {self.name}, expected {ahn.base.instruct}"
            )


def find_model(name: str) -> Model:
    """Return the model `name`: a ``config.json``, a folder with one, or a hub repository with an optional
    ``@revision``.

    The published bases are known without a network, by shorter names too, see `vllm_ahn.published.find_base`. Raises
    `AHNError` if `name` cannot be found or read, or has an architecture without AHN.
    """
    path = pathlib.Path(name)
    base = published.find_base(name)
    if base is not None:
        config, label = base.config, name
    elif path.is_file():
        config, label = read_config_file(path, name), name
    else:
        repository, revision = split_revision(name)
        config, label = read_config(local_folder(repository, revision, weights=False), name), f"{name}/config.json"
    find_base(config, name)
    return Model(name, label, config, ModelShape.from_config(config, label))
