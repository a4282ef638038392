"""The base model under evaluation: what its config.json says, and which files exactly it is."""

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

_READ_WHOLE = (".json", ".txt", ".jinja")
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
    """`fingerprint` of it."""

    @classmethod
    def find(cls, name: str) -> Base:
        """The base `name`, ``FOLDER``, ``REPOSITORY`` or ``REPOSITORY@REVISION``.

        Raises `AHNError` if there is none, and for a model that has an AHN merged in: full attention cannot be had
        of it.
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
    def hf_config(self) -> Any:
        """The config.json as an object with attributes."""
        return argparse.Namespace(**self.config)

    @property
    def positions(self) -> int:
        """Tokens that the base was made for, ``max_position_embeddings``."""
        value = self.config.get("max_position_embeddings")
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise AHNError(f"{self.name}: max_position_embeddings is {value!r}, expected a number of tokens")
        return value

    @property
    def size(self) -> str | None:
        """``"7B"`` if the base has the shape of a model in the paper's tables, else None."""
        name = PUBLISHED_SIZES.get(BaseShape.from_config(self.config, self.name))
        return name.rpartition("-")[2] if name else None

    def unscaled(self, max_model_len: int) -> dict[str, Any]:
        """vLLM's ``hf_overrides`` for true, unscaled positions up to `max_model_len` tokens.

        It is how an AHN is served, and how the paper ran full attention. Raises `AHNError` if the base scales
        positions itself and they end before.
        """
        if max_model_len <= self.positions:
            return {}
        self._check_unscaled(max_model_len)
        return {"max_position_embeddings": max_model_len}

    def yarn_factor(self, max_model_len: int) -> int | None:
        """The factor by which YaRN has to stretch the base's positions, the least whole one; None: not at all."""
        return None if max_model_len <= self.positions else math.ceil(max_model_len / self.positions)

    def yarn(self, max_model_len: int) -> dict[str, Any]:
        """vLLM's ``hf_overrides`` for YaRN up to `max_model_len` tokens; raises `AHNError` as `unscaled` does."""
        factor = self.yarn_factor(max_model_len)
        if factor is None:
            return {}
        self._check_unscaled(max_model_len)
        theta = self._rope().get("rope_theta", self.config.get("rope_theta"))
        if not isinstance(theta, (int, float)):
            raise AHNError(f"{self.name}: rope_theta is {theta!r} in its config.json, expected a number, for yarn")
        return {
            # With YaRN, vLLM and Transformers take this for the stretched length.
            "max_position_embeddings": factor * self.positions,
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": theta,
                "factor": float(factor),
                "original_max_position_embeddings": self.positions,
            },
        }

    def _rope(self) -> Mapping[str, Any]:
        for name in ("rope_parameters", "rope_scaling"):
            if isinstance(found := self.config.get(name), Mapping):
                return found
        return {}

    def _check_unscaled(self, max_model_len: int) -> None:
        rope = self._rope()
        kind = rope.get("rope_type", rope.get("type", "default"))
        if kind != "default":
            raise AHNError(
                f"{self.name}: scales its positions itself (rope type {kind!r}) up to {self.positions} tokens, "
                f"expected --max-model-len of at most that instead of {max_model_len}"
            )


def pinned(name: str) -> tuple[str, str, Path]:
    """Which model exactly `name` is, now and when it is asked for again.

    Returns:
        its name: the absolute path of a folder, ``REPOSITORY@COMMIT`` of a repository;
        what its files are: the commit, or for a folder a hash of its texts and of the names, sizes and times of its
        weights, so that other weights in the same place are another model;
        the folder with its config.json.

    Raises `AHNError` if there is no such model.
    """
    repository, revision = split_revision(name)
    folder = local_folder(repository, revision, weights=False)
    if Path(repository).is_dir():
        path = Path(repository).resolve()
        return str(path), _hash_files(path), folder
    return f"{repository}@{folder.name}", folder.name, folder


def _hash_files(folder: Path) -> str:
    hashed = hashlib.sha256()
    for path in sorted(folder.iterdir()):
        if path.suffix in _READ_WHOLE:
            hashed.update(f"{path.name}\n".encode() + path.read_bytes())
        elif path.suffix in _WEIGHTS:
            status = path.stat()
            hashed.update(f"{path.name} {status.st_size} {status.st_mtime_ns}\n".encode())
    return hashed.hexdigest()
