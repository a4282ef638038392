"""The golden data: outputs of the published implementation in float32, see ``tests/golden``."""

import dataclasses
import functools
import pathlib

import torch
from safetensors.torch import load_file

from support.paths import GOLDEN

WINDOW = 24
GENERATED = 33
"""Greedy tokens a prompt; the first comes from the prefill's logits, the others from 32 decode steps."""

LOGIT_TOLERANCE = 1e-3
"""Largest difference allowed between float32 logits; the two best logits always differ by at least 0.02."""


@dataclasses.dataclass(frozen=True)
class Case:
    """The golden outputs for one prompt."""

    name: str
    length: int
    prompt: torch.Tensor
    """[length] int64"""
    tokens: torch.Tensor
    """[33] int64"""
    prefill_logits: torch.Tensor
    """[vocab]: those the first token was taken from"""
    decode_logits: torch.Tensor
    """[32, vocab]: those the other tokens were taken from"""
    states: dict[int, torch.Tensor]
    """layer -> [H, Dk, Dv] after the prefill, where recorded"""

    @property
    def logits(self) -> torch.Tensor:
        """[33, vocab]: those of all tokens."""
        return torch.cat((self.prefill_logits[None], self.decode_logits))


@dataclasses.dataclass(frozen=True)
class Golden:
    """One AHN checkpoint with its base and outputs."""

    name: str
    base: pathlib.Path
    ahn: pathlib.Path
    memory: str
    window: int
    sinks: int
    lengths: tuple[int, ...]

    @property
    def capacity(self) -> int:
        return self.window + self.sinks

    def case(self, length: int) -> Case:
        """The prompt of `length` tokens and what follows it."""
        tensors = _expected(self.name)
        prefix = f"state.L{length}.layer"
        states = {int(name.removeprefix(prefix)): t[0] for name, t in tensors.items() if name.startswith(prefix)}
        if self.memory == "Mamba2":  # recorded as [Dv, Dk]
            states = {layer: state.transpose(-1, -2) for layer, state in states.items()}
        return Case(
            self.name,
            length,
            tensors[f"prompt_ids.L{length}"].long(),
            tensors[f"generated_ids.L{length}"].long(),
            tensors[f"prefill_last_logits.L{length}"],
            tensors[f"decode_logits.L{length}"],
            states,
        )

    def cases(self) -> list[Case]:
        return [self.case(length) for length in self.lengths]


@functools.cache
def _expected(name: str) -> dict[str, torch.Tensor]:
    return load_file(GOLDEN / "expected" / f"{name}.safetensors")


def _golden(name: str, base: str, memory: str, sinks: int, lengths: tuple[int, ...]) -> Golden:
    return Golden(name, GOLDEN / base, GOLDEN / "ahn" / name, memory, WINDOW, sinks, lengths)


CONFIGURATIONS = {
    golden.name: golden
    for golden in (
        _golden("gdn_qwen2", "base_qwen2", "GatedDeltaNet", 8, (20, 32, 37, 100, 300)),
        _golden("gdn_qwen2_s0", "base_qwen2", "GatedDeltaNet", 0, (20, 24, 29, 100, 300)),
        _golden("mamba2_qwen2", "base_qwen2", "Mamba2", 8, (20, 32, 37, 100, 300)),
        _golden("dn_qwen3", "base_qwen3", "DeltaNet", 8, (20, 32, 37, 100, 300)),
    )
}
NAMES = tuple(CONFIGURATIONS)
NAMES_AND_LENGTHS = [(golden.name, length) for golden in CONFIGURATIONS.values() for length in golden.lengths]


def module_vectors(memory: str) -> tuple[dict[str, torch.Tensor], list[dict[str, torch.Tensor]]]:
    """Parameters (names after ``fn.``) of one memory and its segments, each continuing the state of the last.

    Keys of a segment: ``q``, ``k``, ``v`` ``[1, T, H, D]`` not yet normalised; ``hidden_ab`` and ``hidden_g``
    ``[1, T, hidden]``, of evicted and of reading tokens; ``core`` ``[1, T, H, D]`` before the norm; ``out``
    ``[1, T, H * D]``; ``state`` ``[1, H, Dk, Dv]`` afterwards; ``beta`` (Mamba2: what dt_proj gives) and
    ``alpha`` (GatedDeltaNet: the decay) ``[1, T, H]``.
    """
    tensors = load_file(GOLDEN / "modules" / f"{memory}.safetensors")
    parameters = {n.removeprefix("param.fn."): t for n, t in tensors.items() if n.startswith("param.fn.")}
    segments = []
    while any(name.startswith(f"seg{len(segments)}.") for name in tensors):
        prefix = f"seg{len(segments)}."
        segments.append({n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)})
    if memory == "Mamba2":
        for segment in segments:
            segment["state"] = segment["state"].transpose(-1, -2)
    return parameters, segments
