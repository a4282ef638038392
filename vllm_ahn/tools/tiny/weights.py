"""Random weights of tiny checkpoints, scaled so that every layer passes on what it gets at about the same size."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from typing import Any

import torch

from vllm_ahn.checkpoint.tensors import BaseShape, Options, expected_tensors, unused_tensors
from vllm_ahn.reference import BaseConfig, ReferenceModel
from vllm_ahn.tools.tiny.tokenizer import unreadable_tokens

Tensors = dict[str, torch.Tensor]


def base_tensors(config: Mapping[str, Any], seed: int) -> Tensors:
    """Return a random base of the ``config.json`` `config`, float32, under the names of its checkpoints."""
    vocab = config["vocab_size"]
    with torch.device("meta"):  # only names and shapes are wanted
        dims = {name: tuple(p.shape) for name, p in ReferenceModel(BaseConfig.from_dict(config)).named_parameters()}
    tensors = {name: random_values(name, size, seed) for name, size in dims.items()}
    head = "model.embed_tokens.weight" if config["tie_word_embeddings"] else "lm_head.weight"
    # Logits of size 2 make greedy choices clear. A tied head must be small, or each token is its own best successor.
    if config["tie_word_embeddings"]:
        tensors[head] *= 0.5
        tensors["model.norm.weight"] *= 4
    else:
        tensors[head] *= 2
        tensors["model.embed_tokens.weight"] *= math.sqrt(config["hidden_size"])
    # Nearly at zero, a token is seldom chosen: answers are ASCII, and do not end at once.
    tensors[head][unreadable_tokens(vocab)] *= 0.1
    return tensors


def ahn_tensors(memory: str, shape: BaseShape, options: Options, seed: int) -> Tensors:
    """Return a random AHN in float32, with all the tensors of a published checkpoint, the unused ones among them."""
    dims = expected_tensors(memory, shape, options) | unused_tensors(memory, shape, options)
    return {name: random_values(name, size, seed) for name, size in dims.items()}


def random_values(
    name: str, dims: tuple[int, ...], seed: int, device: torch.device | str | None = None
) -> torch.Tensor:
    """Return the random tensor `name` of a checkpoint, float32 of shape `dims` on `device`.

    Seeded by its own name, it does not depend on which others there are.
    """
    digest = hashlib.sha256(f"{seed} {name}".encode()).digest()
    generator = torch.Generator(device or "cpu").manual_seed(int.from_bytes(digest[:7], "big"))
    match name.rsplit(".", 1)[1]:
        case "A_log":  # decay rates of 1/2 to 4 for each unit of time, so some heads forget soon and some late
            return torch.empty(dims, device=device).uniform_(0.5, 4.0, generator=generator).log()
        case "dt_bias":  # softplus(dt_bias), the unit of time, spread evenly in logarithm over 0.001 to 0.1 tokens
            dt = torch.empty(dims, device=device).uniform_(math.log(1e-3), math.log(1e-1), generator=generator).exp()
            return dt + torch.log(-torch.expm1(-dt))
        case "D":
            return torch.ones(dims, device=device)
        case "alpha":
            return torch.empty(dims, device=device).uniform_(0.2, 1.0, generator=generator)
    values = torch.randn(dims, generator=generator, device=device)
    if len(dims) == 1:
        return 1 + 0.1 * values if name.endswith("norm.weight") else 0.2 * values
    # [out, in] in a linear layer, [heads, in, out] in the memory's projections for each head.
    gain = 0.5 if name.endswith("ahn.fn.o_proj.weight") else 1.0
    return values * gain / math.sqrt(dims[1])
