"""The ways to run one base that are compared: full attention, with YaRN, sinks + window, and AHN checkpoints."""

from __future__ import annotations

import dataclasses
import hashlib
import re
from collections.abc import Mapping, Sequence
from typing import Any

from vllm_ahn.checkpoint import resolve
from vllm_ahn.config import NO_MEMORY, AHNConfig
from vllm_ahn.errors import AHNError
from vllm_ahn.tools.evaluate.base import Base, pinned

BASELINES = {
    "full": "full attention",
    "yarn": "full attention, YaRN",
    "window": "sinks + window",
}
"""What needs no AHN checkpoint, and what a table calls it."""

PAPER_NAMES = {"GatedDeltaNet": "GDN", "DeltaNet": "DN", "Mamba2": "Mamba2"}
"""``_ahn_implementation`` -> the paper's name of the row, as in `suites.METHODS`."""

FIXED_ARGUMENTS = (
    "model", "tokenizer", "revision", "tokenizer_revision", "additional_config", "hf_overrides", "max_model_len",
    "runner", "max_length", "pretrained", "data_parallel_size", "skip_tokenizer_init",
)  # fmt: skip
"""Arguments of `vllm.LLM` that a method or a suite decides, or that one engine a process rules out."""

NO_INFLUENCE = (
    "gpu_memory_utilization", "kv_cache_memory_bytes", "num_gpu_blocks_override", "max_num_seqs", "download_dir",
    "max_parallel_loading_workers", "disable_log_stats",
)  # fmt: skip
"""Arguments that say where and how much at once: an answer stays the same model's answer under others."""


@dataclasses.dataclass(frozen=True)
class Method:
    """A row of the table."""

    name: str
    """A key of `BASELINES`, or the checkpoint as the user wrote it."""

    label: str
    """What a table calls it."""

    ahn: str | None = None
    """The checkpoint, `NO_MEMORY` for sinks + window, or None for full attention."""

    paper: str | None = None
    """The paper's row, one of `suites.METHODS`; None if it has none."""

    files: str | None = None
    """`base.pinned` of the checkpoint."""

    @property
    def slug(self) -> str:
        """For file names."""
        if self.name in BASELINES:
            return self.name
        readable = re.sub(r"[^A-Za-z0-9]+", "-", self.name).strip("-")[-40:]
        return f"ahn-{readable}-{hashlib.sha256(self.name.encode()).hexdigest()[:6]}"

    def config(self, base: Base, window: int, sinks: int) -> AHNConfig | None:
        """What is served, every part of it checked against the base; None for full attention. Raises `AHNError`."""
        if self.ahn is None:
            return None
        setting = {"checkpoint": self.ahn, "window": window, "sinks": sinks}
        return resolve(setting, base=base.name, base_revision=base.revision, base_config=base.hf_config)

    def engine_arguments(
        self, base: Base, *, max_model_len: int, window: int, sinks: int, given: Mapping[str, Any]
    ) -> dict[str, Any]:
        """The arguments of `vllm.LLM`; methods differ in ``hf_overrides`` and ``additional_config`` only.

        Args:
            max_model_len: the longest sequence, tokens.
            given: what the user asked for, `check_arguments`.

        Raises:
            AHNError: the base cannot be run so.
        """
        arguments = {**given, "model": base.name, "max_model_len": max_model_len}
        if base.revision is not None:
            arguments |= {"revision": base.revision, "tokenizer_revision": base.revision}
        if self.ahn is not None:
            # Here the plugin enlarges the positions, as for every AHN that is served.
            arguments["additional_config"] = {"ahn": {"checkpoint": self.ahn, "window": window, "sinks": sinks}}
        elif changed := base.yarn(max_model_len) if self.name == "yarn" else base.unscaled(max_model_len):
            arguments["hf_overrides"] = changed
        return arguments


def find_methods(baselines: Sequence[str], checkpoints: Sequence[str], base: Base) -> list[Method]:
    """The methods asked for, in the order of a table, each once.

    Args:
        baselines: keys of `BASELINES`.
        checkpoints: AHN checkpoints for `base`; "none" is the baseline ``window``.

    Raises:
        AHNError: an unknown baseline, no such checkpoint, one for another base, or nothing to do.
    """
    for name in baselines:
        if name not in BASELINES:
            raise AHNError(f"--baselines: {name!r} is unknown, expected some of {', '.join(BASELINES)}")
    wanted = {"window", *baselines} if NO_MEMORY in checkpoints else set(baselines)
    methods = [_baseline(name) for name in BASELINES if name in wanted]
    for checkpoint in dict.fromkeys(checkpoints):
        if checkpoint != NO_MEMORY:
            methods.append(_ahn(checkpoint, base))
    if not methods:
        raise AHNError("nothing to evaluate: expected --baselines, --ahn, or both")
    return methods


def check_arguments(given: object) -> dict[str, Any]:
    """`given` if it can be arguments of `vllm.LLM` for every method; raises `AHNError`."""
    if not isinstance(given, dict):
        raise AHNError(f'--engine-args: {given!r}, expected a JSON object such as {{"block_size": 32}}')
    if fixed := [name for name in given if name in FIXED_ARGUMENTS]:
        raise AHNError(f"--engine-args: {', '.join(fixed)} is decided by the evaluation, expected other arguments")
    return given


def _baseline(name: str) -> Method:
    return Method(
        name,
        BASELINES[name],
        ahn=NO_MEMORY if name == "window" else None,
        paper=None if name == "yarn" else name,
    )


def _ahn(checkpoint: str, base: Base) -> Method:
    name, files, _ = pinned(checkpoint)
    method = Method(checkpoint, checkpoint, ahn=name, files=files)
    config = method.config(base, 1, 0)
    assert config is not None and config.memory is not None  # what has none is refused above
    short = PAPER_NAMES[config.memory]
    return dataclasses.replace(method, label=f"AHN-{short} ({checkpoint})", paper=short)
