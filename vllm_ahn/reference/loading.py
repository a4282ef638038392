"""Load reference models from checkpoint folders, with no help from the engine's loader."""

import dataclasses
import json
import pathlib
from typing import Any

import torch
from safetensors.torch import load_file

from vllm_ahn.checkpoint.options import read_options
from vllm_ahn.checkpoint.tensors import BaseShape, is_ahn_tensor
from vllm_ahn.config import DEFAULT_SINKS, DEFAULT_WINDOW, NO_MEMORY, AHNConfig
from vllm_ahn.errors import AHNError
from vllm_ahn.reference.base import BaseConfig
from vllm_ahn.reference.memory import MEMORIES, Memory
from vllm_ahn.reference.model import ReferenceModel

PathLike = str | pathlib.Path

SLOWEST = 1024
"""Tokens for which the slowest head of a new memory keeps ``1 / e`` of what it absorbed, by default."""


def from_folders(
    base: PathLike,
    ahn: PathLike | None = None,
    window: int = DEFAULT_WINDOW,
    sinks: int = DEFAULT_SINKS,
    recurrence: str = "chunk",
    dtype: torch.dtype = torch.float32,
) -> ReferenceModel:
    """Load the base in folder `base` with the AHN in folder `ahn`, in evaluation mode.

    Args:
        base: folder of the base, or of a base with an AHN merged in.
        ahn: folder of the AHN. None: the AHN merged in `base` if its config has one, else the plain base with full
            attention. "none": window and sinks without a memory.
        window: W, tokens.
        sinks: S, tokens.
        recurrence: see `ReferenceModel`.
        dtype: of the weights; ``A_log`` and ``dt_bias`` stay float32 when it is narrower.

    Raises:
        AHNError: a folder lacks a config or weights, or its tensors are not exactly the model's.
    """
    base_config = _read_config(base)
    tensors = _read_tensors(base)
    ahn_config = base_config
    if ahn == NO_MEMORY:
        tensors = {name: tensor for name, tensor in tensors.items() if not is_ahn_tensor(name)}
    elif ahn is not None:
        ahn_config = _read_config(ahn)
        tensors.update(_read_tensors(ahn))
    options = None
    if ahn == NO_MEMORY:
        options = AHNConfig(None, window, sinks)
    elif ahn is not None or "_ahn_implementation" in base_config:
        options = AHNConfig(
            memory=ahn_config.get("_ahn_implementation", ""),
            window=window,
            sinks=sinks,
            checkpoint=None if ahn is None else str(ahn),
            **dataclasses.asdict(read_options(ahn_config, BaseShape.from_config(ahn_config), str(ahn or base))),
        )
    model = ReferenceModel(BaseConfig.from_dict(base_config), options, recurrence)
    _load(model, tensors, " + ".join(str(folder) for folder in (base, ahn) if folder is not None))
    model.to(dtype)
    if dtype not in (torch.float32, torch.float64):
        for name, parameter in model.named_parameters():
            if name.endswith((".A_log", ".dt_bias")):
                parameter.data = tensors[name].float()
    return model.eval()


def new_memory(
    base: PathLike,
    ahn: AHNConfig,
    recurrence: str = "chunk",
    dtype: torch.dtype = torch.float32,
    slowest: int = SLOWEST,
) -> ReferenceModel:
    """Load the base in folder `base` and give it a new memory, in float32, that adds nothing yet.

    What does not begin as `Memory.begin` says is drawn from PyTorch's generator.

    Args:
        base: folder of the base.
        ahn: which memory.
        recurrence: see `ReferenceModel`.
        dtype: of the base's weights.
        slowest: tokens for which the slowest head keeps ``1 / e`` of what it absorbed.

    Raises:
        AHNError: the folder lacks a config or weights, or its tensors are not exactly a base's.
    """
    model = ReferenceModel(BaseConfig.from_dict(_read_config(base)), ahn, recurrence)
    for module in model.modules():
        if isinstance(module, Memory):
            module.begin(slowest)
    own = {name: tensor for name, tensor in model.state_dict().items() if is_ahn_tensor(name)}
    _load(model, _read_tensors(base) | own, str(base))
    for name, parameter in model.named_parameters():
        if not is_ahn_tensor(name):
            parameter.data = parameter.data.to(dtype)
    return model


def _is_unused(name: str, model: ReferenceModel) -> bool:
    """Return whether a checkpoint may hold the tensor `name` although the model does not have it."""
    if name == "lm_head.weight":
        return model.base.tie_word_embeddings  # stored all the same, now and then
    if model.ahn is None or model.ahn.memory is None or not is_ahn_tensor(name):
        return False
    if name.rpartition(".ahn.fn.")[2] in MEMORIES[model.ahn.memory].unused:
        return True
    return any(name.startswith(f"model.layers.{layer}.") for layer in model.ahn.full_attention_layers)


def _load(model: ReferenceModel, tensors: dict[str, torch.Tensor], source: str) -> None:
    tensors = {name: tensor for name, tensor in tensors.items() if not _is_unused(name, model)}
    expected = {name: parameter.shape for name, parameter in model.named_parameters()}
    missing, surplus = expected.keys() - tensors.keys(), tensors.keys() - expected.keys()
    for problem, names in (("missing", missing), ("surplus", surplus)):
        if names:
            raise AHNError(f"{source}: {problem} tensors {', '.join(sorted(names)[:5])} (of {len(names)})")
    for name, shape in expected.items():
        if tensors[name].shape != shape:
            found = tuple(tensors[name].shape)
            raise AHNError(f"{source}: {name} has shape {found}, expected {tuple(shape)}")
    model.load_state_dict({name: tensor.float() for name, tensor in tensors.items()})


def _read_config(folder: PathLike) -> dict[str, Any]:
    path = pathlib.Path(folder) / "config.json"
    if not path.is_file():
        raise AHNError(f"{path}: no such file, expected the config of a checkpoint")
    return json.loads(path.read_text())


def _read_tensors(folder: PathLike) -> dict[str, torch.Tensor]:
    paths = sorted(pathlib.Path(folder).glob("*.safetensors"))
    if not paths:
        raise AHNError(f"{folder}: no *.safetensors, expected a checkpoint's weights")
    return {name: tensor for path in paths for name, tensor in load_file(path).items()}
