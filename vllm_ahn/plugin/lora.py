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
from typing import Any

from vllm_ahn.checkpoint.read import read_headers
from vllm_ahn.checkpoint.tensors import is_ahn_tensor
from vllm_ahn.errors import AHNError


def check_adapter(folder: str) -> None:
    """Raises `AHNError` for a LoRA adapter in `folder` with tensors for the AHN's own modules."""
    for name in _tensor_names(pathlib.Path(folder)):
        if is_ahn_tensor(name):
            raise AHNError(f"{folder}: this LoRA adapter changes the AHN ({name}), expected one of the base model only")


@functools.lru_cache(maxsize=1024)
def check_local_adapter(folder: str) -> None:
    """`check_adapter`, once a process, of an adapter that is on this machine."""
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
