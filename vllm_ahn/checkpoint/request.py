"""Resolves what a user asked for to an `AHNConfig`, checked against the base it is to extend.

Everything a user can get wrong about checkpoint, base, window and sinks is said here, by `AHNError`, before
vLLM loads anything: of the weights only headers are read, and the values of the AHN's own tensors, one at a
time.
"""

from __future__ import annotations

import dataclasses
import json
import os
import pathlib
from collections.abc import Mapping
from typing import Any

from vllm_ahn.checkpoint.check import Checkpoint, read_checkpoint
from vllm_ahn.checkpoint.find import local_folder, split_revision
from vllm_ahn.checkpoint.options import read_config, read_memory
from vllm_ahn.checkpoint.tensors import BaseShape
from vllm_ahn.config import (
    DEFAULT_SINKS,
    DEFAULT_WINDOW,
    NO_MEMORY,
    STATE_DTYPES,
    AHNConfig,
    check_sinks,
    check_window,
    parse_length,
)
from vllm_ahn.errors import AHNError
from vllm_ahn.models import AHN_ARCHITECTURES

LOAD_FORMATS = ("auto", "hf", "safetensors", "fastsafetensors", "instanttensor", "dummy")
"""vLLM's load formats that can read an AHN beside the base: those whose loader goes on to a model's
``secondary_weights`` and reads safetensors there, and ``dummy``, which reads no weights at all."""

# What `resolve` answered in this process: checked once, not at every step of the start.
_RESOLVED: set[str] = set()


@dataclasses.dataclass(frozen=True)
class _Request:
    checkpoint: str | None
    revision: str | None
    window: int | None
    sinks: int | None
    state_dtype: str = STATE_DTYPES[0]

    @property
    def no_memory(self) -> bool:
        return self.checkpoint == NO_MEMORY


def looks_merged(base_config: Any) -> bool:
    """Whether a base's Hugging Face config says that the checkpoint holds an AHN as well."""
    return getattr(base_config, "_ahn_implementation", None) is not None


def resolve(
    setting: object,
    *,
    base: str,
    base_revision: str | None,
    base_config: Any,
    load_format: str = "auto",
    state_dtype: str = STATE_DTYPES[0],
) -> AHNConfig | None:
    """The configuration to serve `base` with, every part of it checked, or None for a base without AHN.

    `setting` is ``additional_config["ahn"]``: None, ``"CKPT"``, ``"CKPT@REVISION"``, or a dict with any of
    ``checkpoint``, ``window`` and ``sinks``, where the checkpoint "none" means sinks and window alone; also
    the dict that `AHNConfig.to_dict` made of an earlier answer, which gives that answer again. `base` is a
    folder or hub repository, `base_config` its Hugging Face config, `load_format` vLLM's, `state_dtype` one of
    `STATE_DTYPES`. A base whose config has ``_ahn_implementation`` is merged and takes no checkpoint but "none".

    Raises `AHNError`, one sentence, for everything that cannot be served.
    """
    if isinstance(setting, Mapping) and {"memory", "window", "sinks"} <= setting.keys():
        return _resolve_again(AHNConfig.from_dict(setting), base, base_revision, base_config, load_format, state_dtype)
    request = _parse_setting(setting)
    merged = looks_merged(base_config)
    if request is None:
        if not merged:
            return None
        request = _Request(None, None, None, None)
    request = dataclasses.replace(request, state_dtype=state_dtype)
    if request.checkpoint is None and not merged:
        given = [f"--ahn-{name}" for name in ("window", "sinks") if getattr(request, name) is not None]
        what = f"{' and '.join(given)} without --ahn" if given else "no checkpoint in the setting"
        raise AHNError(f"ahn: {what}, expected a checkpoint (--ahn), since {base} has no AHN of its own")
    if request.checkpoint is not None and merged and not request.no_memory:
        raise AHNError(
            f"ahn: {base} has an AHN of its own (_ahn_implementation in its config.json), "
            f"expected no --ahn {request.checkpoint} beside it"
        )
    _check_base(base, base_config)
    if request.no_memory:
        config = AHNConfig(None, *_lengths(request))
    elif merged:
        config = _resolve_merged(request, base, base_revision, base_config, load_format)
    else:
        config = _resolve_second(request, base, base_config, load_format)
    _RESOLVED.add(_key(config, base, base_revision, load_format))
    return config


def _parse_setting(setting: object) -> _Request | None:
    if setting is None:
        return None
    if isinstance(setting, (str, os.PathLike)):
        setting = {"checkpoint": setting}
    if not isinstance(setting, Mapping):
        raise AHNError(f"ahn: is {setting!r}, expected a checkpoint or a dict with checkpoint, window and sinks")
    unknown = [repr(key) for key in setting if key not in ("checkpoint", "window", "sinks")]
    if unknown:
        raise AHNError(f"ahn: unknown key {', '.join(unknown)}, expected only 'checkpoint', 'window' and 'sinks'")
    checkpoint, revision = setting.get("checkpoint"), None
    if isinstance(checkpoint, os.PathLike):
        checkpoint = os.fspath(checkpoint)
    if checkpoint is not None:
        if not isinstance(checkpoint, str) or not checkpoint.strip():
            raise AHNError(f"ahn: checkpoint is {checkpoint!r}, expected a folder or a hub repository")
        checkpoint, revision = split_revision(checkpoint)
    window, sinks = (parse_length(setting.get(name)) for name in ("window", "sinks"))
    return _Request(
        checkpoint,
        revision,
        None if window is None else check_window(window),
        None if sinks is None else check_sinks(sinks),
    )


