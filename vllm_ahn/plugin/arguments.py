"""What vLLM's arguments say about AHN: the flags, and the `AHNConfig` that a request comes to.

``vllm serve BASE --ahn CKPT``, ``LLM(model=BASE, additional_config={"ahn": CKPT})`` and a BASE with the AHN merged in
all come to `resolve`, once in each front end. Its answer is served from a copy of the arguments, in whose
``additional_config["ahn"]`` it reaches every process of vLLM; the user's own arguments keep the request.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import os
import re
from argparse import SUPPRESS, Namespace
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from vllm_ahn import checkpoint
from vllm_ahn.config import (
    DEFAULT_SINKS,
    DEFAULT_WINDOW,
    NO_MEMORY,
    STATE_DTYPES,
    AHNConfig,
    ahn_value,
    parse_length,
)
from vllm_ahn.errors import AHNError, first_line
from vllm_ahn.plugin import limits, overrides

if TYPE_CHECKING:
    from vllm.engine.arg_utils import EngineArgs

FLAG_OF_KEY = {
    "checkpoint": "--ahn",
    "window": "--ahn-window",
    "sinks": "--ahn-sinks",
    "checkpoint_interval": "--ahn-checkpoint-interval",
}
"""Key of ``additional_config["ahn"]`` -> the flag of ``vllm serve`` that means the same."""

DEFAULT_CPU_BLOCK_SIZE = 16
"""Tokens in a block on CPUs, where the user leaves that open. vLLM's 128 would be coarse for prefix caching."""

CHANGED = ("additional_config", "block_size", "hf_overrides")
"""The fields of `EngineArgs` that differ between a user's arguments and the copy that is served."""


@dataclasses.dataclass(frozen=True)
class Resolved:
    """Arguments of vLLM whose request for an AHN, if there is one, is resolved."""

    args: EngineArgs
    """The user's own where there is no AHN, else a copy of them, changed in `CHANGED` only."""

    model: str
    """``args.model`` when it was resolved; vLLM may replace it by another model on the way."""

    config: AHNConfig | None
    """None: there is no AHN."""


def add_flags(parser: Any) -> None:
    """Add the flags of `FLAG_OF_KEY` to an argparse parser, as the group "AHN"."""
    group = parser.add_argument_group(
        title="AHN",
        # `vllm serve --help` shows a group's title and this only, `--help=AHN` the flags as well.
        description="Artificial Hippocampus Networks, a memory of fixed size beyond a window of exact "
        "attention: --ahn CKPT, --ahn-window N, --ahn-sinks N, --ahn-checkpoint-interval N.",
    )
    # No type=int for the lengths: what is not a number gets a one-sentence error like any other bad input.
    # No default either: an absent flag is an absent attribute, and the help says what that means.
    flags = {
        "--ahn": (
            "CKPT[@revision]",
            "AHN checkpoint to serve the model with: a folder, or a Hugging Face repository with an optional "
            f"@revision. Not needed for a model with the AHN merged in. {NO_MEMORY!r}: window and sinks without a "
            "memory, to compare with.",
        ),
        "--ahn-window": (
            "N",
            "Tokens that a query sees exactly: itself and the N - 1 before it. What leaves the window goes "
            f"into the memory. (default: {DEFAULT_WINDOW})",
        ),
        "--ahn-sinks": (
            "N",
            f"Tokens at the start of a sequence that stay visible beside the window. (default: {DEFAULT_SINKS})",
        ),
        "--ahn-checkpoint-interval": (
            "N",
            "With prefix caching, a copy of the memory is left in the cache at every N tokens of a prompt, so that "
            "others which share its beginning can go on there; 0 for its end only. (default: --max-num-batched-tokens)",
        ),
    }
    for flag, (metavar, text) in flags.items():
        group.add_argument(flag, metavar=metavar, default=SUPPRESS, help=text)


def with_flags(
    additional_config: object,
    *,
    checkpoint: object = None,
    window: object = None,
    sinks: object = None,
    checkpoint_interval: object = None,
) -> Any:
    """Return `additional_config` with the values of the flags merged under ``"ahn"``.

    A value of None is a flag that was not given. The argument is not changed. Raises `AHNError` where
    ``additional_config`` says something about the same thing already.
    """
    given = {
        "checkpoint": checkpoint,
        "window": window,
        "sinks": sinks,
        "checkpoint_interval": checkpoint_interval,
    }
    given = {key: value for key, value in given.items() if value is not None}
    if not given:
        return additional_config
    if additional_config is not None and not isinstance(additional_config, Mapping):
        raise AHNError(
            f"additional_config is {additional_config!r}, expected a dict where "
            f"{FLAG_OF_KEY[next(iter(given))]} is given"
        )
    extra = dict(additional_config or {})
    there = extra.get("ahn")
    if there is None:
        there = {}
    elif isinstance(there, str):
        there = {"checkpoint": there}
    elif not isinstance(there, Mapping):
        raise AHNError(f'additional_config["ahn"] is {there!r}, expected a checkpoint or a dict')
    for key in given:
        if key in there:
            raise AHNError(
                f'{FLAG_OF_KEY[key]} is {given[key]!r} and additional_config["ahn"] gives {key} as well: give only one'
            )
    extra["ahn"] = {**there, **given}
    return extra


