"""Which tokens a step's prefills absorb, and where those lie: worked out once, for all layers."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch.nn import functional as F

from vllm_ahn.kernels.settled import Settling

CHUNK_SIZE = 64
"""Tokens that flash-linear-attention's kernels treat at once."""


@dataclass(frozen=True)
class Stretch:
    """Tokens that one request absorbs in this step, from one boundary of its state to another.

    Those since the first boundary that earlier steps have absorbed are absorbed again, without a read.
    """

    request: int
    """Its index in the block tables."""
    first_token: int
    """Index in the batch of its first token that reads; the others follow."""
    first_position: int
    """Position of that token, at least ``W + S``."""
    num_reads: int
    """Tokens that read, at least 1, each after one more token is absorbed."""
    source: int
    """The boundary whose state is read; up to ``W + S`` it is fresh."""
    target: int
    """The boundary whose state is written: the position after the last token that reads."""


@dataclass(frozen=True)
class PrefillPlan:
    """The stretches of one pass, for all layers, on the device."""

    lengths: tuple[int, ...]
    """Tokens that each of the ``R`` stretches absorbs, ``N`` in all."""
    reads: torch.Tensor
    """``[N]`` int32, the batch's token that reads after each absorbed one, -1 where none does."""
    positions: torch.Tensor
    """``[N]`` int64, positions of the reading tokens; at least ``W + S`` also where none reads."""
    slots: torch.Tensor
    """``[N]`` int64, slots of the absorbed tokens in the window pages."""
    requests: torch.Tensor
    """``[R]`` int32, indices in the state group's block table."""
    sources: torch.Tensor
    """``[R]`` int32, which of the request's states is read, -1 where it is fresh: zero, whatever its pages hold."""
    targets: torch.Tensor
    """``[R]`` int32, which of the request's states is written."""
    cu_seqlens: torch.Tensor
    """``[R + 1]`` int32, where stretches begin and end. Caches are keyed by it: new in every step."""
    chunk_indices: torch.Tensor
    """``[num_chunks, 2]`` int32, stretch of each chunk and its number therein."""


def plan_prefill(
    stretches: Sequence[Stretch], window_table: torch.Tensor, rule: Settling, *, block_size: int
) -> PrefillPlan:
    """Work out which tokens a pass absorbs and where they lie. One copy to the device, no synchronisation.

    Args:
        stretches: at least one.
        window_table: ``[num_requests, num_blocks]`` int32 on the device, the window group's block table.
        rule: of boundaries and slots.
        block_size: tokens in a window page.
    """

    def field(name: str) -> torch.Tensor:
        return torch.tensor([getattr(stretch, name) for stretch in stretches])

    requests, sources, targets, reads = map(field, ("request", "source", "target", "num_reads"))
    first = rule.absorbed(sources)
    lengths = targets - rule.window - first
    starts = lengths.cumsum(0) - lengths
    within = torch.arange(int(lengths.sum())) - starts.repeat_interleave(lengths)
    read = within - (lengths - reads).repeat_interleave(lengths)  # below 0 for tokens that are absorbed again
    absorbed = first.repeat_interleave(lengths) + within
    chunks = (lengths + CHUNK_SIZE - 1) // CHUNK_SIZE
    chunk_starts = chunks.cumsum(0) - chunks
    chunk_stretch = torch.arange(len(stretches)).repeat_interleave(chunks)
    parts = (
        torch.where(read < 0, -1, field("first_token").repeat_interleave(lengths) + read),
        absorbed,
        requests.repeat_interleave(lengths),
        requests,
        torch.where(first == rule.sinks, -1, rule.slot(sources)),
        rule.slot(targets),
        torch.cat((starts, lengths.sum(0, keepdim=True))),
        torch.stack((chunk_stretch, torch.arange(len(chunk_stretch)) - chunk_starts[chunk_stretch]), dim=-1).flatten(),
    )
    # Each part begins at 16 bytes, on which kernels are specialised.
    packed = torch.cat([F.pad(part.int(), (0, -len(part) % 4)) for part in parts])
    device = window_table.device
    if device.type == "cuda":
        packed = packed.pin_memory()
    pieces = packed.to(device, non_blocking=True).split([len(part) + -len(part) % 4 for part in parts])
    on_device = [piece[: len(part)] for piece, part in zip(pieces, parts, strict=True)]
    reading, absorbed, token_requests, requests, source_slots, target_slots, cu_seqlens, chunk_indices = on_device
    block_ids = window_table[token_requests, absorbed // block_size].long()
    return PrefillPlan(
        lengths=tuple(lengths.tolist()),
        reads=reading,
        positions=(absorbed.long() + rule.window).clamp(min=rule.capacity),
        slots=block_ids * block_size + absorbed % block_size,
        requests=requests,
        sources=source_slots,
        targets=target_slots,
        cu_seqlens=cu_seqlens,
        chunk_indices=chunk_indices.view(-1, 2),
    )
