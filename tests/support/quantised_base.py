"""Quantised copies of a base, in the formats that quantisation tools write, and what their weights are worth."""

import json
import pathlib
import shutil
from collections.abc import Callable, Iterator
from typing import Any

import torch
from safetensors.torch import load_file, save_file

GROUP = 32
"""Input columns that share a scale in the four-bit formats."""
BLOCK = 128
"""Side of the squares that share a scale in block-wise float8."""
FP8_MAX = 448.0
"""The largest float8_e4m3fn."""

Tensors = dict[str, torch.Tensor]
Quantiser = Callable[[torch.Tensor], tuple[Tensors, torch.Tensor]]
"""``weight [out, in]`` float32 -> tensors by their names below the layer's, and ``[out, in]`` that they stand for."""


def int8_channels(weight: torch.Tensor) -> tuple[Tensors, torch.Tensor]:
    """Eight bits, a scale an output row."""
    scale = weight.abs().amax(1, keepdim=True) / 127
    values = (weight / scale).round()
    return {"weight": values.to(torch.int8), "weight_scale": scale}, values * scale


def packed_int4(weight: torch.Tensor) -> tuple[Tensors, torch.Tensor]:
    """Four bits around 8, eight values of a row in an int32, the first lowest, as compressed-tensors packs them."""
    values, scale, worth = _symmetric_int4(weight)
    packed = _pack(values, range(8))
    return {"weight_packed": packed, "weight_scale": scale, "weight_shape": torch.tensor(weight.shape)}, worth


