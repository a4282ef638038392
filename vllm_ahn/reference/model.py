"""The whole language model. Parameters have the checkpoints' names."""

from __future__ import annotations

import dataclasses

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from vllm_ahn.config import AHNConfig
from vllm_ahn.errors import AHNError
from vllm_ahn.reference.base import BaseConfig
from vllm_ahn.reference.decoder import DecoderLayer, LayerCache
from vllm_ahn.reference.layers import RMSNorm
from vllm_ahn.reference.memory import RECURRENCES


@dataclasses.dataclass(frozen=True)
class Generation:
    """A greedy continuation by `ReferenceModel.generate`."""

    tokens: torch.Tensor
    """``[B, n]`` int64."""
    logits: torch.Tensor
    """``[B, n, vocab]``: those that each token was chosen by."""
    states: list[torch.Tensor | None]
    """Of each layer ``[B, H, D, D]``, None where nothing was absorbed. The last of `tokens` was not fed."""


class ReferenceModel(nn.Module):
    """A whole language model, with an AHN or without.

    Parameters have the names of the base's and the AHN's checkpoints, and are float32 until converted.

    Args:
        base: the shape of the base model.
        ahn: the AHN, with the window and sinks to use; None is the base alone, with full attention.
        recurrence: "chunk" (fast), "fla" (on GPUs) or "naive" (token by token).
    """

    def __init__(self, base: BaseConfig, ahn: AHNConfig | None = None, recurrence: str = "chunk") -> None:
        super().__init__()
        if recurrence not in RECURRENCES:
            raise AHNError(f"recurrence is {recurrence!r}, expected one of {', '.join(RECURRENCES)}")
        self.base, self.ahn, self.recurrence = base, ahn, recurrence
        self.model = nn.ModuleDict(
            {
                "embed_tokens": nn.Embedding(base.vocab_size, base.hidden_size),
                "layers": nn.ModuleList(DecoderLayer(base, _of_layer(i, ahn)) for i in range(base.num_hidden_layers)),
                "norm": RMSNorm(base.hidden_size, base.rms_norm_eps),
            }
        )
        if not base.tie_word_embeddings:
            self.lm_head = nn.Linear(base.hidden_size, base.vocab_size, bias=False)

    def new_cache(self) -> list[LayerCache]:
        """Return an empty cache for each layer, to feed a sequence in several calls."""
        return [LayerCache() for _ in range(self.base.num_hidden_layers)]

    def forward(
        self, input_ids: torch.Tensor, cache: list[LayerCache] | None = None, last: int | None = None
    ) -> torch.Tensor:
        """Return the logits after each token, or only after the last ones.

        Args:
            input_ids: ``[B, T]``; all sequences have one length.
            cache: from `new_cache`: the tokens continue those of earlier calls.
            last: of how many tokens at the end logits are wanted; None for all.

        Returns:
            ``[B, T or last, vocab]``.
        """
        x = self.hidden_states(input_ids, self.ahn, self.new_cache() if cache is None else cache)
        return self.logits(x if last is None else x[:, -last:])

    def hidden_states(
        self, input_ids: torch.Tensor, ahn: AHNConfig | None, cache: list[LayerCache] | None = None
    ) -> torch.Tensor:
        """Return the last layer's output ``[B, T, hidden_size]``, before the norm.

        Args:
            input_ids: ``[B, T]``.
            ahn: may differ from the model's in its lengths, or be None for the base alone.
            cache: as in `forward`. Without one, nothing is kept of a layer but its input: where a gradient is wanted,
                layers are computed once more for it.
        """
        x = self.model["embed_tokens"](input_ids.long())
        for index, layer in enumerate(self.model["layers"]):
            of_layer = _of_layer(index, ahn)
            if cache is not None:
                x = layer(x, cache[index], of_layer, self.recurrence)
            else:
                x = checkpoint(_without_cache, layer, x, of_layer, self.recurrence, use_reentrant=False)
        return x

    def logits(self, x: torch.Tensor) -> torch.Tensor:
        """Return the logits ``[..., vocab]`` of `hidden_states` ``[..., hidden_size]``."""
        x = self.model["norm"](x)
        if self.base.tie_word_embeddings:
            return F.linear(x, self.model["embed_tokens"].weight)
        return self.lm_head(x)

    @torch.no_grad()
    def generate(self, input_ids: torch.Tensor, n: int) -> Generation:
        """Continue ``input_ids [B, T]`` greedily by ``n >= 1`` tokens."""
        cache = self.new_cache()
        logits = [self(input_ids, cache, last=1)]
        for _ in range(n - 1):
            logits.append(self(logits[-1].argmax(-1), cache))
        stacked = torch.cat(logits, dim=1)
        return Generation(stacked.argmax(-1), stacked, [layer.state for layer in cache])


def _of_layer(index: int, ahn: AHNConfig | None) -> AHNConfig | None:
    return None if ahn is not None and index in ahn.full_attention_layers else ahn


def _without_cache(layer: nn.Module, x: torch.Tensor, ahn: AHNConfig | None, recurrence: str) -> torch.Tensor:
    return layer(x, LayerCache(), ahn, recurrence)
