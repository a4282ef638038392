"""Paged attention as the benchmark calls it: vLLM's kernel where vLLM is, else one of this benchmark's own."""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec

import torch

from kernel_cases.layer import Step
from kernel_cases.own_attention import paged_attention, segments_of
from kernel_cases.setting import Setting
from vllm_ahn.attention.plan import AttentionSpans
from vllm_ahn.kernels.tables import TILE_BLOCKS, compact_block_table, compact_width

MASKED_QUERIES = 1024
"""Queries that share a table where sinks take a mask."""


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


def kernel(step: Step, spans: AttentionSpans) -> Callable[[torch.Tensor, torch.Tensor], None]:
    """Return the call for queries and output of a step; what it needs besides is allocated here."""
    setting, model, pages, scale = step.setting, step.model, step.pool.window, step.model.head_size**-0.5
    if chosen(setting) == "vllm":
        from vllm_ahn.attention.paged.triton import TritonAttention
        from vllm_ahn.cache.specs import window_spec

        spec = window_spec(pages.layout, setting.rule)
        attention = TritonAttention(spec, num_heads=model.heads, device=setting.device)
        return lambda query, output: attention.attend(pages, query, output, spans, scale)
    multiprocessors = setting.timer.multiprocessors if setting.timer else 1
    segments = segments_of(len(spans.lens), model.kv_heads, spans.max_query_len, multiprocessors)
    rows = (spans.query_start_loc, spans.lens, spans.block_table)
    keywords = {"max_query_len": spans.max_query_len, "scale": scale, "segments": segments}
    mask = {"window": spans.sliding_window, "sinks": 0 if spans.sinks is None else setting.sinks}
    return lambda query, output: paged_attention(query, pages.keys, pages.values, output, *rows, **keywords, **mask)


def full_spans(step: Step, new: int, longest: int) -> AttentionSpans:
    """Return spans that see all keys of their requests, each with ``new`` queries."""
    return AttentionSpans(step.starts, step.lens, step.pool.window_table, new, longest)


def windowed_spans(step: Step, new: int) -> tuple[AttentionSpans, Callable[[], None]]:
    """Return spans that see sinks and window, and the launch that makes their tables, which a model does once a step.

    Each request has ``new`` queries; with more than one there is one request.
    """
    setting, starts, lens, table = step.setting, step.starts, step.lens, step.pool.window_table
    device, size = lens.device, setting.block_size
    # Whether sinks and window fill blocks, as `AHNWindowSpec.rearrangeable` says.
    rearrange = setting.sinks % size == 0 and setting.window >= size
    requests = None
    # As the planner of vllm_ahn cuts a chunk: so that the window reaches over a span's queries, or for a mask, of which
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
        compact_block_table(table, requests, starts, lens, *sizes, compact, compact_lens)

    window, sinks = setting.capacity, None
    if not rearrange:
        window, sinks = setting.window, torch.full_like(compact_lens, setting.sinks)
    return AttentionSpans(starts, compact_lens, compact, most, width * size, window, sinks), compaction
