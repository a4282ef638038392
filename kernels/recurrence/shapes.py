"""Checks shared by the recurrence functions."""

import torch


def compute_dtype(*tensors: torch.Tensor) -> torch.dtype:
    """Return float64 if any of the tensors is, else float32."""
    return torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32


def check_sequence(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor,
    b: torch.Tensor,
    state: torch.Tensor | None,
) -> None:
    """Raise ``ValueError`` unless the shapes are those of `naive_recurrence`."""
    if q.dim() != 4 or k.dim() != 4 or v.dim() != 4:
        raise ValueError(
            f"q, k and v must be [B, T, heads, D], got {tuple(q.shape)}, {tuple(k.shape)}, {tuple(v.shape)}"
        )
    batch, length, heads, key_dim = q.shape
    kv_heads = k.shape[2]
    if heads % kv_heads:
        raise ValueError(f"{heads} query heads are not a multiple of {kv_heads} key/value heads")
    expected = {
        "k": (k, (batch, length, kv_heads, key_dim)),
        "v": (v, (batch, length, kv_heads, v.shape[-1])),
        "g": (g, (batch, length, heads)),
        "b": (b, (batch, length, heads)),
    }
    if state is not None:
        expected["state"] = (state, (batch, heads, key_dim, v.shape[-1]))
    for name, (tensor, shape) in expected.items():
        if tensor.shape != shape:
            raise ValueError(f"{name} must have shape {shape}, got {tuple(tensor.shape)}")
