"""Write tiny checkpoints: configurations, weights and a tokenizer."""

from __future__ import annotations

import dataclasses
import json
import pathlib
from typing import Any

from vllm_ahn.bases import BASES
from vllm_ahn.checkpoint.options import read_options
from vllm_ahn.checkpoint.tensors import BaseShape
from vllm_ahn.errors import AHNError
from vllm_ahn.memory.spec import MEMORIES
from vllm_ahn.tools.tiny.tokenizer import count_tokens, write_tokenizer

MODEL_TYPES = {base.model_type: base for base in BASES}

DTYPES = ("float32", "bfloat16", "float16")

_MARK = "vllm_ahn_tiny_seed"
"""Key of the ``config.json`` of what this module wrote, and may write again."""

_LEFTOVERS = {
    "ahn_position": "random",
    "dy_num_attn_sinks": 128,
    "dy_sliding_window": 2048,
    "loss_type": ["kl"],
    "sliding_window": 256,
    "sliding_window_type": "random",
    "use_layerwise_decay": True,
    "use_normalized_l2": True,
}
"""In published checkpoints, left over from training, and here so that tests and demos would notice if anything ever
read them."""


@dataclasses.dataclass(frozen=True)
class TinyPaths:
    """Where `make_tiny` wrote to."""

    base: pathlib.Path
    """Folder to serve as the model."""

    ahn: pathlib.Path | None
    """Folder to serve as ``--ahn``; None if the AHN is merged into `base`."""


