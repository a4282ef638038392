"""The ways to run one base that are compared: full attention, with YaRN, sinks + window, and AHN checkpoints."""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import re
from collections.abc import Sequence

from vllm_ahn.checkpoint import resolve
from vllm_ahn.config import NO_MEMORY, AHNConfig
from vllm_ahn.errors import AHNError
from vllm_ahn.tools.evaluate.base import Base, pinned

BASELINES = {"full": "full attention", "yarn": "full attention, YaRN", "window": "sinks + window"}
"""What needs no AHN checkpoint, and what a table calls it."""

PAPER_NAMES = {"GatedDeltaNet": "GDN", "DeltaNet": "DN", "Mamba2": "Mamba2"}
"""``_ahn_implementation`` -> the paper's row, as in `suites.METHODS`."""


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
    """Which files the checkpoint is, from `base.pinned`."""

    @property
    def slug(self) -> str:
        """The method in file names."""
        if self.name in BASELINES:
            return self.name
        readable = re.sub(r"[^A-Za-z0-9]+", "-", self.name).strip("-")[-40:]
        return f"ahn-{readable}-{hashlib.sha256(self.name.encode()).hexdigest()[:6]}"

    def config(self, base: Base, window: int, sinks: int) -> AHNConfig | None:
        """Return what is served, all of it checked against the base; None for full attention. Raises `AHNError`."""
        if self.ahn is None:
            return None
        setting = {"checkpoint": self.ahn, "window": window, "sinks": sinks}
        return resolve(
            setting, base=base.name, base_revision=base.revision, base_config=argparse.Namespace(**base.config)
        )


def find_methods(baselines: Sequence[str], checkpoints: Sequence[str], base: Base) -> list[Method]:
    """Return the methods asked for, in the order of a table, each once.

    Args:
        baselines: keys of `BASELINES`.
        checkpoints: AHN checkpoints for `base`; "none" is the baseline ``window``.

    Raises:
        AHNError: a baseline is unknown, a checkpoint does not exist or is for another base, or nothing is asked for.
    """
    for name in baselines:
        if name not in BASELINES:
            raise AHNError(f"--baselines: {name!r} is unknown, expected some of {', '.join(BASELINES)}")
    if NO_MEMORY in checkpoints:
        baselines = [*baselines, "window"]
    methods = [
        Method(name, label, ahn=NO_MEMORY if name == "window" else None, paper=None if name == "yarn" else name)
        for name, label in BASELINES.items()
        if name in baselines
    ]
    for checkpoint in dict.fromkeys(checkpoints):
        if checkpoint == NO_MEMORY:
            continue
        name, files, _ = pinned(checkpoint)
        method = Method(checkpoint, checkpoint, ahn=name, files=files)
        config = method.config(base, 1, 0)
        assert config is not None and config.memory is not None
        paper = PAPER_NAMES[config.memory]
        methods.append(dataclasses.replace(method, label=f"AHN-{paper} ({checkpoint})", paper=paper))
    if not methods:
        raise AHNError("nothing to evaluate: expected --baselines, --ahn, or both")
    return methods
