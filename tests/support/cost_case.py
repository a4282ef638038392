"""Shapes of published models for the tests of ``vllm-ahn cost``: only ``config.json``, no weights."""

import json
from pathlib import Path
from typing import Any

from vllm_ahn.tools.cost.shape import ModelShape


def qwen2(layers: int, hidden: int, heads: int, kv_heads: int, intermediate: int, vocabulary: int) -> dict[str, Any]:
    return {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "num_hidden_layers": layers,
        "hidden_size": hidden,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "intermediate_size": intermediate,
        "vocab_size": vocabulary,
        "max_position_embeddings": 32768,
        "torch_dtype": "bfloat16",
    }


QWEN2_5: dict[str, dict[str, Any]] = {
    "3B": qwen2(36, 2048, 16, 2, 11008, 151936),
    "7B": qwen2(28, 3584, 28, 4, 18944, 152064),
    "14B": qwen2(48, 5120, 40, 8, 13824, 152064),
}


def shape(size: str) -> ModelShape:
    return ModelShape.from_config(QWEN2_5[size], "config.json")


def write(folder: Path, config: dict[str, Any]) -> Path:
    """A model folder that holds ``config`` as its ``config.json``."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def write_ahn(folder: Path, size: str, memory: str) -> Path:
    """The folder of an AHN checkpoint for ``size``, without weights."""
    return write(
        folder, QWEN2_5[size] | {"_ahn_implementation": memory, "_layer_implementation": "Qwen2MemDecoderLayer"}
    )
