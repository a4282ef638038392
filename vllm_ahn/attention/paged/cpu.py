"""vLLM's CPU attention over the spans of a step, and plain torch where it has no mask for sinks."""

import torch
from torch.nn import functional as F
from vllm import _custom_ops as ops
from vllm import envs

from vllm_ahn.attention.plan import AttentionSpans
from vllm_ahn.attention.window import visible_keys
from vllm_ahn.cache.specs import AHNWindowSpec
from vllm_ahn.kernels.pages import WindowPages

MASKED_QUERIES = 256
"""Queries of a span under a mask: bounds the mask, and the keys that only some of them see."""


def attention_isa(block_size: int, head_size: int) -> str:
    """The instruction set to ask of vLLM's CPU attention.

    Of those it has, ``vec`` and ``vec16`` store a block's keys transposed and its values as rows, which is what
    :class:`WindowPages` reads. Others pack them in ways of their own.
    """
    return "vec" if block_size % 32 == 0 and head_size % 32 == 0 else "vec16"


class CPUAttention:
    """Attention on CPUs; see :class:`PagedAttention`.

    vLLM's kernel knows sliding windows and no sinks beside them. Spans with sinks are either all single queries, which
    are attended as one batch, or attended one after another.

    Args:
        spec: the window group's spec.
        num_heads: query heads of a layer on this rank.
        dtype: of queries, keys and values.
    """

    def __init__(self, spec: AHNWindowSpec, *, num_heads: int, dtype: torch.dtype) -> None:
        self.spec = spec
        self.num_heads = num_heads
        self.dtype = dtype
        self.isa = attention_isa(spec.block_size, spec.head_size)

    def schedule(self, spans: AttentionSpans) -> None:
        """Spread work over threads, as vLLM's kernel wants it; for spans with sinks, make their masks."""
        if spans.sinks is not None:
            spans.schedule = self._masks(spans)
            return
        spans.schedule = ops.cpu_attn_get_scheduler_metadata(
            num_reqs=len(spans.lens),
            num_heads=self.num_heads,
            num_kv_heads=self.spec.num_kv_heads,
            head_dim=self.spec.head_size,
            seq_lens=spans.lens,
            dtype=self.dtype,
            query_start_loc=spans.query_start_loc,
            causal=True,
            sliding_window_size=spans.sliding_window or -1,
            isa=self.isa,
            enable_kv_split=envs.VLLM_CPU_ATTN_SPLIT_KV,
        )

    def attend(
        self, pages: WindowPages, query: torch.Tensor, output: torch.Tensor, spans: AttentionSpans, scale: float
    ) -> None:
        if spans.tokens is not None:
            query = query[spans.tokens]
        attended = output if spans.tokens is None else torch.empty_like(query)
        if spans.sinks is None:
            self._attend_paged(pages, query, attended, spans, scale)
        elif spans.max_query_len == 1:
            self._attend_single_queries(pages, query, attended, spans, scale)
        else:
            self._attend_one_by_one(pages, query, attended, spans, scale)
        if spans.tokens is not None:
            output[spans.tokens] = attended

    def _attend_paged(
        self, pages: WindowPages, query: torch.Tensor, output: torch.Tensor, spans: AttentionSpans, scale: float
    ) -> None:
        ops.cpu_attention_with_kv_cache(
            query=query,
            key_cache=pages.keys,
            value_cache=pages.values,
            output=output,
            query_start_loc=spans.query_start_loc,
            seq_lens=spans.lens,
            scale=scale,
            causal=True,
            alibi_slopes=None,
            sliding_window=spans.sliding_window or -1,
            block_table=spans.block_table,
            softcap=0,
            scheduler_metadata=spans.schedule,
            s_aux=None,
        )

    def _masks(self, spans: AttentionSpans) -> list[torch.Tensor]:
        """Which of the tables' keys queries see: ``[R, keys]`` for single queries, else ``[queries, keys]`` a span."""
        size, ends = self.spec.block_size, spans.lens.long()
        if spans.max_query_len == 1:
            keys = torch.arange(spans.block_table.shape[1] * size)
            return [visible_keys(self.spec, ends.unsqueeze(-1) - 1, keys)]
        return [
            visible_keys(
                self.spec, torch.arange(end - queries, end).unsqueeze(-1), torch.arange(-(-end // size) * size)
            )
            for end, queries in zip(ends.tolist(), spans.query_start_loc.diff().tolist(), strict=True)
        ]

    def _attend_single_queries(
        self, pages: WindowPages, query: torch.Tensor, output: torch.Tensor, spans: AttentionSpans, scale: float
    ) -> None:
        table, (visible,) = spans.block_table.long(), spans.schedule
        keys_by_head = pages.keys_transposed[table].permute(0, 2, 3, 1, 4).flatten(3)
        values = pages.values[table].transpose(1, 2).flatten(2, 3)
        queries = query.unflatten(1, (pages.layout.num_kv_heads, -1))
        scores = (queries @ keys_by_head).float() * scale
        scores.masked_fill_(~visible[:, None, None], -torch.inf)
        output.copy_((scores.softmax(-1).to(values.dtype) @ values).flatten(1, 2))

    def _attend_one_by_one(
        self, pages: WindowPages, query: torch.Tensor, output: torch.Tensor, spans: AttentionSpans, scale: float
    ) -> None:
        starts = spans.query_start_loc.tolist()
        for span, visible in enumerate(spans.schedule):
            queries = slice(starts[span], starts[span + 1])
            blocks = spans.block_table[span, : visible.shape[1] // self.spec.block_size].long()
            attended = F.scaled_dot_product_attention(
                query[queries].transpose(0, 1).unsqueeze(0),
                pages.keys_transposed[blocks].permute(1, 0, 3, 2).flatten(1, 2).unsqueeze(0),
                pages.values[blocks].transpose(0, 1).flatten(1, 2).unsqueeze(0),
                attn_mask=visible,
                scale=scale,
                enable_gqa=True,
            )
            output[queries] = attended.squeeze(0).transpose(0, 1)
