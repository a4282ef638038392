"""``vllm-ahn make-tiny DIR``: a seeded random base model with a tokenizer, and an AHN checkpoint for it.

Nothing in them is learnt. They have the layout of the real ones, run in seconds on a CPU, and their random
memory is as strong as their attention, so that a wrong memory gives other tokens.
"""

from __future__ import annotations

import argparse
import dataclasses
import inspect
import json
import pathlib
import sys
from typing import Any

from vllm_ahn.checkpoint.options import read_options
from vllm_ahn.checkpoint.tensors import BaseShape
from vllm_ahn.errors import AHNError
from vllm_ahn.memory.spec import MEMORIES
from vllm_ahn.tools.tiny.tokenizer import count_tokens, write_tokenizer

ARCHITECTURES = {"qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM"}
DTYPES = ("float32", "bfloat16", "float16")

_MARK = "vllm_ahn_tiny_seed"  # key of the config.json of what this module wrote, and may write again


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
    """What `make_tiny` wrote."""

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
    """Writes ``base`` and ``ahn``, or ``merged`` if `merged`, into `folder`, and says where.

    The defaults are the sizes of ``tests/golden``. A ``head_dim`` of None is hidden / heads for Qwen2 and, so
    that heads * head size differs from hidden as in real ones, twice that for Qwen3; `tie_word_embeddings` is
    then true for Qwen3 only. The same arguments give the same bytes, and base and AHN each depend on `seed`
    alone beside their own arguments: one base serves every memory. `shards` splits the weights over files
    with an index. Without `weights` there are configurations and a tokenizer only, for vLLM's
    ``load_format="dummy"``. Raises `AHNError`.
    """
    for name, value, known in (
        ("model_type", model_type, tuple(ARCHITECTURES)),
        ("memory", memory, tuple(MEMORIES)),
        ("dtype", dtype, DTYPES),
    ):
        if value not in known:
            raise AHNError(f"make-tiny: {name} is {value!r}, expected one of {', '.join(known)}")
    for name, count in (("heads", heads), ("shards", shards), ("intermediate", intermediate)):
        if count < 1:
            raise AHNError(f"make-tiny: {name} is {count}, expected at least 1")
    end_of_text, end_of_turn = count_tokens(vocab) - 3, count_tokens(vocab) - 1
    qwen3 = model_type == "qwen3"
    if not qwen3 and head_dim not in (None, hidden // heads):
        raise AHNError(f"make-tiny: head_dim is {head_dim}, expected hidden / heads for Qwen2, {hidden // heads}")
    config: dict[str, Any] = {
        "architectures": [ARCHITECTURES[model_type]],
        "attention_dropout": 0.0,
        "bos_token_id": end_of_text,
        "eos_token_id": end_of_turn,
        "hidden_act": "silu",
        "hidden_size": hidden,
        "initializer_range": 0.02,
        "intermediate_size": intermediate,
        "max_position_embeddings": max_position_embeddings,
        "max_window_layers": layers,
        "model_type": model_type,
        "num_attention_heads": heads,
        "num_hidden_layers": layers,
        "num_key_value_heads": kv_heads,
        "rms_norm_eps": 1e-6,
        "rope_scaling": None,
        "rope_theta": 10000.0,
        "sliding_window": max_position_embeddings,
        "tie_word_embeddings": qwen3 if tie_word_embeddings is None else tie_word_embeddings,
        "torch_dtype": dtype,
        "transformers_version": "4.51.0",
        "use_cache": True,
        "use_sliding_window": False,
        "vocab_size": vocab,
    }
    if qwen3:
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
        base, ahn = base_tensors(config, shape, seed), ahn_tensors(memory, shape, options, seed)
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
    ends = {
        "bos_token_id": end_of_text,
        "eos_token_id": [end_of_turn, end_of_text],
        "pad_token_id": end_of_text,
    }
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


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds what `run` reads to `parser`."""
    parser.add_argument("folder", help="where to write: FOLDER/base and FOLDER/ahn, or FOLDER/merged")
    parser.add_argument("--model-type", default="qwen2", choices=list(ARCHITECTURES), help="base architecture")
    parser.add_argument("--memory", default="GatedDeltaNet", choices=list(MEMORIES), help="memory of the AHN")
    parser.add_argument("--seed", type=int, default=0, help="the same seed gives the same files")
    parser.add_argument("--merged", action="store_true", help="write base and AHN into one checkpoint")
    for name, default in (
        ("layers", 3),
        ("hidden", 128),
        ("intermediate", 256),
        ("heads", 4),
        ("kv-heads", 2),
    ):
        parser.add_argument(f"--{name}", type=int, default=default, metavar="N")
    parser.add_argument("--head-dim", type=int, metavar="N", help="hidden / heads for qwen2, twice that for qwen3")
    parser.add_argument("--vocab", type=int, default=512, metavar="N", help="tokens, at least 259")
    parser.add_argument("--max-position-embeddings", type=int, default=4096, metavar="N")
    parser.add_argument("--use-q-proj", action="store_true", help="give the memory its own query projection")
    parser.add_argument("--use-router", action="store_true", help="weigh the memory by a gate (use_ahn_router)")
    parser.add_argument("--fa-layer-ids", default="", metavar="N,N", help="layers with plain full attention")
    parser.add_argument("--dtype", default="float32", choices=DTYPES)
    parser.add_argument("--shards", type=int, default=1, metavar="N", help="weight files a checkpoint")


def run(args: argparse.Namespace) -> int:
    """Writes what the arguments ask for and prints where; returns 0, or 1 after a sentence on stderr."""
    options = {name: value for name, value in vars(args).items() if name in _OPTIONS}
    try:
        paths = make_tiny(args.folder, **options)
    except (AHNError, OSError) as error:
        print(error, file=sys.stderr)
        return 1
    print(f"base  {paths.base}" if paths.ahn else f"merged  {paths.base}")
    if paths.ahn:
        print(f"ahn   {paths.ahn}")
    ahn = f" --ahn {paths.ahn}" if paths.ahn else ""
    print(f"Serve it: vllm serve {paths.base}{ahn} --ahn-window 64 --ahn-sinks 8 --dtype {args.dtype}")
    return 0


# The parser may carry arguments of the command around this one; these are ours.
_OPTIONS = inspect.signature(make_tiny).parameters.keys() - {"folder"}
