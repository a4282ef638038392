"""Random prompts and weights, the same in every run."""

from __future__ import annotations

import math
import random
from typing import Any

SHARPNESS = 1.6
"""Factor of queries and keys: scores then have a standard deviation of 2.5 and not 1, so that attention over 30,000
random keys still hangs on a few hundred of them, and a wrong key is seen."""


def prompt(length: int, seed: int = 0, vocab: int = 60000) -> list[int]:
    """Return ``length`` random tokens below ``vocab``; the first 60,000 of Qwen's and of ours have a text."""
    return random.Random(f"{seed} {length}").choices(range(vocab), k=length)


def replace_dummy_weights(seed: int) -> None:
    """Make vLLM's ``load_format="dummy"`` give models of this process weights that answer clearly.

    vLLM's own are so small that every token is as likely as any other. These are scaled as those of
    `vllm_ahn.tools.tiny`, made on the device, and depend on a parameter's name and the seed alone: engines of one base
    have the same base weights, with an AHN and without.
    """
    from vllm.model_executor.model_loader.dummy_loader import DummyModelLoader

    def load_weights(self: Any, model: Any, model_config: Any) -> None:
        _fill(model, seed, tied=model_config.hf_config.tie_word_embeddings)

    DummyModelLoader.load_weights = load_weights


def _fill(model: Any, seed: int, *, tied: bool) -> None:
    import torch

    from vllm_ahn.tools.tiny.weights import random_values

    with torch.no_grad():
        for name, parameter in model.named_parameters():
            values = random_values(name, tuple(parameter.shape), seed, parameter.device)
            # As in `vllm_ahn.tools.tiny.weights.base_tensors`: logits of size 2, and no token its own best successor.
            if name.endswith("embed_tokens.weight"):
                values *= 0.5 if tied else math.sqrt(parameter.shape[1])
            elif name == "model.norm.weight" and tied:
                values *= 4
            elif name == "lm_head.weight":
                values *= 2
            elif name.endswith("qkv_proj.weight"):
                values *= SHARPNESS
            parameter.copy_(values)
