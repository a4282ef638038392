"""Resolves a request for an AHN to an `AHNConfig`, checked against the base it is to extend.

Everything a user can get wrong about checkpoint, base, window and sinks is said here, by `AHNError`, before
vLLM loads anything: of the weights only headers are read, and the values of the AHN's own tensors, one at a
time.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from typing import Any

from vllm_ahn.bases import find_base
from vllm_ahn.checkpoint.check import Checkpoint, read_checkpoint
from vllm_ahn.checkpoint.find import local_folder, split_revision
from vllm_ahn.checkpoint.tensors import BaseShape
from vllm_ahn.config import (
    DEFAULT_SINKS,
    DEFAULT_WINDOW,
    NO_MEMORY,
    STATE_DTYPES,
    AHNConfig,
    is_resolved,
    parse_length,
)
from vllm_ahn.errors import AHNError

LENGTHS = ("window", "sinks", "checkpoint_interval")
"""Keys of a user's request beside ``checkpoint``, all in tokens."""


@dataclasses.dataclass(frozen=True)
class _Request:
    """What a user asked for, not checked yet but for its keys and the checkpoint's name."""

    checkpoint: str | None = None
    revision: str | None = None
    window: Any = None
    sinks: Any = None
    checkpoint_interval: Any = None

    @property
    def label(self) -> str:
        """The checkpoint in messages."""
        return f"{self.checkpoint}@{self.revision}" if self.revision else str(self.checkpoint)

    @property
    def lengths(self) -> dict[str, Any]:
        """W, S and the checkpoints' interval, tokens; `AHNConfig` checks them."""
        return {
            "window": DEFAULT_WINDOW if self.window is None else self.window,
            "sinks": DEFAULT_SINKS if self.sinks is None else self.sinks,
            "checkpoint_interval": self.checkpoint_interval,
        }


def looks_merged(base_config: Any) -> bool:
    """Return whether a base's Hugging Face config says that the checkpoint holds an AHN as well."""
    return getattr(base_config, "_ahn_implementation", None) is not None


def resolve(
    request: object,
    *,
    base: str,
    base_revision: str | None,
    base_config: Any,
    weights: bool = True,
    state_dtype: str = STATE_DTYPES[0],
) -> AHNConfig | None:
    """Return the configuration to serve `base` with, every part of it checked, or None for a base without AHN.

    Args:
        request: ``additional_config["ahn"]``: None, ``"CKPT"``, ``"CKPT@REVISION"``, or a dict with any of
            ``checkpoint`` and `LENGTHS`, where the checkpoint "none" means sinks and window alone; also an
            `AHNConfig.to_dict`, which is checked like any other and must come out as it is. A base whose config has
            ``_ahn_implementation`` is merged and takes no checkpoint but "none".
        base: a folder or hub repository.
        base_revision: of the hub repository `base`.
        base_config: the base's Hugging Face config.
        weights: whether the tensors are looked at; False reads ``config.json`` only.
        state_dtype: one of `STATE_DTYPES`.

    Raises:
        AHNError: one sentence, for everything that cannot be served.
    """
    copied = AHNConfig.from_dict(request) if isinstance(request, Mapping) and is_resolved(request) else None
    config = _resolve(
        _parse(request) if copied is None else _asked_for(copied),
        base=base,
        base_revision=base_revision,
        base_config=base_config,
        weights=weights,
        state_dtype=state_dtype,
    )
    if copied is not None and config != copied:
        raise AHNError(f"ahn: is {copied.to_dict()}, expected {config.to_dict() if config else None} for {base}")
    return config


