"""A decoder layer, with an AHN or without, and what it keeps of the tokens so far."""

from __future__ import annotations

import dataclasses

import torch
import torch.nn.functional as F
from torch import nn

from vllm_ahn.config import AHNConfig
from vllm_ahn.reference.base import BaseConfig
from vllm_ahn.reference.layers import RMSNorm, at_least_float32, rotate, window_attention
from vllm_ahn.reference.memory import make_memory


@dataclasses.dataclass
class LayerCache:
    """What one layer knows of all tokens so far: nothing is dropped, only masked.

    Attributes:
        k, v: ``[B, n, Hkv, D]``, keys after RoPE.
        g, b: ``[B, n, H]``; None in layers without a memory.
        state: ``[B, H, D, D]`` after the last absorbed token; None before the first.
    """

    k: torch.Tensor | None = None
    v: torch.Tensor | None = None
    g: torch.Tensor | None = None
    b: torch.Tensor | None = None
    state: torch.Tensor | None = None

    @property
    def length(self) -> int:
        """Tokens seen so far."""
        return 0 if self.k is None else self.k.shape[1]


class Attention(nn.Module):
    """The base's attention without the attending itself: projections, norms and RoPE."""

    def __init__(self, base: BaseConfig) -> None:
        super().__init__()
        q_size, kv_size = (n * base.head_dim for n in (base.num_attention_heads, base.num_key_value_heads))
        self.q_proj = nn.Linear(base.hidden_size, q_size, bias=base.qkv_bias)
        self.k_proj = nn.Linear(base.hidden_size, kv_size, bias=base.qkv_bias)
        self.v_proj = nn.Linear(base.hidden_size, kv_size, bias=base.qkv_bias)
        self.o_proj = nn.Linear(q_size, base.hidden_size, bias=base.o_bias)
        self.q_norm = RMSNorm(base.head_dim, base.rms_norm_eps) if base.qk_norm else nn.Identity()
        self.k_norm = RMSNorm(base.head_dim, base.rms_norm_eps) if base.qk_norm else nn.Identity()
        self.base = base

    def project(self, hidden: torch.Tensor, positions: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Return ``q``, ``k``, ``v`` ``[B, T, heads, D]`` after norm and RoPE, and ``raw_q``, the queries before both.

        Args:
            hidden: ``[B, T, hidden_size]``.
            positions: ``[T]``, absolute.
        """
        raw_q, k, v = (
            projection(hidden).unflatten(-1, (-1, self.base.head_dim))
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        q = rotate(self.q_norm(raw_q), positions, self.base.rope_theta)
        k = rotate(self.k_norm(k), positions, self.base.rope_theta)
        return q, k, v, raw_q


class MLP(nn.Module):
    """The base's gated MLP, ``down(silu(gate x) up x)``."""

    def __init__(self, base: BaseConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(base.hidden_size, base.intermediate_size, bias=False)
        self.up_proj = nn.Linear(base.hidden_size, base.intermediate_size, bias=False)
        self.down_proj = nn.Linear(base.intermediate_size, base.hidden_size, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Router(nn.Module):
    """``sigmoid(alpha_h ln r + beta_h)``: how much head ``h`` takes of what the memory reads out."""

    def __init__(self, heads: int) -> None:
        super().__init__()
        self.alpha = nn.Parameter(torch.zeros(heads))
        self.beta = nn.Parameter(torch.zeros(heads))

    def forward(self, r: torch.Tensor) -> torch.Tensor:
        """Map ``r [T]``, tokens in the memory per token of window, to ``[T, H]``."""
        alpha, beta = at_least_float32(self.alpha), at_least_float32(self.beta)
        return torch.sigmoid(alpha * r.log()[:, None] + beta)


class DecoderLayer(nn.Module):
    """A base's layer; with an AHN its attention sees window and sinks, and a memory, if any, adds to it."""

    def __init__(self, base: BaseConfig, ahn: AHNConfig | None) -> None:
        super().__init__()
        heads = base.num_attention_heads
        self.input_layernorm = RMSNorm(base.hidden_size, base.rms_norm_eps)
        self.self_attn = Attention(base)
        self.post_attention_layernorm = RMSNorm(base.hidden_size, base.rms_norm_eps)
        self.mlp = MLP(base)
        self.rope_theta = base.rope_theta
        if ahn is not None and ahn.memory is not None:
            memory = make_memory(ahn.memory, base.hidden_size, heads, base.head_dim, ahn.use_q_proj)
            self.ahn = nn.ModuleDict({"fn": memory})
            if ahn.use_router:
                self.ahn_router = Router(heads)

    def forward(self, x: torch.Tensor, cache: LayerCache, ahn: AHNConfig | None, recurrence: str) -> torch.Tensor:
        """Run the layer on the tokens after those in `cache`, and add them to it.

        Args:
            x: ``[B, T, hidden_size]``.
            cache: what the layer knows of the tokens before.
            ahn: how much the layer sees and whether its memory adds to it; None is full attention.
            recurrence: one of `vllm_ahn.reference.memory.RECURRENCES`.

        Returns:
            ``[B, T, hidden_size]``.
        """
        start, length = cache.length, x.shape[1]
        positions = torch.arange(start, start + length, device=x.device)
        hidden = self.input_layernorm(x)
        q, k, v, raw_q = self.self_attn.project(hidden, positions)
        cache.k, cache.v = _append(cache.k, k), _append(cache.v, v)
        if ahn is None:
            attention = window_attention(q, cache.k, cache.v, start, None, 0)
        else:
            attention = window_attention(q, cache.k, cache.v, start, ahn.window, ahn.sinks)
            if ahn.memory is not None:
                attention = attention + self._memory(hidden, q, raw_q, positions, cache, ahn, recurrence)
        x = x + self.self_attn.o_proj(attention.flatten(-2))
        return x + self.mlp(self.post_attention_layernorm(x))

    def _memory(
        self,
        hidden: torch.Tensor,
        q: torch.Tensor,
        raw_q: torch.Tensor,
        positions: torch.Tensor,
        cache: LayerCache,
        ahn: AHNConfig,
        recurrence: str,
    ) -> torch.Tensor:
        """Return what the memory adds to the tokens at `positions`, ``[B, T, H, D]``: zeros up to ``W + S``."""
        assert cache.k is not None and cache.v is not None
        window, sinks = ahn.window, ahn.sinks
        fn = self.ahn["fn"]
        g, b = fn.gates(hidden)
        cache.g, cache.b = _append(cache.g, g), _append(cache.b, b)
        start, end = int(positions[0]), int(positions[-1]) + 1
        # Token t >= W + S absorbs token t - W, then reads.
        reading = max(start, window + sinks)
        added = torch.zeros_like(q[:, : min(reading, end) - start])
        if reading >= end:
            return added
        new = slice(reading - start, end - start)
        old = slice(reading - window, end - window)
        queries = q[:, new]
        if fn.q_proj is not None:
            queries = rotate(fn.q_proj(raw_q[:, new]), positions[new], self.rope_theta)
        m, cache.state = fn.absorb_and_read(
            queries,
            cache.k[:, old],
            cache.v[:, old],
            cache.g[:, old],
            cache.b[:, old],
            hidden[:, new],
            cache.state,
            recurrence,
        )
        if ahn.use_router:
            r = at_least_float32(positions[new] - window - sinks + 1) / window
            m = (m * self.ahn_router(r)[..., None]).to(m.dtype)
        return torch.cat((added, m), dim=1)


def _append(old: torch.Tensor | None, new: torch.Tensor) -> torch.Tensor:
    return new if old is None else torch.cat((old, new), dim=1)