def gptq(weight: torch.Tensor) -> tuple[Tensors, torch.Tensor]:
    """As `packed_int4`, all of it transposed, with zero points one less than 8 and the group of each column."""
    values, scale, worth = _symmetric_int4(weight)
    rows, columns = weight.shape
    zeros = torch.full((rows, columns // GROUP), 7)
    return {
        "qweight": _pack(values, range(8)).t().contiguous(),
        "scales": scale.t().contiguous(),
        "qzeros": _pack(zeros.t(), range(8)),
        "g_idx": (torch.arange(columns) // GROUP).int(),
    }, worth


def awq(weight: torch.Tensor) -> tuple[Tensors, torch.Tensor]:
    """Four bits with zero points, transposed; eight output columns in an int32, the even ones before the odd."""
    groups = weight.unflatten(1, (-1, GROUP))
    low, high = groups.amin(-1).clamp(max=0), groups.amax(-1).clamp(min=0)
    scale = ((high - low) / 15).half().float()
    zeros = (-low / scale).round()
    values = (groups / scale[..., None] + zeros[..., None]).round().clamp(0, 15)
    worth = ((values - zeros[..., None]) * scale[..., None]).flatten(1)
    order = (0, 2, 4, 6, 1, 3, 5, 7)
    return {
        "qweight": _pack(values.flatten(1).t(), order),
        "qzeros": _pack(zeros.t(), order),
        "scales": scale.t().half().contiguous(),
    }, worth


def fp8(weight: torch.Tensor) -> tuple[Tensors, torch.Tensor]:
    """float8, a scale a matrix."""
    scale = weight.abs().max() / FP8_MAX
    values = (weight / scale).to(torch.float8_e4m3fn)
    return {"weight": values, "weight_scale": scale}, values.float() * scale


def fp8_channels(weight: torch.Tensor) -> tuple[Tensors, torch.Tensor]:
    """float8, a scale an output row."""
    scale = weight.abs().amax(1, keepdim=True) / FP8_MAX
    values = (weight / scale).to(torch.float8_e4m3fn)
    return {"weight": values, "weight_scale": scale}, values.float() * scale


def fp8_blocks(weight: torch.Tensor) -> tuple[Tensors, torch.Tensor]:
    """float8, a scale a square; both sides of the matrix are multiples of `BLOCK`."""
    squares = weight.unflatten(0, (-1, BLOCK)).unflatten(2, (-1, BLOCK))
    scale = squares.abs().amax((1, 3), keepdim=True) / FP8_MAX
    values = (squares / scale).to(torch.float8_e4m3fn)
    worth = (values.float() * scale).flatten(2).flatten(0, 1)
    return {"weight": values.flatten(2).flatten(0, 1), "weight_scale_inv": scale[:, 0, :, 0]}, worth


def _compressed(format_: str, weights: dict[str, Any], activations: dict[str, Any] | None) -> dict[str, Any]:
    group = {"targets": ["Linear"], "weights": weights, "input_activations": activations}
    return {
        "quant_method": "compressed-tensors",
        "format": format_,
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
        "ignore": ["lm_head"],
    }


def _scheme(bits: int, strategy: str, type_: str = "int", **more: Any) -> dict[str, Any]:
    return {"num_bits": bits, "type": type_, "strategy": strategy, "symmetric": True, "dynamic": False, **more}


FORMATS: dict[str, tuple[Quantiser, dict[str, Any]]] = {
    "w4a16": (packed_int4, _compressed("pack-quantized", _scheme(4, "group", group_size=GROUP), None)),
    "w8a8-int8": (
        int8_channels,
        _compressed("int-quantized", _scheme(8, "channel"), _scheme(8, "token", dynamic=True)),
    ),
    "w8a8-fp8": (
        fp8_channels,
        _compressed("float-quantized", _scheme(8, "channel", "float"), _scheme(8, "token", "float", dynamic=True)),
    ),
    "gptq": (
        gptq,
        {"quant_method": "gptq", "bits": 4, "group_size": GROUP, "desc_act": False, "sym": True, "lm_head": False},
    ),
    "awq": (
        awq,
        {"quant_method": "awq", "bits": 4, "group_size": GROUP, "zero_point": True, "version": "gemm"},
    ),
    "fp8": (fp8, {"quant_method": "fp8", "activation_scheme": "dynamic"}),
    "fp8-blocks": (
        fp8_blocks,
        {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [BLOCK, BLOCK]},
    ),
}
"""Name -> how a layer's weight is written, and ``quantization_config``."""


def quantise(
    base: pathlib.Path, target: pathlib.Path, name: str, skip: tuple[str, ...] = (), **config: Any
) -> pathlib.Path:
    """Writes the model in folder ``base`` to ``target`` with its decoder's linear layers in format ``name``.

    Layers named in ``skip``, and an AHN merged into ``base``, stay as they are. ``config`` goes into
    ``quantization_config``.

    Returns:
        A folder beside ``target`` with the same model unquantised: plain float32 weights of the same worth.
    """
    quantiser, settings = FORMATS[name]
    worth_folder = target.with_name(f"{target.name}-worth")
    for folder in (target, worth_folder):
        shutil.copytree(base, folder)
    tensors, worth = load_file(base / "model.safetensors"), load_file(base / "model.safetensors")
    for weight_name in linear_weights(tensors):
        if weight_name.removesuffix(".weight") in skip:
            continue
        parts, worth[weight_name] = quantiser(tensors.pop(weight_name).float())
        tensors |= {weight_name.removesuffix("weight") + part: values.contiguous() for part, values in parts.items()}
    save_file(tensors, target / "model.safetensors")
    save_file({k: v.contiguous() for k, v in worth.items()}, worth_folder / "model.safetensors")
    change_config(target, quantization_config=settings | config)
    return worth_folder


def change_config(folder: pathlib.Path, **changes: Any) -> None:
    values = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(values | changes))


def linear_weights(tensors: Tensors) -> Iterator[str]:
    """Names of the weights of the decoder's linear layers."""
    for name in sorted(tensors):
        if name.endswith("_proj.weight") and (".self_attn." in name or ".mlp." in name):
            yield name


def _symmetric_int4(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    groups = weight.unflatten(1, (-1, GROUP))
    # A scale that every dtype of a model can hold.
    scale = (groups.abs().amax(-1) / 7).bfloat16().float()
    values = (groups / scale[..., None]).round().clamp(-8, 7)
    return (values + 8).flatten(1), scale, (values * scale[..., None]).flatten(1)


def _pack(values: torch.Tensor, order: Any) -> torch.Tensor:
    """Four-bit values ``[m, n]`` to int32 ``[m, n / 8]``; the k-th of eight, lowest bits first, is ``order[k]``."""
    eights = values.long().unflatten(1, (-1, 8))
    packed = sum(eights[..., source] << 4 * k for k, source in enumerate(order))
    assert isinstance(packed, torch.Tensor)
    return torch.where(packed >= 2**31, packed - 2**32, packed).int()