def _resolve(
    request: _Request | None,
    *,
    base: str,
    base_revision: str | None,
    base_config: Any,
    weights: bool,
    state_dtype: str,
) -> AHNConfig | None:
    merged = looks_merged(base_config)
    if request is None:
        if not merged:
            return None
        request = _Request()
    if request.checkpoint is None and not merged:
        given = [f"--ahn-{name.replace('_', '-')}" for name in LENGTHS if getattr(request, name) is not None]
        if given:
            raise AHNError(
                f"ahn: {' and '.join(given)} without --ahn, expected a checkpoint (--ahn), since {base} has no AHN "
                "of its own"
            )
        raise AHNError(f"{base} has no AHN merged in; pass a checkpoint with --ahn (ahn= in Python)")
    if request.checkpoint == NO_MEMORY:
        find_base(base_config, base)
        return AHNConfig(None, **request.lengths, state_dtype=state_dtype)
    if request.checkpoint is not None and merged:
        raise AHNError(
            f"ahn: {base} has an AHN of its own (_ahn_implementation in its config.json), "
            f"expected no --ahn {request.checkpoint} beside it"
        )
    find_base(base_config, base)
    # The lengths are checked before any file is opened, and the configuration is completed when it was read.
    begun = AHNConfig(None, **request.lengths, state_dtype=state_dtype)
    shape = BaseShape.from_config(base_config, base)
    checkpoint = _merged(base, base_revision, shape, weights) if merged else _separate(request, base, shape, weights)
    return dataclasses.replace(
        begun,
        memory=checkpoint.memory,
        checkpoint=request.checkpoint,
        revision=request.revision,
        use_q_proj=checkpoint.options.use_q_proj,
        use_router=checkpoint.options.use_router,
        full_attention_layers=checkpoint.options.full_attention_layers,
    )


def _parse(request: object) -> _Request | None:
    if request is None:
        return None
    if isinstance(request, (str, os.PathLike)):
        request = {"checkpoint": request}
    if not isinstance(request, Mapping):
        raise AHNError(f"ahn: is {request!r}, expected a checkpoint or a dict with checkpoint, {', '.join(LENGTHS)}")
    unknown = [repr(key) for key in request if key not in ("checkpoint", *LENGTHS)]
    if unknown:
        known = ", ".join(map(repr, ("checkpoint", *LENGTHS)))
        raise AHNError(f"ahn: unknown key {', '.join(unknown)}, expected only {known}")
    checkpoint, revision = request.get("checkpoint"), None
    if isinstance(checkpoint, os.PathLike):
        checkpoint = os.fspath(checkpoint)
    if checkpoint is not None:
        if not isinstance(checkpoint, str) or not checkpoint.strip():
            raise AHNError(f"ahn: checkpoint is {checkpoint!r}, expected a folder or a hub repository")
        checkpoint, revision = split_revision(checkpoint)
    return _Request(checkpoint, revision, *(parse_length(request.get(name)) for name in LENGTHS))


def _asked_for(config: AHNConfig) -> _Request:
    """Return the request that `config`, say out of a log, would be the answer to."""
    checkpoint = NO_MEMORY if config.memory is None else config.checkpoint
    return _Request(checkpoint, config.revision, config.window, config.sinks, config.checkpoint_interval)


def _separate(request: _Request, base: str, shape: BaseShape, weights: bool) -> Checkpoint:
    assert request.checkpoint is not None
    folder = local_folder(request.checkpoint, request.revision, weights)
    checkpoint = read_checkpoint(folder, request.label, base=(base, shape), weights=weights)
    if checkpoint.merged:
        raise AHNError(
            f"{request.label}: holds a whole base model beside its AHN (a merged checkpoint), "
            "expected it as the model to serve, without --ahn"
        )
    return checkpoint


def _merged(base: str, revision: str | None, shape: BaseShape, weights: bool) -> Checkpoint:
    folder = local_folder(base, revision, weights)
    checkpoint = read_checkpoint(folder, base, base=(base, shape), weights=weights)
    if weights and not checkpoint.merged:
        raise AHNError(
            f"{base}: holds an AHN but no base model (no model.embed_tokens.weight), "
            f"expected the base as the model to serve, and --ahn {base}"
        )
    return checkpoint
