"""Every patch of vLLM, with the reason no hook would do.

A process that asks for no AHN has only those of `EngineArgs`, which must be there before the arguments are read, and
they pass everything on. Every way to ask for an AHN passes through `create_engine_config`, or through
`create_model_config` alone; there the request is resolved.
"""

from __future__ import annotations

import contextlib
import sys
from argparse import Namespace
from collections.abc import Iterator
from contextvars import ContextVar
from functools import wraps
from types import TracebackType
from typing import TYPE_CHECKING, Any

from vllm_ahn.config import ahn_value, is_resolved
from vllm_ahn.errors import AHNError
from vllm_ahn.plugin import arguments, limits, lora, overrides

if TYPE_CHECKING:
    from vllm.config import ModelConfig, VllmConfig
    from vllm.engine.arg_utils import EngineArgs
    from vllm.lora.request import LoRARequest

_PATCHED = "_ahn_patched"

_resolved: ContextVar[arguments.Resolved | None] = ContextVar("_resolved", default=None)
"""What `create_engine_config` has resolved, while vLLM asks for the model's configuration in the midst of it."""

_is_command = False
"""Whether this process has read a command line of vLLM's."""


def patch_arguments() -> None:
    """Patch `EngineArgs` in this process, once."""
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
    original = engine_args.from_cli_args.__func__

    @wraps(original)
    def from_cli_args(cls: type[EngineArgs], args: Namespace) -> EngineArgs:
        global _is_command
        _is_command = True
        with _one_sentence():
            extra = getattr(args, "additional_config", None)
            merged = arguments.with_flags(
                extra,
                checkpoint=getattr(args, "ahn", None),
                window=getattr(args, "ahn_window", None),
                sinks=getattr(args, "ahn_sinks", None),
                checkpoint_interval=getattr(args, "ahn_checkpoint_interval", None),
            )
            if merged is not extra:
                # A copy: API servers are started from the same namespace again.
                args = Namespace(**{**vars(args), "additional_config": merged})
            try:
                return original(cls, args)
            except Exception as error:
                # With HF_HUB_OFFLINE, vLLM looks for the base model here already.
                if ahn_value(merged) is None or not arguments.is_about_files(error):
                    raise
                raise arguments.no_base(args.model, error) from error

    engine_args.from_cli_args = classmethod(from_cli_args)


def _patch_create_model_config(engine_args: type[EngineArgs]) -> None:
    # vLLM's hook on model configurations is found by the architecture, which is what has to be chosen here, and runs
    # after the lengths have been decided.
    original = engine_args.create_model_config

    @wraps(original)
    def create_model_config(self: EngineArgs) -> ModelConfig:
        with _one_sentence():
            resolved = _resolved.get()
            if resolved is None or resolved.args is not self or resolved.model != self.model:
                resolved = arguments.resolve(self)
            model_config = original(resolved.args)
            if resolved.config is not None:
                _announce(resolved, model_config)
        return model_config

    engine_args.create_model_config = create_model_config


def _announce(resolved: arguments.Resolved, model_config: ModelConfig) -> None:
    from vllm.logger import init_logger

    assert resolved.config is not None
    logger = init_logger("vllm.ahn")  # below "vllm", so that it is shown like vLLM's own messages
    logger.info_once("AHN: %s", resolved.config.describe(resolved.model))
    warning = overrides.unused_memory(resolved.config, model_config.max_model_len)
    if warning is not None:
        logger.warning_once(warning)


def _patch_create_engine_config(engine_args: type[EngineArgs]) -> None:
    # The request is resolved before vLLM looks at the model at all, and from arguments that vLLM goes on to read.
    # vLLM's hook on whole configurations (limits.install) is called inside a validator, which wraps what is raised in
    # a report on every field; and what happens after the hook can still turn off what AHN needs.
    original = engine_args.create_engine_config

    @wraps(original)
    def create_engine_config(self: EngineArgs, *args: Any, **kwargs: Any) -> VllmConfig:
        with _one_sentence():
            resolved = arguments.resolve(self)
            token = _resolved.set(resolved)
            try:
                config = original(resolved.args, *args, **kwargs)
            finally:
                _resolved.reset(token)
            if resolved.config is not None:
                limits.check_config(config)
                arguments.hand_back(resolved.args, self)
                if config.lora_config is not None:
                    _patch_lora_requests()
        return config

    engine_args.create_engine_config = create_engine_config


@contextlib.contextmanager
def _one_sentence() -> Iterator[None]:
    """Take an `AHNError` out of what vLLM has wrapped it in, and have a command end with its sentence alone."""
    try:
        yield
    except Exception as error:
        ours = _ahn_error(error)
        if ours is None:
            raise
        if _is_command:
            _print_without_traceback()
        raise ours from None


def _ahn_error(error: BaseException) -> AHNError | None:
    """Return the `AHNError` that `error` is, or that pydantic has wrapped in it."""
    if isinstance(error, AHNError):
        return error
    errors = getattr(error, "errors", None)
    if type(error).__name__ == "ValidationError" and callable(errors):
        for entry in errors():
            inner = entry.get("ctx", {}).get("error")
            if isinstance(inner, AHNError):
                return inner
    return None


def _print_without_traceback() -> None:
    # The exception itself goes on to the top, past whatever has to be cleaned up on the way, and leaves exit code 1.
    # The arguments cannot carry that they came from a command line: vLLM makes others of them.
    original = sys.excepthook
    if hasattr(original, _PATCHED):
        return

    @wraps(original)
    def excepthook(kind: type[BaseException], error: BaseException, traceback: TracebackType | None) -> None:
        if isinstance(error, AHNError):
            print(f"error: {error}", file=sys.stderr)
        else:
            original(kind, error, traceback)

    setattr(excepthook, _PATCHED, True)
    sys.excepthook = excepthook


def patch_lora_workers() -> None:
    """Have this process, a worker, check every adapter that is loaded into an AHN model. May be called again."""
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
        if lora_request is not None and is_resolved(ahn_value(self.vllm_config.additional_config)):
            lora.check_local_adapter(lora_request.lora_path)

    InputProcessor._validate_lora = _validate_lora
    setattr(InputProcessor, _PATCHED, True)