def resolve(args: EngineArgs) -> Resolved:
    """Resolve the request for an AHN in `args`, which are left as they are.

    Raises:
        AHNError: something is wrong with the checkpoint, the base, the lengths, or another setting.
    """
    _check_keys(args.additional_config)
    request = ahn_value(args.additional_config)
    if request is None and not _is_merged(args):
        return Resolved(args, args.model, None)
    features = limits.RequestedFeatures.from_engine_args(args)
    limits.check(features)
    base_config = _base_config(args)
    config = checkpoint.resolve(
        request,
        base=args.model,
        base_revision=args.revision,
        base_config=base_config,
        weights=features.load_format != "dummy",
        # The AHN's own configuration carries it from here on: vLLM's CPU platform, not knowing this model's state,
        # resets the flag on some CPUs.
        state_dtype=STATE_DTYPES[0] if features.mamba_ssm_cache_dtype == "auto" else features.mamba_ssm_cache_dtype,
    )
    if config is None:
        return Resolved(args, args.model, None)
    requested = parse_length(args.max_model_len)
    changed = overrides.overrides(
        config,
        base_config,
        base=args.model,
        max_model_len=requested if isinstance(requested, int) else None,
    )
    served = copy.copy(args)
    if args.block_size is None and features.device_type == "cpu":
        served.block_size = DEFAULT_CPU_BLOCK_SIZE
    served.additional_config = {**(args.additional_config or {}), "ahn": config.to_dict()}
    if callable(args.hf_overrides):
        served.hf_overrides = overrides.ConfigOverrides(args.hf_overrides, changed)
    else:
        served.hf_overrides = {**(args.hf_overrides or {}), **changed}
    return Resolved(served, args.model, config)


def hand_back(served: EngineArgs, args: EngineArgs) -> None:
    """Write down on the user's `args` what vLLM has decided on the copy, as callers read it from there."""
    for name, value in vars(served).items():
        if name not in CHANGED:
            setattr(args, name, value)


def _check_keys(additional_config: object) -> None:
    """Raise `AHNError` for "ahn" misspelt in `additional_config`: the plain model would be served."""
    for key in additional_config if isinstance(additional_config, Mapping) else ():
        if isinstance(key, str) and key != "ahn" and re.match(r"(vllm)?[-_]*ahn", key, re.IGNORECASE):
            raise AHNError(f'additional_config has the key {key!r}, expected "ahn" with a checkpoint or a dict')


def _base_config(args: EngineArgs) -> Any:
    """Return the base model's Hugging Face config as vLLM would use it, the user's ``hf_overrides`` included."""
    from vllm.transformers_utils.config import get_config
    from vllm.transformers_utils.utils import maybe_model_redirect

    changes = args.hf_overrides
    function: Callable[[Any], Any] | None = changes if callable(changes) else None
    # Nested values concern sub-configurations, and a text model has none.
    flat = {} if callable(changes) else {k: v for k, v in (changes or {}).items() if not isinstance(v, dict)}
    try:
        return get_config(
            maybe_model_redirect(args.hf_config_path or args.model),
            args.trust_remote_code,
            args.revision,
            args.code_revision,
            args.config_format,
            hf_overrides_kw=flat,
            hf_overrides_fn=function,
            token=args.hf_token,
        )
    except Exception as error:
        raise no_base(args.model, error) from error


def _is_merged(args: EngineArgs) -> bool:
    """Return whether the base's config.json says that an AHN is merged in; False where none can be read."""
    from vllm.transformers_utils.repo_utils import get_hf_file_to_dict
    from vllm.transformers_utils.utils import maybe_model_redirect

    # Every model served where this package is installed comes by here, so no more than this one file is
    # looked at, and what is wrong with it is vLLM's to say.
    try:
        model = maybe_model_redirect(args.hf_config_path or args.model)
        if os.path.isdir(model):
            with open(os.path.join(model, "config.json"), encoding="utf-8") as file:
                values = json.load(file)
        else:
            values = get_hf_file_to_dict("config.json", model, args.revision)
    except Exception:
        return False
    return isinstance(values, dict) and checkpoint.looks_merged(Namespace(**values))


def no_base(model: str, error: BaseException) -> AHNError:
    """Return what to say of a base model that cannot be read because of `error`."""
    return AHNError(
        f"{model}: no config.json of a base model can be read there, expected a folder or a Hugging Face "
        f"repository ({first_line(error).rstrip('.: ')})"
    )


def is_about_files(error: BaseException) -> bool:
    """Return whether `error` is one that a model raises which is not there."""
    return isinstance(error, OSError) or type(error).__module__.startswith("huggingface_hub")
