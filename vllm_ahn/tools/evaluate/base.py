"""The base model under evaluation: what its config.json says, and exactly which files it is."""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vllm_ahn.checkpoint import local_folder, looks_merged
from vllm_ahn.checkpoint.find import split_revision
from vllm_ahn.checkpoint.options import read_config
from vllm_ahn.checkpoint.tensors import PUBLISHED_SIZES, BaseShape
from vllm_ahn.errors import AHNError

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

        Raises:
            AHNError: there is none, or it has an AHN merged in, so it cannot run with full attention.
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

    def unscaled(self, max_model_len: int) -> dict[str, Any]:
        """Return vLLM's ``hf_overrides`` for true, unscaled positions up to `max_model_len` tokens.

        An AHN is served so, and the paper ran full attention so.

        Raises:
            AHNError: `max_model_len` is beyond the positions of a base that scales them itself.
        """
        if self.yarn_factor(max_model_len) is None:
            return {}
        self._rope()
        return {"max_position_embeddings": max_model_len}

    def yarn(self, max_model_len: int) -> dict[str, Any]:
        """Return vLLM's ``hf_overrides`` for YaRN up to `max_model_len` tokens. Raises as `unscaled` does."""
        factor = self.yarn_factor(max_model_len)
        if factor is None:
            return {}
        theta = self._rope().get("rope_theta", self.config.get("rope_theta"))
        if not isinstance(theta, (int, float)):
            raise AHNError(f"{self.name}: rope_theta is {theta!r} in its config.json, expected a number, for yarn")
        rope = {"rope_type": "yarn", "rope_theta": theta, "factor": float(factor)}
        return {
            # With YaRN, vLLM and Transformers take this for the stretched length.
            "max_position_embeddings": factor * self.positions,
            "rope_parameters": {**rope, "original_max_position_embeddings": self.positions},
        }

    def _rope(self) -> Mapping[str, Any]:
        """Return the config's rope parameters. Raises `AHNError` if they scale positions."""
        found = (self.config.get(name) for name in ("rope_parameters", "rope_scaling"))
        rope: Mapping[str, Any] = next((value for value in found if isinstance(value, Mapping)), {})
        kind = rope.get("rope_type", rope.get("type", "default"))
        if kind != "default":
            raise AHNError(
                f"{self.name}: scales its positions itself (rope type {kind!r}) up to {self.positions} tokens, "
                "expected --max-model-len of at most that"
            )
        return rope


def pinned(name: str) -> tuple[str, str, Path]:
    """Find out which model exactly `name` is, so that the same model is found again later.

    Returns:
        its name: the absolute path of a folder, or ``REPOSITORY@COMMIT``;
        its files: the commit, or for a folder a hash of its texts and of the names, sizes and times of its weights, so
        that other weights in the same place are another model;
        the folder with its config.json.

    Raises:
        AHNError: there is no such model.
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
