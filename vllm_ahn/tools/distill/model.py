"""Teacher and student over one set of frozen weights, and the loss between them."""

from __future__ import annotations

import dataclasses
from typing import Literal

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from vllm_ahn.checkpoint.tensors import is_ahn_tensor
from vllm_ahn.reference import ReferenceModel

POSITIONS = 1024
"""Positions whose logits over the vocabulary are held at a time."""


class Distillation(nn.Module):
    """The reference model, of which only the memories are trained.

    Args:
        model: the base with new memories.
        loss: see `vllm_ahn.tools.distill.settings.Settings.loss`.
        checkpointing: see `vllm_ahn.tools.distill.settings.Settings.checkpointing`.
    """

    def __init__(self, model: ReferenceModel, loss: Literal["kl", "ce"], checkpointing: bool = True) -> None:
        super().__init__()
        self.model = model
        self.loss = loss
        self.checkpointing = checkpointing
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(is_ahn_tensor(name))

    def forward(self, input_ids: torch.Tensor, window: int, sinks: int) -> dict[str, torch.Tensor]:
        """Compute the mean loss over the positions that read the memory, in nats a token.

        Args:
            input_ids: ``[B, T]``, ``T > window + sinks``.
            window: W, tokens.
            sinks: S, tokens.

        Returns:
            ``loss``, a scalar, as the trainer takes it.
        """
        assert self.model.ahn is not None
        beyond = slice(window + sinks, input_ids.shape[1])
        ahn = dataclasses.replace(self.model.ahn, window=window, sinks=sinks)
        cache = None if self.checkpointing else self.model.new_cache()
        student = self.model.hidden_states(input_ids, ahn, cache)[:, beyond].flatten(0, 1)
        if self.loss == "kl":
            with torch.no_grad():
                target = self.model.hidden_states(input_ids, None)[:, beyond].flatten(0, 1)
        else:
            # The last position has no next token.
            target = input_ids[:, 1:][:, beyond].flatten()
            student = student.unflatten(0, (len(input_ids), -1))[:, :-1].flatten(0, 1)
        losses = [
            checkpoint(
                self._loss, student[first : first + POSITIONS], target[first : first + POSITIONS], use_reentrant=False
            )
            for first in range(0, len(student), POSITIONS)
        ]
        return {"loss": torch.stack(losses).sum() / len(student)}

    def _loss(self, student: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        logits = self.model.logits(student).float()
        if self.loss == "ce":
            return F.cross_entropy(logits, target, reduction="sum")
        with torch.no_grad():
            teacher = self.model.logits(target).float().log_softmax(-1)
        return F.kl_div(logits.log_softmax(-1), teacher, reduction="sum", log_target=True)


def trained_tensors(model: ReferenceModel) -> dict[str, torch.Tensor]:
    """Return the AHN's tensors under their names in checkpoints."""
    return {name: tensor.detach() for name, tensor in model.state_dict().items() if is_ahn_tensor(name)}