def make_tiny(
    folder: str | pathlib.Path,
    *,
    model_type: str = "qwen2",
    memory: str = "GatedDeltaNet",
    seed: int = 0,
    merged: bool = False,
    layers: int = 3,
    hidden: int = 128,
    intermediate: int = 256,
    heads: int = 4,
    kv_heads: int = 2,
    head_dim: int | None = None,
    vocab: int = 512,
    tie_word_embeddings: bool | None = None,
    max_position_embeddings: int = 4096,
    use_q_proj: bool = False,
    use_router: bool = False,
    fa_layer_ids: str = "",
    dtype: str = "float32",
    shards: int = 1,
    weights: bool = True,
) -> TinyPaths:
    """Write ``base`` and ``ahn``, or ``merged``, into `folder`.

    The same arguments give the same bytes, and base and AHN each depend on `seed` alone beside their own arguments:
    one base serves every memory. The defaults are the sizes of ``tests/golden``.

    Args:
        folder: made if need be; what another program wrote there is never overwritten.
        model_type: one of `MODEL_TYPES`.
        memory: one of `MEMORIES`.
        seed: of the weights.
        merged: write base and AHN into one checkpoint.
        layers, hidden, intermediate, heads, kv_heads, vocab, max_position_embeddings: sizes of the base.
        head_dim: None is hidden / heads, or twice that for a base with a `Base.default_head_dim`.
        tie_word_embeddings: None is true for a base with a `Base.default_head_dim` only.
        use_q_proj, use_router, fa_layer_ids: options of the AHN, as its ``config.json`` has them.
        dtype: one of `DTYPES`.
        shards: files that the weights of a checkpoint are split into, with an index if more than one.
        weights: without them there are configurations and a tokenizer only, for vLLM's ``load_format="dummy"``.

    Returns:
        What to serve.

    Raises:
        AHNError: an argument is bad, or would overwrite what is not tiny.
    """
    for name, value, known in (
        ("model_type", model_type, MODEL_TYPES),
        ("memory", memory, MEMORIES),
        ("dtype", dtype, DTYPES),
    ):
        if value not in known:
            raise AHNError(f"make-tiny: {name} is {value!r}, expected one of {', '.join(known)}")
    for name, count in (("heads", heads), ("shards", shards), ("intermediate", intermediate)):
        if count < 1:
            raise AHNError(f"make-tiny: {name} is {count}, expected at least 1")
    # Where a head may have another size than hidden / heads, it has, and the embedding is tied: so both are met.
    own_head_dim = MODEL_TYPES[model_type].default_head_dim is not None
    if not own_head_dim and head_dim not in (None, hidden // heads):
        raise AHNError(
            f"make-tiny: head_dim is {head_dim}, expected hidden / heads for {model_type}, {hidden // heads}"
        )
    end_of_text, end_of_turn = count_tokens(vocab) - 3, count_tokens(vocab) - 1
    config: dict[str, Any] = {
        "architectures": [MODEL_TYPES[model_type].architecture],
        "attention_dropout": 0.0,
        "bos_token_id": end_of_text,
        "eos_token_id": end_of_turn,
        "hidden_act": "silu",
        "hidden_size": hidden,
        "initializer_range": 0.02,
        "intermediate_size": intermediate,
        "max_position_embeddings": max_position_embeddings,
        "model_type": model_type,
        "num_attention_heads": heads,
        "num_hidden_layers": layers,
        "num_key_value_heads": kv_heads,
        "rms_norm_eps": 1e-6,
        "rope_scaling": None,
        "rope_theta": 10000.0,
        "tie_word_embeddings": own_head_dim if tie_word_embeddings is None else tie_word_embeddings,
        "torch_dtype": dtype,
        "transformers_version": "4.51.0",
        "use_cache": True,
        "vocab_size": vocab,
    }
    if MODEL_TYPES[model_type].may_have_window:
        config |= {
            "max_window_layers": layers,
            "sliding_window": max_position_embeddings,
            "use_sliding_window": False,
        }
    if own_head_dim:
        config |= {"attention_bias": False, "head_dim": head_dim or 2 * hidden // heads}
    shape = BaseShape.from_config(config, "make-tiny")
    if shape.head_dim % 2:
        raise AHNError(f"make-tiny: head_dim is {shape.head_dim}, expected an even number, since RoPE turns pairs")
    asked = {"use_q_proj": use_q_proj, "use_ahn_router": use_router, "fa_layer_ids": fa_layer_ids}
    options = read_options({**asked, "_ahn_implementation": memory}, shape, "make-tiny")

    from vllm_ahn.checkpoint.write import ahn_config, write_json, write_weights
    from vllm_ahn.tools.tiny.weights import Tensors, ahn_tensors, base_tensors

    with_ahn = {**ahn_config(config, memory, options), **_LEFTOVERS, "save_ahn_only": not merged}
    base: Tensors = {}
    ahn: Tensors = {}
    if weights:
        base, ahn = base_tensors(config, seed), ahn_tensors(memory, shape, options, seed)
    folder = pathlib.Path(folder)
    if merged:
        paths = TinyPaths(folder / "merged", None)
        parts = {paths.base: (with_ahn, base | ahn)}
    else:
        paths = TinyPaths(folder / "base", folder / "ahn")
        parts = {folder / "base": (config, base), folder / "ahn": (with_ahn, ahn)}
    for part in parts:
        _check_overwrite(part)
    for part, (values, tensors) in parts.items():
        part.mkdir(parents=True, exist_ok=True)
        write_json(part / "config.json", {**values, _MARK: seed})
        if weights:
            write_weights(part, tensors, dtype, shards)
    write_tokenizer(paths.base, vocab)
    ends = {"bos_token_id": end_of_text, "eos_token_id": [end_of_turn, end_of_text], "pad_token_id": end_of_text}
    write_json(paths.base / "generation_config.json", ends)
    return paths


def _check_overwrite(part: pathlib.Path) -> None:
    # Whoever names the folder of real models must not lose one that happens to be called base, ahn or merged.
    if not part.exists() or (part.is_dir() and not any(part.iterdir())):
        return
    try:
        if _MARK in json.loads((part / "config.json").read_text(encoding="utf-8")):
            return
    except (OSError, ValueError, TypeError):
        pass
    raise AHNError(f"{part}: exists and was not made by make-tiny, expected a folder without it")
