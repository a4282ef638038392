"""Paged attention as the benchmark calls it: vLLM's kernel where vLLM is, else one of this benchmark's own."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec

import torch

from kernel_cases.own_attention import paged_attention, segments_of
from kernel_cases.pool import Pool
from kernel_cases.setting import Model, Setting
from vllm_ahn.kernels.tables import TILE_BLOCKS, compact_block_table, compact_width


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


MASKED_QUERIES = 1024
"""Queries that share a table where sinks take a mask."""

Attend = Callable[[torch.Tensor, torch.Tensor], None]
"""Attention of queries ``[num_tokens, H, D]`` into an output shaped like them."""


def chosen(setting: Setting) -> str:
    """``vllm`` or ``own``."""
    if setting.attention != "auto":
        return setting.attention
    return "vllm" if find_spec("vllm") else "own"


def described(setting: Setting) -> str:
    return {
        "vllm": "vLLM's Triton kernel (unified_attention), as vllm_ahn calls it",
        "own": "the benchmark's own Triton kernel, not vLLM's, for full attention and window alike",
    }[chosen(setting)]


def attend(setting: Setting, model: Model, pool: Pool, rows: Rows) -> Attend:
    """The kernel for some rows; what it needs besides is allocated here."""
    make = _vllm if chosen(setting) == "vllm" else _own
    return make(setting, model, pool, rows)


def _own(setting: Setting, model: Model, pool: Pool, rows: Rows) -> Attend:
    processors = setting.timer.multiprocessors if setting.timer else 1
    segments = segments_of(len(rows.lens), model.kv_heads, rows.max_query_len, processors)

    def call(query: torch.Tensor, output: torch.Tensor) -> None:
        paged_attention(
            query,
            *pool.planes[:2],
            output,
            rows.query_start_loc,
            rows.lens,
            rows.block_table,
            max_query_len=rows.max_query_len,
            window=rows.window,
            sinks=rows.sinks,
            scale=model.head_size**-0.5,
            segments=segments,
        )

    return call


def _vllm(setting: Setting, model: Model, pool: Pool, rows: Rows) -> Attend:
    from vllm_ahn.attention.gpu.rows import AttentionRows
    from vllm_ahn.attention.gpu.triton_attention import TritonAttention
    from vllm_ahn.cache.specs import window_spec

    spec = window_spec(pool.window.layout, window=setting.window, sinks=setting.sinks)
    attention = TritonAttention(spec, num_heads=model.heads, device=setting.device)
    attention_rows = AttentionRows(
        rows.query_start_loc,
        rows.lens,
        rows.block_table,
        rows.max_query_len,
        rows.max_len,
        rows.window,
        torch.full_like(rows.lens, rows.sinks) if rows.sinks else None,
    )

    def call(query: torch.Tensor, output: torch.Tensor) -> None:
        attention.attend(pool.window, query, output, attention_rows, model.head_size**-0.5)

    return call


def full_rows(table: torch.Tensor, lens: torch.Tensor, query_start_loc: torch.Tensor, new: int, longest: int) -> Rows:
    """Rows that see all keys of their requests, each with ``new`` queries."""
    return Rows(query_start_loc, lens, table, new, longest, None)


def rearranges(setting: Setting) -> bool:
    """Whether sinks and window fill blocks, as :attr:`AHNWindowSpec.rearrangeable` says."""
    return setting.sinks % setting.block_size == 0 and setting.window >= setting.block_size


def windowed_rows(
    setting: Setting, table: torch.Tensor, lens: torch.Tensor, query_start_loc: torch.Tensor, new: int
) -> tuple[Rows, Callable[[], None]]:
    """Rows that see sinks and window, and the launch that makes their tables, which a model does once a step.

    Args:
        setting: sizes.
        table: ``[num_requests, width]`` int32.
        lens: ``[num_requests]`` int32.
        query_start_loc: ``[num_requests + 1]`` int32.
        new: queries of each request; with more than one there is one request.
    """
    device, size, rearrange = table.device, setting.block_size, rearranges(setting)
    requests = None
    # As the planner of vllm_ahn cuts a chunk: so that the window reaches over a row's queries, or for a mask, of which
    # vLLM's kernel visits every key.
    most = min(new, setting.window // size * size if rearrange else MASKED_QUERIES)
    if new > 1:
        first = int(lens[0]) - new
        cuts = range(first - first % size + most, first + new, most)
        ends = [*(cut - first for cut in cuts), new]
        query_start_loc = torch.tensor([0, *ends], dtype=torch.int32, device=device)
        lens = lens[0] - new + query_start_loc[1:]
        requests = torch.zeros(len(ends), dtype=torch.int32, device=device)
    width = compact_width(setting.window, setting.sinks, size, most)
    compact = torch.zeros((len(lens), (width + TILE_BLOCKS + 15) & ~15), dtype=torch.int32, device=device)
    compact_lens = torch.zeros_like(lens)

    def compaction() -> None:
        compact_block_table(
            table,
            requests,
            query_start_loc,
            lens,
            setting.window,
            setting.sinks,
            size,
            rearrange,
            compact,
            compact_lens,
        )

    compaction()
    window, sinks = (setting.capacity, 0) if rearrange else (setting.window, setting.sinks)
    return Rows(query_start_loc, compact_lens, compact, most, width * size, window, sinks), compaction
