"""Which tensors an AHN checkpoint holds, and how many parameters they are, from names and shapes alone."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, Protocol

from vllm_ahn import published
from vllm_ahn.bases import base_of_type
from vllm_ahn.errors import AHNError
from vllm_ahn.memory.spec import MEMORIES

Shapes = dict[str, tuple[int, ...]]
"""Tensor name -> shape."""

_MISSING = object()


@dataclasses.dataclass(frozen=True)
class BaseShape:
    """What an AHN has to know of the base model: it fits every base for which all six are the same."""

    model_type: str
    num_hidden_layers: int
    hidden_size: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int

    @classmethod
    def from_config(cls, hf_config: Any, label: str = "config.json") -> BaseShape:
        """Read a ``config.json`` (a mapping) or a Hugging Face config (an object); `label` names it in errors.

        Without a ``head_dim`` the head size is hidden / heads (Qwen2) or Qwen3's 128. Raises `AHNError` for a
        field that is missing, is no positive whole number, or does not divide as attention needs.
        """
        model_type = _field(hf_config, "model_type")
        if not isinstance(model_type, str) or not model_type:
            raise AHNError(f"{label}: model_type is {_shown(model_type)}, expected the name of a model type")
        layers, hidden, heads, kv_heads = (
            positive_field(hf_config, name, label)
            for name in ("num_hidden_layers", "hidden_size", "num_attention_heads", "num_key_value_heads")
        )
        if heads % kv_heads:
            raise AHNError(
                f"{label}: num_attention_heads is {heads}, expected a multiple of num_key_value_heads, {kv_heads}"
            )
        if _field(hf_config, "head_dim") not in (None, _MISSING):
            head_dim = positive_field(hf_config, "head_dim", label)
        elif (base := base_of_type(model_type)) is not None and base.default_head_dim is not None:
            head_dim = base.default_head_dim
        elif hidden % heads:
            raise AHNError(f"{label}: hidden_size is {hidden}, expected a multiple of num_attention_heads, {heads}")
        else:
            head_dim = hidden // heads
        return cls(model_type, layers, hidden, heads, kv_heads, head_dim)


PUBLISHED_SIZES = {
    BaseShape("qwen2", base.layers, base.hidden, base.heads, base.kv_heads, base.hidden // base.heads): base.name
    for base in published.BASES.values()
}
"""The bases that AHNs were published for; other bases fit as well, they only have no name here."""


class Options(Protocol):
    """The checkpoint options that decide which tensors there are; `vllm_ahn.config.AHNConfig` has them."""

    @property
    def use_q_proj(self) -> bool: ...

    @property
    def use_router(self) -> bool: ...

    @property
    def full_attention_layers(self) -> tuple[int, ...]: ...


@dataclasses.dataclass(frozen=True)
class AHNOptions:
    """`Options` as a ``config.json`` gives them; none, as in the published checkpoints, unless said otherwise."""

    use_q_proj: bool = False
    use_router: bool = False
    full_attention_layers: tuple[int, ...] = ()


PUBLISHED_OPTIONS = AHNOptions()


def expected_tensors(memory: str, shape: BaseShape, options: Options = PUBLISHED_OPTIONS) -> Shapes:
    """Return name and shape of every tensor that the AHN of `memory` needs, layer by layer."""
    shapes: Shapes = {}
    for layer in range(shape.num_hidden_layers):
        if layer not in options.full_attention_layers:
            shapes.update(_layer(layer, memory, shape, options))
    return shapes


def unused_tensors(memory: str, shape: BaseShape, options: Options = PUBLISHED_OPTIONS) -> Shapes:
    """Return the tensors that a checkpoint may hold although nothing reads them: name and shape.

    GatedDeltaNet's ``D`` [H], which the module that it was trained in makes and saves, and no formula has. And every
    tensor of a layer with full attention: the published trainer makes and saves a memory for these too.
    """
    shapes: Shapes = {}
    for layer in range(shape.num_hidden_layers):
        if layer in options.full_attention_layers:
            shapes.update(_layer(layer, memory, shape, options))
        for name in MEMORIES[memory].unused:
            shapes[f"model.layers.{layer}.ahn.fn.{name}"] = (shape.num_attention_heads,)
    return shapes


def count_parameters(memory: str, shape: BaseShape, options: Options = PUBLISHED_OPTIONS) -> int:
    """Return the parameters of an AHN, of all layers together, those of `unused_tensors` not counted.

    These are the counts of the AHN paper's tables (arXiv 2510.07318). Counting GatedDeltaNet's unused ``D``
    would add H a layer, at most 1,920 on the published sizes, and change none of the published figures.
    """
    return sum(math.prod(dims) for dims in expected_tensors(memory, shape, options).values())


def state_bytes(shape: BaseShape, options: Options = PUBLISHED_OPTIONS, element_bytes: int = 4) -> int:
    """Return the bytes of one sequence's state: [H, D, D] a layer that has an AHN, float32 by default."""
    layers = shape.num_hidden_layers - len(options.full_attention_layers)
    return layers * shape.num_attention_heads * shape.head_dim**2 * element_bytes


def is_ahn_tensor(name: str) -> bool:
    """Return whether a tensor of a checkpoint, or of a LoRA adapter, belongs to the AHN and not to the base."""
    return ".ahn." in name or ".ahn_router." in name


def _layer(layer: int, memory: str, shape: BaseShape, options: Options) -> Shapes:
    if memory not in MEMORIES:
        raise AHNError(f"ahn: memory is {memory!r}, expected one of {', '.join(MEMORIES)}")
    heads = shape.num_attention_heads
    fn = MEMORIES[memory].tensors(heads, shape.head_dim, shape.hidden_size, options.use_q_proj)
    shapes = {f"model.layers.{layer}.ahn.fn.{name}": dims for name, dims in fn.items()}
    if options.use_router:
        shapes |= {f"model.layers.{layer}.ahn_router.{name}": (heads,) for name in ("alpha", "beta")}
    return shapes


def _field(hf_config: Any, name: str) -> Any:
    if isinstance(hf_config, Mapping):
        return hf_config.get(name, _MISSING)
    return getattr(hf_config, name, _MISSING)


def positive_field(hf_config: Any, name: str, label: str) -> int:
    """Return field `name` of a config (a mapping or an object), a whole number of at least 1, or raise `AHNError`."""
    value = _field(hf_config, name)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise AHNError(f"{label}: {name} is {_shown(value)}, expected a positive whole number")
    return value


def _shown(value: object) -> str:
    return "missing" if value is _MISSING else repr(value)
