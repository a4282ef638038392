"""What all memories share: the recurrence, the projection of what is read, and where training begins."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import nn

from vllm_ahn.kernels import chunk_recurrence, l2_normalize, naive_recurrence

NORM_EPS = 1e-5
"""Epsilon of the memory's own norm, whatever the base model's is."""

FASTEST = 32
"""Tokens after which the quickest head of a new memory keeps ``1 / e`` of what it absorbed."""


def fla_recurrence(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor,
    b: torch.Tensor,
    scale: float,
    delta: bool,
    state: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute `chunk_recurrence` by flash-linear-attention's kernels, on GPUs; ``o`` is in the dtype of ``v``."""
    from fla.ops.gated_delta_rule import chunk_gated_delta_rule
    from fla.ops.simple_gla import chunk_simple_gla

    group = q.shape[2] // k.shape[2]
    q = q.to(v.dtype)
    k, v = k.to(v.dtype).repeat_interleave(group, dim=2), v.repeat_interleave(group, dim=2)
    if delta:
        return chunk_gated_delta_rule(q, k, v, g, b, scale=scale, initial_state=state, output_final_state=True)
    rated = (v * b[..., None]).to(v.dtype)
    return chunk_simple_gla(q, k, rated, g, scale=scale, initial_state=state, output_final_state=True)


RECURRENCES = {"naive": naive_recurrence, "chunk": chunk_recurrence, "fla": fla_recurrence}


class HeadwiseLinear(nn.Module):
    """A matrix of its own for each head: ``y[h] = x[h] @ weight[h]``, ``weight [H, D_in, D_out]``."""

    def __init__(self, heads: int, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(heads, dim, dim) * dim**-0.5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.einsum("...hd,hde->...he", x, self.weight)


class Memory(nn.Module):
    """One layer's compressed memory; subclasses say what `gates` and `read_out` are.

    Args:
        hidden_size: width of the hidden states.
        heads: query heads of the model, each of which has a state.
        head_dim: size of a head.
        use_q_proj: the memory has a query projection of its own, where its class knows one.

    Attributes:
        q_proj: that projection, or None.
    """

    delta: bool
    """The delta rule subtracts from a value what the state already answers to its key."""

    unused: tuple[str, ...] = ()
    """Parameters that published checkpoints hold and no formula has."""

    def __init__(self, hidden_size: int, heads: int, head_dim: int, use_q_proj: bool = False) -> None:
        super().__init__()
        self.scale = head_dim**-0.5
        self.o_proj = HeadwiseLinear(heads, head_dim)
        self.q_proj: HeadwiseLinear | None = None

    @torch.no_grad()
    def begin(self, slowest: int) -> None:
        """Set what training begins from: ``o_proj`` is zero, so that nothing is added to what the window sees.

        Where heads decay, the slowest keeps ``1 / e`` of what it absorbed for `slowest` tokens. A query projection of
        the memory's own begins as the identity.
        """
        self.o_proj.weight.zero_()
        if self.q_proj is not None:
            self.q_proj.weight.copy_(torch.eye(self.q_proj.weight.shape[-1]).expand_as(self.q_proj.weight))

    def gates(self, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return decay ``g <= 0`` and rate ``b``, float32 ``[B, T, H]``, from ``hidden [B, T, hidden_size]``."""
        raise NotImplementedError

    def read_out(self, o: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
        """Norm and gate ``o [B, T, H, D]``, what was read, by the ``hidden [B, T, hidden_size]`` of the readers."""
        raise NotImplementedError

    def absorb_and_read(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        g: torch.Tensor,
        b: torch.Tensor,
        hidden: torch.Tensor,
        state: torch.Tensor | None,
        recurrence: str,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Absorb ``T`` evicted tokens, and read once after each.

        Args:
            q: ``[B, T, H, D]``, of the tokens that read.
            k, v: ``[B, T, Hkv, D]``, of those that were evicted.
            g, b: ``[B, T, H]``, of those that were evicted.
            hidden: ``[B, T, hidden_size]``, of the tokens that read.
            state: ``[B, H, D, D]`` float32, or None for zeros.
            recurrence: one of `RECURRENCES`.

        Returns:
            ``m [B, T, H, D]``, what the memory adds to the attention output, and the state after the last token.
        """
        run = RECURRENCES[recurrence]
        # The recurrence adds up over thousands of tokens: its own choice of dtypes stands, whatever training casts to.
        with torch.autocast(q.device.type, enabled=False):
            o, state = run(l2_normalize(q), l2_normalize(k), v, g, b, self.scale, self.delta, state)
        return self.o_proj(self.read_out(o, hidden).to(self.o_proj.weight.dtype)), state


def decay_parameters(heads: int) -> tuple[nn.Parameter, nn.Parameter]:
    """Return ``A_log`` and ``dt_bias [H]`` of heads that forget, drawn as usual for state-space models."""
    return nn.Parameter(torch.empty(heads).uniform_(1, 16).log()), nn.Parameter(torch.full((heads,), -4.0))


def spread_decays(dt_bias: torch.Tensor, slowest: int) -> torch.Tensor:
    """Return the ``A_log [H]`` with which heads keep ``1 / e`` for `FASTEST` to `slowest` tokens, on a log scale.

    How long is hard to learn for a head that has forgotten before it is asked.
    """
    kept = torch.logspace(math.log10(FASTEST), math.log10(max(slowest, FASTEST)), len(dt_bias))
    return -(kept * F.softplus(dt_bias)).log()
