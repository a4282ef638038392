"""The three compressed memories: gates from the evicted token's hidden state, recurrence, read-out."""

import math

import torch
import torch.nn.functional as F
from torch import nn

from vllm_ahn.kernels import chunk_recurrence, l2_normalize, naive_recurrence

from .layers import RMSNorm, at_least_float32

NORM_EPS = 1e-5
"""Of the memory's own norm, whatever the base model's is."""

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
    """`chunk_recurrence` by flash-linear-attention's Triton kernels, for GPUs; ``o`` is in the dtype of ``v``."""
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
    """One layer's compressed memory; sub-classes say what `gates` and `read_out` are."""

    delta: bool
    scale: float

    def __init__(self, hidden_size: int, heads: int, head_dim: int) -> None:
        super().__init__()
        self.o_proj = HeadwiseLinear(heads, head_dim)

    @torch.no_grad()
    def begin(self, slowest: int) -> None:
        """Sets what training begins from: ``o_proj`` is zero, so that nothing is added to what the window sees.

        Where heads decay, the slowest keeps ``1 / e`` of what it absorbed for `slowest` tokens.
        """
        self.o_proj.weight.zero_()

    def gates(self, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Decay ``g <= 0`` and rate ``b``, float32 ``[B, T, H]``, from ``hidden [B, T, hidden_size]``."""
        raise NotImplementedError

    def read_out(self, o: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
        """Normed, gated read-out ``y [B, T, H, D]`` of ``o [B, T, H, D]``; `hidden` of the readers."""
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
        """Absorb ``T`` evicted tokens; after each, read once. Returns ``m [B, T, H, D]`` and the state.

        ``q [B, T, H, D]`` and ``hidden [B, T, hidden_size]`` belong to the tokens that read; ``k``, ``v``
        ``[B, T, Hkv, D]`` and ``g``, ``b`` ``[B, T, H]`` to those that were evicted. ``state [B, H, D, D]``
        float32 or None for zeros. ``recurrence``: one of `RECURRENCES`.
        """
        run = RECURRENCES[recurrence]
        # The recurrence adds up over thousands of tokens: its own choice of dtypes stands, whatever training casts to.
        with torch.autocast(q.device.type, enabled=False):
            o, state = run(l2_normalize(q), l2_normalize(k), v, g, b, self.scale, self.delta, state)
        return self.o_proj(self.read_out(o, hidden).to(self.o_proj.weight.dtype)), state


class DeltaNet(Memory):
    """Delta rule without decay."""

    delta = True

    def __init__(self, hidden_size: int, heads: int, head_dim: int) -> None:
        super().__init__(hidden_size, heads, head_dim)
        self.scale = head_dim**-0.5
        self.b_proj = nn.Linear(hidden_size, heads, bias=False)
        self.g_proj = nn.Linear(hidden_size, heads, bias=False)
        self.o_norm = RMSNorm(head_dim, NORM_EPS)

    def gates(self, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        b = at_least_float32(self.b_proj(hidden)).sigmoid()
        return torch.zeros_like(b), b

    def read_out(self, o: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
        return self.o_norm(o) * F.silu(self.g_proj(hidden))[..., None]


class GatedDeltaNet(DeltaNet):
    """Delta rule with decay; ``use_q_proj`` adds a query projection of its own."""

    def __init__(self, hidden_size: int, heads: int, head_dim: int, use_q_proj: bool = False) -> None:
        super().__init__(hidden_size, heads, head_dim)
        self.a_proj = nn.Linear(hidden_size, heads, bias=False)
        self.A_log = nn.Parameter(torch.empty(heads).uniform_(1, 16).log())
        self.dt_bias = nn.Parameter(torch.full((heads,), -4.0))
        if use_q_proj:
            self.q_proj = HeadwiseLinear(heads, head_dim)

    @torch.no_grad()
    def begin(self, slowest: int) -> None:
        """As `Memory.begin`; a query projection of its own begins as the identity."""
        super().begin(slowest)
        self.A_log.copy_(_spread_decays(self.dt_bias, slowest))
        if hasattr(self, "q_proj"):
            self.q_proj.weight.copy_(torch.eye(self.q_proj.weight.shape[-1]).expand_as(self.q_proj.weight))

    def gates(self, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        _, b = super().gates(hidden)
        return -self.A_log.exp() * F.softplus(at_least_float32(self.a_proj(hidden)) + self.dt_bias), b


class Mamba2(Memory):
    """Decayed linear attention; the step size ``d`` is the rate and, times ``-exp(A_log)``, the decay."""

    delta = False
    scale = 1.0

    def __init__(self, hidden_size: int, heads: int, head_dim: int) -> None:
        super().__init__(hidden_size, heads, head_dim)
        self.dt_proj = nn.Linear(hidden_size, heads)
        self.g_proj = nn.Linear(hidden_size, heads)
        self.A_log = nn.Parameter(torch.empty(heads).uniform_(1, 16).log())
        self.dt_bias = nn.Parameter(torch.full((heads,), -4.0))
        self.norm = RMSNorm(heads * head_dim, NORM_EPS)

    @torch.no_grad()
    def begin(self, slowest: int) -> None:
        """As `Memory.begin`."""
        super().begin(slowest)
        self.A_log.copy_(_spread_decays(self.dt_bias, slowest))

    def gates(self, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        d = F.softplus(at_least_float32(self.dt_proj(hidden)) + self.dt_bias)
        return -self.A_log.exp() * d, d

    def read_out(self, o: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
        gated = o * F.silu(self.g_proj(hidden))[..., None]
        return self.norm(gated.flatten(-2)).view(o.shape)


def _spread_decays(dt_bias: torch.Tensor, slowest: int) -> torch.Tensor:
    """``A_log [H]`` with which heads keep ``1 / e`` for `FASTEST` to `slowest` tokens, evenly on a log scale.

    How long is hard to learn for a head that has forgotten before it is asked.
    """
    kept = torch.logspace(math.log10(FASTEST), math.log10(max(slowest, FASTEST)), len(dt_bias))
    return -(kept * F.softplus(dt_bias)).log()


def make_memory(name: str, hidden_size: int, heads: int, head_dim: int, use_q_proj: bool) -> Memory:
    """The memory called `name` in a checkpoint's ``_ahn_implementation``."""
    if name == "GatedDeltaNet":
        return GatedDeltaNet(hidden_size, heads, head_dim, use_q_proj)
    return {"DeltaNet": DeltaNet, "Mamba2": Mamba2}[name](hidden_size, heads, head_dim)
