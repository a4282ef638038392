"""What vLLM's arguments say about AHN: the flags, and the `AHNConfig` that a user's wish comes to.

``vllm serve BASE --ahn CKPT``, ``LLM(model=BASE, additional_config={"ahn": CKPT})`` and a BASE with the AHN
merged in all come to `resolve`. The answer takes its place in ``additional_config["ahn"]`` and so reaches every
process of vLLM.
"""

from __future__ import annotations

import json
import os
from argparse import SUPPRESS, Namespace
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from vllm_ahn import checkpoint
from vllm_ahn.config import DEFAULT_SINKS, DEFAULT_WINDOW, NO_MEMORY, AHNConfig
from vllm_ahn.errors import AHNError
from vllm_ahn.plugin import limits, overrides, setting
from vllm_ahn.plugin.wanted import Wanted

if TYPE_CHECKING:
    from vllm.engine.arg_utils import EngineArgs


def add_flags(parser: Any) -> None:
    """Adds ``--ahn``, ``--ahn-window`` and ``--ahn-sinks`` to an argparse parser, as the group "AHN"."""
    group = parser.add_argument_group(
        title="AHN",
        # `vllm serve --help` shows a group's title and this only, `--help=AHN` the flags as well.
        description="Artificial Hippocampus Networks, a memory of fixed size beyond a window of exact "
        "attention: --ahn CKPT, --ahn-window N, --ahn-sinks N.",
    )
    # No type=int for the lengths: what is not a number is answered like any other bad input, by one sentence.
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
    }
    for flag, (metavar, text) in flags.items():
        group.add_argument(flag, metavar=metavar, default=SUPPRESS, help=text)


def resolve(args: EngineArgs) -> tuple[AHNConfig, Any] | None:
    """The AHN that `args` ask for and the base's Hugging Face config, or None where there is no AHN at all.

    On return ``args.additional_config["ahn"]`` is the resolved configuration. May be called again on the same
    arguments. Raises `AHNError` for whatever is wrong with the checkpoint, the base, the lengths, or the
    limits.
    """
    setting.check_keys(args.additional_config)
    wish = setting.ahn_setting(args.additional_config)
    if wish is None and not _is_merged(args):
        return None
    limits.check(Wanted.from_engine_args(args))
    base_config = _base_config(args)
    overrides.ahn_architecture(base_config, args.model)
    if wish == {} and not checkpoint.looks_merged(base_config):
        raise AHNError(f"{args.model}: there is no AHN in this model, expected an AHN checkpoint too (--ahn, ahn=)")
    config = checkpoint.resolve(
        wish,
        base=args.model,
        base_revision=args.revision,
        base_config=base_config,
        load_format=str(args.load_format),
        state_dtype=limits.state_dtype(args.mamba_ssm_cache_dtype),
    )
    if config is None:
        return None
    args.additional_config = {**(args.additional_config or {}), "ahn": config.to_dict()}
    return config, base_config


def _base_config(args: EngineArgs) -> Any:
    """The base model's Hugging Face config as vLLM would use it, the user's ``hf_overrides`` included."""
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
    """Whether the base's config.json says that an AHN is merged in; False where none can be read."""
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
    first_line = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".: ")
    return AHNError(
        f"{model}: no config.json of a base model can be read there, expected a folder or a Hugging Face "
        f"repository ({first_line})"
    )


def is_about_files(error: BaseException) -> bool:
    return isinstance(error, OSError) or type(error).__module__.startswith("huggingface_hub")
