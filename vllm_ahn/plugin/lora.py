"""LoRA is for the base's layers. An adapter that changes the AHN itself is refused before any of it is loaded.

vLLM compares no more than the last part of an adapter's names with the model's, so that an adapter of the memory's
``o_proj`` would be taken in and do nothing. Adapters come after the start: with a request, with ``--lora-modules``, or
over HTTP. Workers refuse them however they come. A worker that raises takes the engine down with it where a request
brought the adapter, so requests are looked at in the front end already.
"""

from __future__ import annotations

import functools
import pathlib
from collections.abc import Iterable
from functools import wraps
from typing import TYPE_CHECKING, Any

from vllm_ahn.checkpoint.headers import read_headers
from vllm_ahn.checkpoint.tensors import is_ahn_tensor
from vllm_ahn.errors import AHNError
from vllm_ahn.plugin import features

if TYPE_CHECKING:
    from vllm.lora.request import LoRARequest

_GUARDED = "_ahn_guarded"


def check_adapter(folder: str) -> None:
    """Raises `AHNError` for a LoRA adapter in `folder` with tensors for the AHN's own modules."""
    for name in _tensor_names(pathlib.Path(folder)):
        if is_ahn_tensor(name):
            raise AHNError(f"{folder}: this LoRA adapter changes the AHN ({name}), expected one of the base model only")


def guard_workers() -> None:
    """Has this process check every adapter that is loaded into an AHN model."""
    from vllm.lora.utils import get_adapter_absolute_path
    from vllm.lora.worker_manager import WorkerLoRAManager

    if hasattr(WorkerLoRAManager, _GUARDED):
        return
    original = WorkerLoRAManager._load_adapter

    @wraps(original)
    def _load_adapter(self: Any, lora_request: LoRARequest) -> Any:
        from vllm_ahn.models.ahn import AHNForCausalLM

        if isinstance(self._adapter_manager.model, AHNForCausalLM):
            check_adapter(get_adapter_absolute_path(lora_request.lora_path))
        return original(self, lora_request)

    WorkerLoRAManager._load_adapter = _load_adapter
    setattr(WorkerLoRAManager, _GUARDED, True)


def guard_requests() -> None:
    """Has this process check the adapter of every request to an AHN model, if it is on this machine."""
    from vllm.v1.engine.input_processor import InputProcessor

    if hasattr(InputProcessor, _GUARDED):
        return
    original = InputProcessor._validate_lora

    @wraps(original)
    def _validate_lora(self: Any, lora_request: LoRARequest | None) -> None:
        original(self, lora_request)
        if lora_request is not None and features.is_resolved(features.ahn_setting(self.vllm_config.additional_config)):
            _check_once(lora_request.lora_path)

    InputProcessor._validate_lora = _validate_lora
    setattr(InputProcessor, _GUARDED, True)


@functools.lru_cache(maxsize=1024)
def _check_once(folder: str) -> None:
    if pathlib.Path(folder).is_dir():
        check_adapter(folder)


def _tensor_names(folder: pathlib.Path) -> Iterable[str]:
    # The files that vLLM looks for, in its order. Without any of them it is vLLM that has to say so.
    safetensors = folder / "adapter_model.safetensors"
    if safetensors.is_file():
        return read_headers([safetensors], str(folder))
    for pickled in (folder / "adapter_model.bin", folder / "adapter_model.pt"):
        if pickled.is_file():
            import torch

            names: dict[str, Any] = torch.load(pickled, map_location="meta", weights_only=True)
            return names
    return ()
