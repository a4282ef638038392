"""All that is replaced in vLLM: the flags, and the one place through which every way to ask for an AHN passes.

``vllm serve BASE --ahn CKPT``, ``LLM(model=BASE, additional_config={"ahn": CKPT})`` and a BASE with the AHN
merged in all come to `EngineArgs.create_model_config`. There the wish is resolved to an `AHNConfig`, which
takes its place in ``additional_config["ahn"]`` and so reaches every process of vLLM, and the model's
configuration is changed to fit.
"""

from __future__ import annotations

import copy
import json
import os
import sys
from argparse import SUPPRESS, Namespace
from collections.abc import Callable
from functools import wraps
from typing import TYPE_CHECKING, Any, NoReturn

from vllm_ahn import checkpoint
from vllm_ahn.config import DEFAULT_SINKS, DEFAULT_WINDOW, NO_MEMORY, AHNConfig, parse_length
from vllm_ahn.errors import AHNError
from vllm_ahn.plugin import features, lora, overrides, setting

if TYPE_CHECKING:
    from vllm.config import ModelConfig, VllmConfig
    from vllm.engine.arg_utils import EngineArgs

_PATCHED = "_ahn_patched"
_COMMAND_LINE = "_ahn_command_line"
"""Set on arguments that came from a command line, where bad input ends the program with a sentence."""


def patch() -> None:
    """Patches `EngineArgs` in this process, once."""
    from vllm.engine.arg_utils import EngineArgs

    if getattr(EngineArgs, _PATCHED, False):
        return
    _patch_flags(EngineArgs)
    _patch_from_cli_args(EngineArgs)
    _patch_create_model_config(EngineArgs)
    _patch_create_engine_config(EngineArgs)
    setattr(EngineArgs, _PATCHED, True)


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
    features.
    """
    setting.check_keys(args.additional_config)
    wish = features.ahn_setting(args.additional_config)
    if wish is None and not _is_merged(args):
        return None
    features.check(features.Wanted.from_engine_args(args))
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
        state_dtype=features.state_dtype(args.mamba_ssm_cache_dtype),
    )
    if config is None:
        return None
    args.additional_config = {**(args.additional_config or {}), "ahn": config.to_dict()}
    return config, base_config


def _patch_flags(engine_args: type[EngineArgs]) -> None:
    # vLLM loads general plugins right before it adds the engine's flags to a parser, but asks them for none.
    original = engine_args.add_cli_args

    @wraps(original)
    def add_cli_args(parser: Any) -> Any:
        parser = original(parser)
        add_flags(parser)
        return parser

    engine_args.add_cli_args = staticmethod(add_cli_args)


def _patch_from_cli_args(engine_args: type[EngineArgs]) -> None:
    # Only fields of the dataclass are taken over from the command line, so the flags would be dropped here.
    # And this is the last place that knows of a command line: later, bad input would be a traceback around a
    # sentence.
    original = engine_args.from_cli_args.__func__

    @wraps(original)
    def from_cli_args(cls: type[EngineArgs], args: Namespace) -> EngineArgs:
        try:
            flags = {
                "checkpoint": getattr(args, "ahn", None),
                "window": parse_length(getattr(args, "ahn_window", None)),
                "sinks": parse_length(getattr(args, "ahn_sinks", None)),
            }
            extra = getattr(args, "additional_config", None)
            merged = setting.with_flags(extra, **flags)
            if merged is not extra:
                # A copy: API servers are started from the same namespace again.
                args = Namespace(**{**vars(args), "additional_config": merged})
            try:
                result = original(cls, args)
            except Exception as error:
                # With HF_HUB_OFFLINE, vLLM looks for the base model here already.
                if features.ahn_setting(merged) is None or not _is_about_files(error):
                    raise
                raise _no_base(args.model, error) from error
            setattr(result, _COMMAND_LINE, True)
            resolve(result)
        except AHNError as error:
            _exit(error)
        return result

    engine_args.from_cli_args = classmethod(from_cli_args)


def _patch_create_model_config(engine_args: type[EngineArgs]) -> None:
    # vLLM's hook on model configurations is found by the architecture, which is what has to be chosen here,
    # and runs after the lengths have been decided.
    original = engine_args.create_model_config

    @wraps(original)
    def create_model_config(self: EngineArgs) -> ModelConfig:
        from vllm.logger import init_logger

        resolved = resolve(self)
        if resolved is None:
            return original(self)
        config, base_config = resolved
        requested = parse_length(self.max_model_len)
        changed = overrides.overrides(
            config,
            base_config,
            base=self.model,
            max_model_len=requested if isinstance(requested, int) else None,
        )
        # On a copy, so that the base's own configuration is still there to be read when this is called again.
        served = copy.copy(self)
        if callable(self.hf_overrides):
            served.hf_overrides = overrides.ConfigOverrides(self.hf_overrides, changed)
        else:
            served.hf_overrides = {**(self.hf_overrides or {}), **changed}
        model_config = original(served)
        logger = init_logger("vllm.ahn")  # below "vllm", so that it is shown like vLLM's own messages
        logger.info_once("AHN: %s", config.describe(self.model))
        warning = overrides.unused_memory(config, model_config.max_model_len)
        if warning is not None:
            logger.warning_once(warning)
        return model_config

    engine_args.create_model_config = create_model_config


def _patch_create_engine_config(engine_args: type[EngineArgs]) -> None:
    # vLLM's hook on whole configurations (features.install) is called inside a validator, which wraps what is
    # raised in a report on every field; and what happens after the hook can still turn off what AHN needs.
    original = engine_args.create_engine_config

    @wraps(original)
    def create_engine_config(self: EngineArgs, *args: Any, **kwargs: Any) -> VllmConfig:
        try:
            config = original(self, *args, **kwargs)
            if features.is_resolved(features.ahn_setting(config.additional_config)):
                features.check_config(config)
                if config.lora_config is not None:
                    lora.guard_requests()
        except Exception as error:
            ours = _ahn_error(error)
            if ours is None:
                raise
            if getattr(self, _COMMAND_LINE, False):
                _exit(ours)
            raise ours from None
        return config

    engine_args.create_engine_config = create_engine_config


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
        raise _no_base(args.model, error) from error


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


def _ahn_error(error: BaseException) -> AHNError | None:
    """The `AHNError` that `error` is, or that pydantic has wrapped in it."""
    if isinstance(error, AHNError):
        return error
    errors = getattr(error, "errors", None)
    if type(error).__name__ == "ValidationError" and callable(errors):
        for entry in errors():
            inner = entry.get("ctx", {}).get("error")
            if isinstance(inner, AHNError):
                return inner
    return None


def _no_base(model: str, error: BaseException) -> AHNError:
    first_line = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".: ")
    return AHNError(
        f"{model}: no config.json of a base model can be read there, expected a folder or a Hugging Face "
        f"repository ({first_line})"
    )


def _is_about_files(error: BaseException) -> bool:
    return isinstance(error, OSError) or type(error).__module__.startswith("huggingface_hub")


def _exit(error: AHNError) -> NoReturn:
    sys.exit(f"error: {error}")
