"""Qwen2 and Qwen3 decoders, each layer with an AHN or without. Parameters have the checkpoints' names."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from vllm_ahn.config import AHNConfig
from vllm_ahn.errors import AHNError

from .layers import RMSNorm, at_least_float32, rotate, window_attention
from .memory import RECURRENCES, GatedDeltaNet, make_memory


@dataclasses.dataclass(frozen=True)
class BaseConfig:
    """Shape of a base model, in the terms of its ``config.json``."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rms_norm_eps: float
    rope_theta: float
    tie_word_embeddings: bool
    qkv_bias: bool
    o_bias: bool
    qk_norm: bool

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> BaseConfig:
        """From a ``config.json``. Raises `AHNError` for what is not a plain Qwen2 or Qwen3."""
        model_type = config.get("model_type")
        if model_type not in ("qwen2", "qwen3"):
            raise AHNError(f"config.json: model_type is {model_type!r}, expected 'qwen2' or 'qwen3'")
        if config.get("use_sliding_window"):
            raise AHNError("config.json: use_sliding_window is true, expected a base with full attention")
        rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
        if rope.get("rope_type", rope.get("type", "default")) != "default":
            raise AHNError(f"config.json: rope scaling is {rope!r}, expected none")
        if config.get("hidden_act", "silu") != "silu":
            raise AHNError(f"config.json: hidden_act is {config['hidden_act']!r}, expected 'silu'")
        qwen3 = model_type == "qwen3"
        heads = config["num_attention_heads"]
        bias = bool(config.get("attention_bias", False)) if qwen3 else True
        return cls(
            vocab_size=config["vocab_size"],
            hidden_size=config["hidden_size"],
            intermediate_size=config["intermediate_size"],
            num_hidden_layers=config["num_hidden_layers"],
            num_attention_heads=heads,
            num_key_value_heads=config.get("num_key_value_heads", heads),
            head_dim=config.get("head_dim") or (128 if qwen3 else config["hidden_size"] // heads),
            rms_norm_eps=config["rms_norm_eps"],
            rope_theta=float(rope.get("rope_theta", config.get("rope_theta", 10000.0))),
            tie_word_embeddings=bool(config.get("tie_word_embeddings", False)),
            qkv_bias=bias,
            o_bias=qwen3 and bias,
            qk_norm=qwen3,
        )


@dataclasses.dataclass
class LayerCache:
    """What one layer knows of the tokens so far, all of them: nothing is dropped, only masked.

    ``k``, ``v`` ``[B, n, Hkv, D]`` after RoPE; ``g``, ``b`` ``[B, n, H]``; ``state [B, H, D, D]`` after the
    last absorbed token, None before the first. Layers without a memory have ``g``, ``b`` and ``state`` None.
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


@dataclasses.dataclass(frozen=True)
class Generation:
    """What `ReferenceModel.generate` returns."""

    tokens: torch.Tensor
    """[B, n] int64"""
    logits: torch.Tensor
    """[B, n, vocab]: those that each token was taken from"""
    states: list[torch.Tensor | None]
    """Per layer ``[B, H, Dk, Dv]``, None where nothing was absorbed. The last of `tokens` was not fed."""


class Attention(nn.Module):
    """The base model's projections; the queries are also returned as they are before norm and RoPE."""

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
        """``q``, ``k``, ``v`` ``[B, T, heads, D]`` after norm and RoPE, and ``raw_q``."""
        raw_q, k, v = (
            projection(hidden).unflatten(-1, (-1, self.base.head_dim))
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        q = rotate(self.q_norm(raw_q), positions, self.base.rope_theta)
        k = rotate(self.k_norm(k), positions, self.base.rope_theta)
        return q, k, v, raw_q


class MLP(nn.Module):
    def __init__(self, base: BaseConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(base.hidden_size, base.intermediate_size, bias=False)
        self.up_proj = nn.Linear(base.hidden_size, base.intermediate_size, bias=False)
        self.down_proj = nn.Linear(base.intermediate_size, base.hidden_size, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Router(nn.Module):
    """``sigmoid(alpha_h ln r + beta_h)``: how much of the memory's read-out head ``h`` takes."""

    def __init__(self, heads: int) -> None:
        super().__init__()
        self.alpha = nn.Parameter(torch.zeros(heads))
        self.beta = nn.Parameter(torch.zeros(heads))

    def forward(self, r: torch.Tensor) -> torch.Tensor:
        """``r [T]``, tokens in the memory per token of window, to ``[T, H]``."""
        alpha, beta = at_least_float32(self.alpha), at_least_float32(self.beta)
        return torch.sigmoid(alpha * r.log()[:, None] + beta)


class DecoderLayer(nn.Module):
    """A base model's layer; with an AHN its attention sees window and sinks and is helped by a memory, if any."""

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
        """``x [B, T, hidden]`` of the tokens after those in `cache`, which is brought up to date.

        `ahn` says how much the layer sees and whether its memory helps; None is full attention.
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
        """What the memory adds to each token at `positions`: ``[B, T, H, D]``, zeros up to ``W + S``."""
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
        if isinstance(fn, GatedDeltaNet) and ahn.use_q_proj:
            queries = rotate(fn.q_proj(raw_q[:, new]), positions[new], self.rope_theta)
        else:
            queries = q[:, new]
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


class ReferenceModel(nn.Module):
    """A whole language model: ``base`` alone (``ahn`` None: full attention) or with an AHN.

    ``recurrence``: "chunk" (fast), "fla" (on GPUs) or "naive" (token by token). Parameters are named as in checkpoints
    of the base and of the AHN and are float32 until converted; give `AHNConfig` the window and sinks to use.
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
        """One empty cache a layer, to feed a sequence in several calls."""
        return [LayerCache() for _ in range(self.base.num_hidden_layers)]

    def forward(
        self, input_ids: torch.Tensor, cache: list[LayerCache] | None = None, last: int | None = None
    ) -> torch.Tensor:
        """Logits ``[B, T, vocab]`` after each of ``input_ids [B, T]``, or only after the ``last`` of them.

        With a `cache` from `new_cache` the tokens continue those of earlier calls. All ``B`` sequences have
        one length.
        """
        x = self.hidden_states(input_ids, self.ahn, self.new_cache() if cache is None else cache)
        return self.logits(x if last is None else x[:, -last:])

    def hidden_states(
        self, input_ids: torch.Tensor, ahn: AHNConfig | None, cache: list[LayerCache] | None = None
    ) -> torch.Tensor:
        """The last layer's output ``[B, T, hidden]``, before the norm, with the window, sinks and memory of `ahn`.

        `ahn` may differ from the model's in its lengths, or be None for the base alone. Without a `cache` nothing is
        kept of a layer but its input: where a gradient is wanted, layers are computed once more for it.
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
        """``[..., vocab]`` of `hidden_states` ``[..., hidden]``."""
        x = self.model["norm"](x)
        if self.base.tie_word_embeddings:
            return F.linear(x, self.model["embed_tokens"].weight)
        return self.lm_head(x)

    @torch.no_grad()
    def generate(self, input_ids: torch.Tensor, n: int) -> Generation:
        """Greedy continuation of ``input_ids [B, T]`` by ``n >= 1`` tokens."""
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


def _append(old: torch.Tensor | None, new: torch.Tensor) -> torch.Tensor:
    return new if old is None else torch.cat((old, new), dim=1)
