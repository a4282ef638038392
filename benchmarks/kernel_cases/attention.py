"""Paged attention as the benchmark calls it: vLLM's kernel where vLLM is, else one of this benchmark's own."""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec

import torch

from kernel_cases.layer import Step
from kernel_cases.own_attention import paged_attention, segments_of
from kernel_cases.setting import Setting
from kernel_cases.timing import Call
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


def attend(step: Step, spans: AttentionSpans) -> Call:
    """Return the call for a step's queries; what it needs besides is allocated here."""
    return (_vllm if chosen(step.layer.setting) == "vllm" else _own)(step, spans)


def _own(step: Step, spans: AttentionSpans) -> Call:
    model, setting, pages = step.layer.model, step.layer.setting, step.layer.pool.window
    multiprocessors = setting.timer.multiprocessors if setting.timer else 1
    segments = segments_of(len(spans.lens), model.kv_heads, spans.max_query_len, multiprocessors)
    return lambda: paged_attention(
        step.query,
        pages.keys,
        pages.values,
        step.output,
        spans.query_start_loc,
        spans.lens,
        spans.block_table,
        max_query_len=spans.max_query_len,
        window=spans.sliding_window,
        sinks=0 if spans.sinks is None else setting.sinks,
        scale=model.head_size**-0.5,
        segments=segments,
    )


def _vllm(step: Step, spans: AttentionSpans) -> Call:
    from vllm_ahn.attention.paged.triton import TritonAttention
    from vllm_ahn.cache.specs import window_spec

    setting, model, pages = step.layer.setting, step.layer.model, step.layer.pool.window
    spec = window_spec(pages.layout, window=setting.window, sinks=setting.sinks)
    attention = TritonAttention(spec, num_heads=model.heads, device=setting.device)
    return lambda: attention.attend(pages, step.query, step.output, spans, model.head_size**-0.5)


def full_spans(step: Step, new: int, longest: int) -> AttentionSpans:
    """Return spans that see all keys of their requests, each with ``new`` queries."""
    return AttentionSpans(step.starts, step.lens, step.window_table, new, longest)


def rearranges(setting: Setting) -> bool:
    """Return whether sinks and window fill blocks, as ``AHNWindowSpec.rearrangeable`` says."""
    return setting.sinks % setting.block_size == 0 and setting.window >= setting.block_size


def windowed_spans(step: Step, new: int) -> tuple[AttentionSpans, Callable[[], None]]:
    """Return spans that see sinks and window, and the launch that makes their tables, which a model does once a step.

    Args:
        step: the batch.
        new: queries of each request; with more than one there is one request.
    """
    setting, starts, lens = step.layer.setting, step.starts, step.lens
    device, size, rearrange = lens.device, setting.block_size, rearranges(setting)
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
        compact_block_table(step.window_table, requests, starts, lens, *sizes, compact, compact_lens)

    compaction()
    window, sinks = setting.capacity, None
    if not rearrange:
        window, sinks = setting.window, torch.full_like(compact_lens, setting.sinks)
    return AttentionSpans(starts, compact_lens, compact, most, width * size, window, sinks), compaction
