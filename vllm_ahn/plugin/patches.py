"""All that is replaced in vLLM, each with the reason why no hook of vLLM's serves.

Every way to ask for an AHN passes through `EngineArgs.create_model_config`: there the wish is resolved, and the model's
configuration is changed to fit.
"""

from __future__ import annotations

import copy
import sys
from argparse import Namespace
from functools import wraps
from typing import TYPE_CHECKING, Any, NoReturn

from vllm_ahn.config import parse_length
from vllm_ahn.errors import AHNError
from vllm_ahn.plugin import arguments, limits, lora, overrides, setting

if TYPE_CHECKING:
    from vllm.config import ModelConfig, VllmConfig
    from vllm.engine.arg_utils import EngineArgs
    from vllm.lora.request import LoRARequest

_PATCHED = "_ahn_patched"
_COMMAND_LINE = "_ahn_command_line"
"""Set on arguments that came from a command line, where bad input ends the program with a sentence."""


def patch_arguments() -> None:
    """Patches `EngineArgs` in this process, once."""
    from vllm.engine.arg_utils import EngineArgs

    if getattr(EngineArgs, _PATCHED, False):
        return
    _patch_flags(EngineArgs)
    _patch_from_cli_args(EngineArgs)
    _patch_create_model_config(EngineArgs)
    _patch_create_engine_config(EngineArgs)
    setattr(EngineArgs, _PATCHED, True)


def _patch_flags(engine_args: type[EngineArgs]) -> None:
    # vLLM loads general plugins right before it adds the engine's flags to a parser, but asks them for none.
    original = engine_args.add_cli_args

    @wraps(original)
    def add_cli_args(parser: Any) -> Any:
        parser = original(parser)
        arguments.add_flags(parser)
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
                if setting.ahn_setting(merged) is None or not arguments.is_about_files(error):
                    raise
                raise arguments.no_base(args.model, error) from error
            setattr(result, _COMMAND_LINE, True)
            arguments.resolve(result)
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

        resolved = arguments.resolve(self)
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
    # vLLM's hook on whole configurations (limits.install) is called inside a validator, which wraps what is
    # raised in a report on every field; and what happens after the hook can still turn off what AHN needs.
    original = engine_args.create_engine_config

    @wraps(original)
    def create_engine_config(self: EngineArgs, *args: Any, **kwargs: Any) -> VllmConfig:
        try:
            config = original(self, *args, **kwargs)
            if setting.is_resolved(setting.ahn_setting(config.additional_config)):
                limits.check_config(config)
                if config.lora_config is not None:
                    _patch_lora_requests()
        except Exception as error:
            ours = _ahn_error(error)
            if ours is None:
                raise
            if getattr(self, _COMMAND_LINE, False):
                _exit(ours)
            raise ours from None
        return config

    engine_args.create_engine_config = create_engine_config


def patch_lora_workers() -> None:
    """Has this process, a worker, check every adapter that is loaded into an AHN model. May be called again."""
    # Adapters come with requests, flags and over HTTP, and vLLM asks no plugin and no model about their tensors.
    from vllm.lora.utils import get_adapter_absolute_path
    from vllm.lora.worker_manager import WorkerLoRAManager

    if hasattr(WorkerLoRAManager, _PATCHED):
        return
    original = WorkerLoRAManager._load_adapter

    @wraps(original)
    def _load_adapter(self: Any, lora_request: LoRARequest) -> Any:
        if getattr(self._adapter_manager.model, "has_ahn", False):
            lora.check_adapter(get_adapter_absolute_path(lora_request.lora_path))
        return original(self, lora_request)

    WorkerLoRAManager._load_adapter = _load_adapter
    setattr(WorkerLoRAManager, _PATCHED, True)


def _patch_lora_requests() -> None:
    # A worker that raises takes the engine down with it, so a request's adapter is looked at before it is sent there.
    from vllm.v1.engine.input_processor import InputProcessor

    if hasattr(InputProcessor, _PATCHED):
        return
    original = InputProcessor._validate_lora

    @wraps(original)
    def _validate_lora(self: Any, lora_request: LoRARequest | None) -> None:
        original(self, lora_request)
        if lora_request is not None and setting.is_resolved(setting.ahn_setting(self.vllm_config.additional_config)):
            lora.check_local_adapter(lora_request.lora_path)

    InputProcessor._validate_lora = _validate_lora
    setattr(InputProcessor, _PATCHED, True)


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


def _exit(error: AHNError) -> NoReturn:
    sys.exit(f"error: {error}")
