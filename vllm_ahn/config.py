"""What an AHN is served with: the checkpoint's options, the lengths that the user may set, and the state's dtype."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from vllm_ahn.errors import AHNError
from vllm_ahn.memory.spec import MEMORIES

if TYPE_CHECKING:
    from vllm.config import VllmConfig

DEFAULT_WINDOW = 32640
"""W, tokens: the window of the paper's evaluation, 32,768 lossless tokens less the sinks."""

DEFAULT_SINKS = 128
"""S, tokens: the attention sinks of the paper's evaluation."""

DEFAULT_LENGTH_FACTOR = 4
"""Without ``max_model_len``, this multiple of W + S is served: at W + S the memory is never used."""

MAX_LENGTH = 2**30
"""The largest window and the largest number of sinks, tokens: positions are 32-bit in the kernels."""

NO_MEMORY = "none"
"""In place of a checkpoint, asks for sinks and window alone: the baseline that shows what a memory adds."""

STATE_DTYPES = ("float32", "bfloat16")
"""Dtypes, by their names in PyTorch, in which the memory's state can be kept; the first is the default."""


@dataclasses.dataclass(frozen=True)
class AHNConfig:
    """One AHN as it is served. Every field is checked on construction, which raises `AHNError` for what cannot be."""

    memory: str | None
    """Which recurrence compresses what leaves the window: one of `MEMORIES` (``_ahn_implementation``); None if what
    leaves it is forgotten."""

    window: int = DEFAULT_WINDOW
    """W, tokens, at least 1: a query sees itself and the W - 1 tokens before it."""

    sinks: int = DEFAULT_SINKS
    """S, tokens, at least 0: the first S tokens stay visible for ever and are never absorbed."""

    checkpoint: str | None = None
    """The AHN checkpoint, a folder or hub repository without ``@revision``; None: merged into the base, or there is no
    memory."""

    revision: str | None = None
    """The revision of the hub repository `checkpoint`, None for its default branch."""

    use_q_proj: bool = False
    """The memory is read with a query projection of its own (GatedDeltaNet only)."""

    use_router: bool = False
    """A learnt gate per head weighs the memory against the window (``use_ahn_router``)."""

    full_attention_layers: tuple[int, ...] = ()
    """Layers, ascending from 0, that keep plain full attention (``fa_layer_ids``)."""

    state_dtype: str = STATE_DTYPES[0]
    """In which dtype the memory's state is kept between steps: one of `STATE_DTYPES`. Arithmetic is float32."""

    checkpoint_interval: int | None = None
    """Tokens of a prompt between two checkpoints in the prefix cache; 0 for none before its end, None for as many as a
    step may have (``max_num_batched_tokens``)."""

    def __post_init__(self) -> None:
        if self.memory is not None and self.memory not in tuple(MEMORIES):
            raise AHNError(f"ahn: memory is {self.memory!r}, expected one of {', '.join(MEMORIES)}, or None")
        check_window(self.window)
        check_sinks(self.sinks)
        for name in ("checkpoint", "revision"):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, str) or not value):
                raise AHNError(f"ahn: {name} is {value!r}, expected a non-empty string or None")
        belongs_to_memory = (self.checkpoint, self.use_q_proj, self.use_router, self.full_attention_layers)
        if self.memory is None and any(belongs_to_memory):
            raise AHNError("ahn: memory is None, expected neither a checkpoint nor options of one beside it")
        if self.checkpoint is None and self.revision is not None:
            raise AHNError(f"ahn: revision is {self.revision!r}, but there is no checkpoint that it could belong to")
        for name in ("use_q_proj", "use_router"):
            if not isinstance(getattr(self, name), bool):
                raise AHNError(f"ahn: {name} is {getattr(self, name)!r}, expected true or false")
        if self.use_q_proj:
            check_q_proj(self.memory, "ahn")
        if self.state_dtype not in STATE_DTYPES:
            raise AHNError(f"ahn: state_dtype is {self.state_dtype!r}, expected one of {', '.join(STATE_DTYPES)}")
        check_checkpoint_interval(self.checkpoint_interval)
        layers = self.full_attention_layers
        if not isinstance(layers, tuple) or not all(_is_int(n) and n >= 0 for n in layers):
            raise AHNError(f"ahn: full_attention_layers is {layers!r}, expected a tuple of layer numbers from 0")
        if list(layers) != sorted(set(layers)):
            raise AHNError(f"ahn: full_attention_layers is {layers!r}, expected ascending numbers, each once")

    @property
    def capacity(self) -> int:
        """W + S: how many tokens a sequence can have before any leaves the window."""
        return self.window + self.sinks

    @property
    def default_max_model_len(self) -> int:
        """Tokens of the longest sequence that is served if nothing else is asked for, unless the base has more."""
        return DEFAULT_LENGTH_FACTOR * self.capacity

    def describe(self, base: str) -> str:
        """Return the configuration in a line, for messages; `base` is where a merged memory comes from."""
        memory = f"{self.memory} from {self.checkpoint or base}" if self.memory else "no memory"
        state = "" if self.state_dtype == STATE_DTYPES[0] else f", state in {self.state_dtype}"
        return f"{memory}, window {self.window}, sinks {self.sinks}{state}"

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values under the field names; `from_dict` gives the same config back."""
        values = dataclasses.asdict(self)
        values["full_attention_layers"] = list(self.full_attention_layers)
        return values

    @classmethod
    def from_vllm_config(cls, config: VllmConfig) -> AHNConfig:
        """Read what the front end has put into vLLM's configuration, which carries it to every process.

        Raises:
            AHNError: there is no resolved AHN in it.
        """
        value = ahn_value(config.additional_config)
        if not is_resolved(value):
            raise AHNError(
                f"the architecture {config.model_config.architecture} is chosen by vllm-ahn itself: give the "
                "base model's own architecture, and the AHN by --ahn or additional_config"
            )
        return cls.from_dict(value)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> AHNConfig:
        """Read what `to_dict` wrote. Raises `AHNError` for an unknown key, a missing one or a wrong type."""
        if not isinstance(values, Mapping):
            raise AHNError(f"ahn: a resolved configuration is expected to be a dict, but is {values!r}")
        known = [field.name for field in dataclasses.fields(cls)]
        unknown = [repr(key) for key in values if key not in known]
        if unknown:
            raise AHNError(f"ahn: unknown key {', '.join(unknown)}, expected only {', '.join(known)}")
        if "memory" not in values:
            raise AHNError(f"ahn: memory is missing, expected one of {', '.join(MEMORIES)}")
        arguments = dict(values)
        if isinstance(arguments.get("full_attention_layers"), list):
            arguments["full_attention_layers"] = tuple(arguments["full_attention_layers"])
        return cls(**arguments)


def ahn_value(additional_config: Any) -> Any:
    """Return what ``additional_config`` says about AHN: None, a checkpoint, or a dict (resolved or the user's)."""
    return additional_config.get("ahn") if isinstance(additional_config, Mapping) else None


def is_resolved(value: object) -> bool:
    """Return whether a value of ``additional_config["ahn"]`` is an `AHNConfig.to_dict` and not a user's request."""
    return isinstance(value, Mapping) and {"memory", "window", "sinks"} <= value.keys()


def check_q_proj(memory: object, label: str) -> None:
    """Raise `AHNError` unless `memory` may have a query projection of its own; `label` is where ``use_q_proj`` is."""
    known = [spec.name for spec in MEMORIES.values() if spec.own_query]
    if memory not in known:
        raise AHNError(f"{label}: use_q_proj is true, expected false for {memory}: only {', '.join(known)} has it")


def check_window(value: object) -> int:
    """Return `value` if it can be W (tokens, an int of at least 1), else raise `AHNError`."""
    return _check_length("window", value, 1)


def check_sinks(value: object) -> int:
    """Return `value` if it can be S (tokens, an int of at least 0), else raise `AHNError`."""
    return _check_length("sinks", value, 0)


def check_checkpoint_interval(value: object) -> int | None:
    """Return `value` if it can be a checkpoint interval (tokens, an int of at least 0, or None), else raise
    `AHNError`."""
    return None if value is None else _check_length("checkpoint_interval", value, 0)


def parse_length(value: object) -> object:
    """Return the int that a string of decimal digits spells, and anything else as it is, for `AHNConfig` to check.

    Command lines and environment variables have only strings, so a number in quotes means the number.
    """
    if isinstance(value, str) and re.fullmatch(r"[+-]?[0-9]{1,18}", value.strip()):
        return int(value)
    return value


def _check_length(name: str, value: object, least: int) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= MAX_LENGTH:
        flag = f"--ahn-{name.replace('_', '-')}"
        raise AHNError(
            f"ahn: {name} ({flag}) is {value!r}, expected a whole number of tokens from {least} to {MAX_LENGTH:,}"
        )
    return value


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