def _resolve_again(
    config: AHNConfig, base: str, base_revision: str | None, base_config: Any, load_format: str, state_dtype: str
) -> AHNConfig:
    # A process resolves several times on its way to an engine. What it resolved itself stands; a dict from
    # elsewhere, say copied out of a log, may be for another base and is checked like any other setting.
    if config.state_dtype == state_dtype and _key(config, base, base_revision, load_format) in _RESOLVED:
        return config
    setting: dict[str, object] = {"window": config.window, "sinks": config.sinks}
    if config.memory is None:
        setting["checkpoint"] = NO_MEMORY
    elif config.checkpoint is not None:
        setting["checkpoint"] = f"{config.checkpoint}@{config.revision}" if config.revision else config.checkpoint
    found = resolve(
        setting,
        base=base,
        base_revision=base_revision,
        base_config=base_config,
        load_format=load_format,
        state_dtype=state_dtype,
    )
    if found != config:
        raise AHNError(f"ahn: is {config.to_dict()}, expected {found.to_dict() if found else None} for {base}")
    return config


def _key(config: AHNConfig, base: str, base_revision: str | None, load_format: str) -> str:
    return json.dumps([config.to_dict(), base, base_revision, load_format])


def _check_base(base: str, base_config: Any) -> None:
    architectures = list(getattr(base_config, "architectures", None) or [])
    # The second name of a pair is what a base's config says once it was told to load with AHN.
    if not {*AHN_ARCHITECTURES, *AHN_ARCHITECTURES.values()}.intersection(architectures):
        named = ", ".join(architectures) or "not named in its config.json"
        raise AHNError(
            f"{base}: architecture is {named}, expected one that AHN supports: {', '.join(AHN_ARCHITECTURES)}"
        )


def _resolve_second(request: _Request, base: str, base_config: Any, load_format: str) -> AHNConfig:
    assert request.checkpoint is not None
    if load_format not in LOAD_FORMATS:
        raise AHNError(
            f"ahn: --load-format {load_format} does not read a second checkpoint beside {base}, "
            f"expected one of {', '.join(LOAD_FORMATS)}, or a merged checkpoint"
        )
    label = f"{request.checkpoint}@{request.revision}" if request.revision else request.checkpoint
    weights = load_format != "dummy"
    folder = local_folder(request.checkpoint, request.revision, weights)
    _check_fit(folder, label, base, base_config)
    checkpoint = read_checkpoint(folder, label, weights=weights)
    if checkpoint.merged:
        raise AHNError(
            f"{label}: holds a whole base model beside its AHN (a merged checkpoint), "
            "expected it as the model to serve, without --ahn"
        )
    return _config(request, checkpoint)


def _resolve_merged(
    request: _Request, base: str, base_revision: str | None, base_config: Any, load_format: str
) -> AHNConfig:
    weights = load_format != "dummy"
    folder = local_folder(base, base_revision, weights)
    _check_fit(folder, base, base, base_config)
    checkpoint = read_checkpoint(folder, base, weights=weights)
    if weights and not checkpoint.merged:
        raise AHNError(
            f"{base}: holds an AHN but no base model (no model.embed_tokens.weight), "
            f"expected the base as the model to serve, and --ahn {base}"
        )
    return _config(request, checkpoint)


def _lengths(request: _Request) -> tuple[int, int]:
    """W and S, tokens."""
    return (
        DEFAULT_WINDOW if request.window is None else request.window,
        DEFAULT_SINKS if request.sinks is None else request.sinks,
    )


def _config(request: _Request, checkpoint: Checkpoint) -> AHNConfig:
    window, sinks = _lengths(request)
    return AHNConfig(
        memory=checkpoint.memory,
        window=window,
        sinks=sinks,
        checkpoint=request.checkpoint,
        revision=request.revision,
        use_q_proj=checkpoint.options.use_q_proj,
        use_router=checkpoint.options.use_router,
        full_attention_layers=checkpoint.options.full_attention_layers,
        state_dtype=request.state_dtype,
    )


def _check_fit(folder: pathlib.Path, label: str, base: str, base_config: Any) -> None:
    # Before the tensors: with another base's AHN every one of them differs, and the config says best why.
    config = read_config(folder, label)
    read_memory(config, f"{label}/config.json")
    ours = dataclasses.asdict(BaseShape.from_config(config, f"{label}/config.json"))
    theirs = dataclasses.asdict(BaseShape.from_config(base_config, base))
    different = [f"{name} is {ours[name]}, expected {theirs[name]}" for name in ours if ours[name] != theirs[name]]
    if different:
        raise AHNError(f"{label}/config.json: this AHN was made for another base than {base}: {', '.join(different)}")
