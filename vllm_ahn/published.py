"""The published models: the bases that AHNs were trained for, and those AHNs. Standard library only.

Their sizes are known here, so that parameters, caches and costs can be told by a hub name alone, without a network.
Who serves a model reads its own ``config.json``.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from vllm_ahn.memory.spec import MEMORIES, SHORT_NAMES


@dataclasses.dataclass(frozen=True)
class PublishedBase:
    """A size of Qwen2.5, the same for the pretrained model and for the one that follows instructions."""

    size: str
    """As the hub names it, such as "3B"."""
    layers: int
    hidden: int
    heads: int
    """Each of ``hidden / heads`` elements."""
    kv_heads: int
    intermediate: int
    vocabulary: int
    tied: bool
    """The embedding is the output matrix as well."""

    @property
    def name(self) -> str:
        """The name without owner and variant, such as "Qwen2.5-3B"."""
        return f"Qwen2.5-{self.size}"

    @property
    def instruct(self) -> str:
        """The hub repository that the AHNs were trained for."""
        return f"Qwen/{self.name}-Instruct"

    @property
    def config(self) -> dict[str, Any]:
        """The values of the Instruct model's ``config.json`` that sizes and positions depend on.

        The pretrained models differ in ``max_position_embeddings`` and ``rms_norm_eps``, on which no size depends.
        """
        return {
            "architectures": ["Qwen2ForCausalLM"],
            "model_type": "qwen2",
            "num_hidden_layers": self.layers,
            "hidden_size": self.hidden,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "intermediate_size": self.intermediate,
            "vocab_size": self.vocabulary,
            "tie_word_embeddings": self.tied,
            "max_position_embeddings": 32768,
            "rms_norm_eps": 1e-6,
            "rope_theta": 1e6,
            "torch_dtype": "bfloat16",
        }


BASES: dict[str, PublishedBase] = {
    base.name: base
    for base in (
        PublishedBase("3B", 36, 2048, 16, 2, 11008, 151936, tied=True),
        PublishedBase("7B", 28, 3584, 28, 4, 18944, 152064, tied=False),
        PublishedBase("14B", 48, 5120, 40, 8, 13824, 152064, tied=False),
    )
}
"""By `PublishedBase.name`."""


@dataclasses.dataclass(frozen=True)
class PublishedAHN:
    """An AHN checkpoint on the hub. It has none of the options of `vllm_ahn.checkpoint.tensors.AHNOptions`."""

    base: PublishedBase
    memory: str
    """One of `MEMORIES`."""

    @property
    def name(self) -> str:
        """The hub repository."""
        short = MEMORIES[self.memory].short_name
        label = self.memory if short == self.memory.lower() else short.upper()
        return f"ByteDance-Seed/AHN-{label}-for-Qwen-2.5-Instruct-{self.base.size}"

    @property
    def config(self) -> dict[str, Any]:
        """The values of its ``config.json`` that say what it is."""
        return self.base.config | {
            "_ahn_implementation": self.memory,
            "_layer_implementation": "Qwen2MemDecoderLayer",
        }


AHNS: dict[str, PublishedAHN] = {
    ahn.name: ahn for base in BASES.values() for ahn in (PublishedAHN(base, spec.name) for spec in SHORT_NAMES.values())
}
"""By hub repository."""


def find_base(name: str) -> PublishedBase | None:
    """Return the published base called `name`: a hub repository, or its name without owner or ``-Instruct``.

    A folder of this name is meant before any published model, and a revision may differ: None for both.
    """
    if Path(name).exists():
        return None
    return BASES.get(name.removeprefix("Qwen/").removesuffix("-Instruct"))


def find_ahn(name: str) -> PublishedAHN | None:
    """Return the published AHN in the hub repository `name`; None for any other name and for every folder."""
    return None if Path(name).exists() else AHNS.get(name)
