"""LoRA adapters as PEFT writes them, and bases with one folded into their weights."""

import json
import pathlib
import shutil

import torch
from safetensors.torch import load_file, save_file

PREFIX = "base_model.model."


def write_adapter(
    folder: pathlib.Path, base: pathlib.Path, modules: tuple[str, ...], seed: int, rank: int = 8, strength: float = 0.5
) -> pathlib.Path:
    """Writes a random adapter for every layer of ``base`` whose name ends with one of ``modules``; returns ``folder``.

    ``strength`` is about the size of the change over that of the weight.
    """
    generator = torch.Generator().manual_seed(seed)
    tensors: dict[str, torch.Tensor] = {}
    for name, weight in load_file(base / "model.safetensors").items():
        layer = name.removesuffix(".weight")
        if layer == name or not layer.endswith(modules):
            continue
        rows, columns = weight.shape
        first, second = "lora_A.weight", "lora_B.weight"
        if layer.endswith("embed_tokens"):
            rows, columns, first, second = columns, rows, "lora_embedding_A", "lora_embedding_B"
        tensors[f"{PREFIX}{layer}.{first}"] = torch.randn(rank, columns, generator=generator)
        size = weight.float().std() * strength / rank**0.5
        tensors[f"{PREFIX}{layer}.{second}"] = torch.randn(rows, rank, generator=generator) * size
    assert tensors
    save_adapter(folder, tensors, rank)
    return folder


def save_adapter(folder: pathlib.Path, tensors: dict[str, torch.Tensor], rank: int = 8) -> None:
    folder.mkdir(parents=True)
    targets = sorted({name.split(".lora_")[0].rpartition(".")[2] for name in tensors})
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": rank, "lora_alpha": 2 * rank, "bias": "none"}
    (folder / "adapter_config.json").write_text(json.dumps(config | {"target_modules": targets}))
    save_file(tensors, folder / "adapter_model.safetensors")


def fold(base: pathlib.Path, adapter: pathlib.Path, target: pathlib.Path) -> pathlib.Path:
    """Writes ``base`` to ``target`` with ``W + 2 B A`` for each ``W`` of the adapter; returns ``target``."""
    shutil.copytree(base, target)
    weights, changes = load_file(base / "model.safetensors"), load_file(adapter / "adapter_model.safetensors")
    for name in changes:
        layer, kind, _ = name.removeprefix(PREFIX).partition(".lora_A.weight")
        if kind:
            weights[f"{layer}.weight"] += 2 * changes[f"{PREFIX}{layer}.lora_B.weight"] @ changes[name]
        layer, kind, _ = name.removeprefix(PREFIX).partition(".lora_embedding_A")
        if kind:
            weights[f"{layer}.weight"] += 2 * (changes[f"{PREFIX}{layer}.lora_embedding_B"] @ changes[name]).t()
    save_file(weights, target / "model.safetensors")
    return target
