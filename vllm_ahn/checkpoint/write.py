"""Write checkpoints in the published layout: ``config.json`` and safetensors files."""

from __future__ import annotations

import json
import pathlib
from collections.abc import Mapping
from typing import Any

import torch
from safetensors.torch import save_file

from vllm_ahn.bases import base_of_type
from vllm_ahn.checkpoint.read import INDEX_NAME
from vllm_ahn.checkpoint.tensors import Options

_KEPT_FLOAT32 = (".A_log", ".dt_bias")  # exponents of the decay: bf16 would change how long a memory lasts


def ahn_config(base_config: Mapping[str, Any], memory: str, options: Options) -> dict[str, Any]:
    """Return the ``config.json`` of an AHN of `memory` for the base with `base_config`."""
    base = base_of_type(base_config["model_type"])
    assert base is not None
    return {
        **base_config,
        "_ahn_implementation": memory,
        "_layer_implementation": base.layer_implementation,
        "use_q_proj": options.use_q_proj,
        "use_ahn_router": options.use_router,
        "fa_layer_ids": ",".join(map(str, options.full_attention_layers)),
    }


def write_json(path: pathlib.Path, values: Mapping[str, Any]) -> None:
    """Write `values` with sorted keys."""
    path.write_text(json.dumps(values, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def write_weights(folder: pathlib.Path, tensors: Mapping[str, torch.Tensor], dtype: str, shards: int) -> None:
    """Write `tensors` in `dtype` (a name such as "bfloat16") to one file, or to `shards` files and their
    index."""
    target = getattr(torch, dtype)
    cast = {
        name: tensors[name].to(torch.float32 if name.endswith(_KEPT_FLOAT32) else target).contiguous()
        for name in sorted(tensors)
    }
    # What an earlier call left here must not be read along with what this one writes.
    for old in [*folder.glob("*.safetensors"), folder / INDEX_NAME]:
        old.unlink(missing_ok=True)
    if shards == 1:
        save_file(cast, folder / "model.safetensors", metadata={"format": "pt"})
        return
    weight_map: dict[str, str] = {}
    for n in range(shards):
        file = f"model-{n + 1:05}-of-{shards:05}.safetensors"
        part = {name: cast[name] for name in list(cast)[n::shards]}
        weight_map |= dict.fromkeys(part, file)
        if part:
            save_file(part, folder / file, metadata={"format": "pt"})
    size = sum(tensor.numel() * tensor.element_size() for tensor in cast.values())
    index = {"metadata": {"total_size": size}, "weight_map": dict(sorted(weight_map.items()))}
    (folder / INDEX_NAME).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
