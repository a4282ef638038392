"""What is compared: one base, and the ways to run it: full attention, YaRN, sinks + window, and AHN checkpoints."""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vllm_ahn.checkpoint import local_folder, looks_merged, resolve
from vllm_ahn.checkpoint.find import split_revision
from vllm_ahn.checkpoint.options import read_config
from vllm_ahn.checkpoint.tensors import PUBLISHED_SIZES, BaseShape
from vllm_ahn.config import NO_MEMORY, AHNConfig
from vllm_ahn.errors import AHNError

BASELINES = {"full": "full attention", "yarn": "full attention, YaRN", "window": "sinks + window"}
"""What needs no AHN checkpoint, and what a table calls it."""

PAPER_NAMES = {"GatedDeltaNet": "GDN", "DeltaNet": "DN", "Mamba2": "Mamba2"}
"""``_ahn_implementation`` -> the paper's row, as in `suites.METHODS`."""

_TEXTS = (".json", ".txt", ".jinja")
_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".gguf")


@dataclasses.dataclass(frozen=True)
class Base:
    """A base model without an AHN."""

    name: str
    """Folder (absolute) or hub repository."""

    revision: str | None
    """The commit of the repository; None for a folder."""

    config: dict[str, Any]
    """Its config.json."""

    files: str
    """Which files it is, from `pinned`."""

    @classmethod
    def find(cls, name: str) -> Base:
        """Find the base `name`: ``FOLDER``, ``REPOSITORY`` or ``REPOSITORY@REVISION``.

        Raises `AHNError` if there is none, or if an AHN is merged in, so that it cannot run with full attention.
        """
        found, files, folder = pinned(name)
        config = read_config(folder, name)
        if looks_merged(argparse.Namespace(**config)):
            raise AHNError(
                f"{name}: has an AHN merged in (_ahn_implementation in its config.json), expected its base as the "
                "model and the AHN alone as --ahn"
            )
        repository, revision = split_revision(found)
        return cls(repository, revision, config, files)

    @property
    def positions(self) -> int:
        """``max_position_embeddings``, tokens."""
        value = self.config.get("max_position_embeddings")
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise AHNError(f"{self.name}: max_position_embeddings is {value!r}, expected a number of tokens")
        return value

    @property
    def size(self) -> str | None:
        """``"7B"`` if the base has the shape of a model in the paper's tables, else None."""
        name = PUBLISHED_SIZES.get(BaseShape.from_config(self.config, self.name))
        return name.rpartition("-")[2] if name else None

    def yarn_factor(self, max_model_len: int) -> int | None:
        """Return the smallest whole factor by which YaRN must stretch the positions; None if they suffice."""
        return None if max_model_len <= self.positions else math.ceil(max_model_len / self.positions)

    def overrides(self, max_model_len: int, yarn: bool = False) -> dict[str, Any]:
        """Return vLLM's ``hf_overrides`` for positions up to `max_model_len` tokens.

        They are true and unscaled, as an AHN is served and as the paper ran full attention, or stretched by YaRN.

        Raises:
            AHNError: the base scales its positions itself, and they do not suffice.
        """
        factor = self.yarn_factor(max_model_len)
        if factor is None:
            return {}
        found = (self.config.get(name) for name in ("rope_parameters", "rope_scaling"))
        rope: Mapping[str, Any] = next((value for value in found if isinstance(value, Mapping)), {})
        kind = rope.get("rope_type", rope.get("type", "default"))
        if kind != "default":
            raise AHNError(
                f"{self.name}: scales its positions itself (rope type {kind!r}) up to {self.positions} tokens, "
                f"expected --max-model-len of at most that instead of {max_model_len}"
            )
        if not yarn:
            return {"max_position_embeddings": max_model_len}
        theta = rope.get("rope_theta", self.config.get("rope_theta"))
        if not isinstance(theta, (int, float)):
            raise AHNError(f"{self.name}: rope_theta is {theta!r} in its config.json, expected a number, for yarn")
        stretched = {"rope_type": "yarn", "rope_theta": theta, "factor": float(factor)}
        return {
            # With YaRN, vLLM and Transformers take this for the stretched length.
            "max_position_embeddings": factor * self.positions,
            "rope_parameters": {**stretched, "original_max_position_embeddings": self.positions},
        }


def pinned(name: str) -> tuple[str, str, Path]:
    """Find out exactly which model `name` is. Raises `AHNError` if there is none.

    Returns:
        its name: the absolute path of a folder, or ``REPOSITORY@COMMIT``;
        its files: the commit, or for a folder a hash of its texts and of the names, sizes and times of its weights;
        the folder with its config.json.
    """
    repository, revision = split_revision(name)
    folder = local_folder(repository, revision, weights=False)
    if not Path(repository).is_dir():
        return f"{repository}@{folder.name}", folder.name, folder
    path = Path(repository).resolve()
    hashed = hashlib.sha256()
    for file in sorted(path.iterdir()):
        if file.suffix in _TEXTS:
            hashed.update(f"{file.name}\n".encode() + file.read_bytes())
        elif file.suffix in _WEIGHTS:
            status = file.stat()
            hashed.update(f"{file.name} {status.st_size} {status.st_mtime_ns}\n".encode())
    return str(path), hashed.hexdigest(), folder


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
    """Which files the checkpoint is, from `pinned`."""

    @property
    def slug(self) -> str:
        """The method in file names."""
        if self.name in BASELINES:
            return self.name
        readable = re.sub(r"[^A-Za-z0-9]+", "-", self.name).strip("-")[-40:]
        return f"ahn-{readable}-{hashlib.sha256(self.name.encode()).hexdigest()[:6]}"

    def config(self, base: Base, window: int, sinks: int) -> AHNConfig | None:
        """Return what is served, checked against the base; None for full attention. Raises `AHNError`."""
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
