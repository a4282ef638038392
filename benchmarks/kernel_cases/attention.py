"""Paged attention as the benchmark calls it: vLLM's kernel where vLLM is, else one of this benchmark's own."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec

import torch

from kernel_cases.layer import Step
from kernel_cases.own_attention import paged_attention, segments_of
from kernel_cases.setting import Setting
from kernel_cases.timing import Call
from vllm_ahn.kernels.tables import TILE_BLOCKS, compact_block_table, compact_width

MASKED_QUERIES = 1024
"""Queries that share a table where sinks take a mask."""


@dataclass
class Rows:
    """Queries, and the keys they may see."""

    query_start_loc: torch.Tensor
    """``[R + 1]`` int32."""
    lens: torch.Tensor
    """``[R]`` int32, tokens in the row's table."""
    block_table: torch.Tensor
    """``[R, width]`` int32."""
    max_query_len: int
    max_len: int
    window: int | None
    """Keys that a query sees, up to and with its own; None for all."""
    sinks: int = 0
    """Keys at the beginning of the table that it sees beside them."""


def chosen(setting: Setting) -> str:
    """Return ``vllm`` or ``own``."""
    if setting.attention != "auto":
        return setting.attention
    return "vllm" if find_spec("vllm") else "own"


def described(setting: Setting) -> str:
    """Return the kernel in words."""
    if chosen(setting) == "vllm":
        return "vLLM's Triton kernel (unified_attention), as vllm_ahn calls it"
    return "the benchmark's own Triton kernel, not vLLM's, for full attention and window alike"


def attend(step: Step, rows: Rows) -> Call:
    """Return the call for a step's queries; what it needs besides is allocated here."""
    return (_vllm if chosen(step.layer.setting) == "vllm" else _own)(step, rows)


def _own(step: Step, rows: Rows) -> Call:
    model, timer = step.layer.model, step.layer.setting.timer
    multiprocessors = timer.multiprocessors if timer else 1
    segments = segments_of(len(rows.lens), model.kv_heads, rows.max_query_len, multiprocessors)
    return lambda: paged_attention(
        step.query,
        *step.layer.pool.planes[:2],
        step.output,
        rows.query_start_loc,
        rows.lens,
        rows.block_table,
        max_query_len=rows.max_query_len,
        window=rows.window,
        sinks=rows.sinks,
        scale=model.head_size**-0.5,
        segments=segments,
    )


def _vllm(step: Step, rows: Rows) -> Call:
    from vllm_ahn.attention.paged.triton import TritonAttention
    from vllm_ahn.attention.plan import AttentionSpans
    from vllm_ahn.cache.specs import window_spec

    setting, model, pool = step.layer.setting, step.layer.model, step.layer.pool
    spec = window_spec(pool.layout, window=setting.window, sinks=setting.sinks)
    attention = TritonAttention(spec, num_heads=model.heads, device=setting.device)
    sinks = torch.full_like(rows.lens, rows.sinks) if rows.sinks else None
    tables = (rows.query_start_loc, rows.lens, rows.block_table)
    queries = AttentionSpans(*tables, rows.max_query_len, rows.max_len, rows.window, sinks)
    scale = model.head_size**-0.5
    return lambda: attention.attend(pool.window, step.query, step.output, queries, scale)


def full_rows(step: Step, new: int, longest: int) -> Rows:
    """Return rows that see all keys of their requests, each with ``new`` queries."""
    return Rows(step.starts, step.lens, step.window_table, new, longest, None)


def rearranges(setting: Setting) -> bool:
    """Return whether sinks and window fill blocks, as ``AHNWindowSpec.rearrangeable`` says."""
    return setting.sinks % setting.block_size == 0 and setting.window >= setting.block_size


def windowed_rows(step: Step, new: int) -> tuple[Rows, Callable[[], None]]:
    """Return rows that see sinks and window, and the launch that makes their tables, which a model does once a step.

    Args:
        step: the batch.
        new: queries of each request; with more than one there is one request.
    """
    setting, starts, lens = step.layer.setting, step.starts, step.lens
    device, size, rearrange = lens.device, setting.block_size, rearranges(setting)
    requests = None
    # As the planner of vllm_ahn cuts a chunk: so that the window reaches over a row's queries, or for a mask, of which
    # vLLM's kernel visits every key.
    most = min(new, setting.window // size * size if rearrange else MASKED_QUERIES)
    if new > 1:
        first = int(lens[0]) - new
        cuts = range(first - first % size + most, first + new, most)
        starts = torch.tensor([0, *(cut - first for cut in cuts), new], dtype=torch.int32, device=device)
        lens = lens[0] - new + starts[1:]
        requests = torch.zeros(len(lens), dtype=torch.int32, device=device)
    width = compact_width(setting.window, setting.sinks, size, most)
    compact = torch.zeros((len(lens), (width + TILE_BLOCKS + 15) & ~15), dtype=torch.int32, device=device)
    compact_lens = torch.zeros_like(lens)

    def compaction() -> None:
        sizes = (setting.window, setting.sinks, size, rearrange)
        compact_block_table(step.window_table, requests, starts, lens, *sizes, compact, compact_lens)

    compaction()
    window, sinks = (setting.capacity, 0) if rearrange else (setting.window, setting.sinks)
    return Rows(starts, compact_lens, compact, most, width * size, window, sinks), compaction
