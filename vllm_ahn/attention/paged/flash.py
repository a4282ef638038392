"""FlashAttention over the spans of a step."""

import torch
from vllm.utils.torch_utils import canonicalize_singleton_dim_strides
from vllm.v1.attention.backends import fa_utils

from vllm_ahn.attention.plan import AttentionSpans
from vllm_ahn.cache.specs import AHNWindowSpec
from vllm_ahn.kernels.pages import WindowPages


class FlashAttention:
    """The choice of ``--attention-backend FLASH_ATTN``; see :class:`PagedAttention`.

    FlashAttention knows sliding windows and no mask for sinks: the spec has to be ``rearrangeable``. It takes keys and
    values from pages at any stride, as long as a head's elements are contiguous and all else starts at multiples of 16
    bytes, which window pages do.

    Version 3 works out how to spread spans over the device in a kernel of its own. That is done once a step for all
    layers, and kept in place where a CUDA graph of decodes will look for it. As the graph fixes how much room there is
    for parts of a split sequence, their number is bounded for all decodes that graphs are for.

    Args:
        spec: the window group's spec.
        num_heads: query heads of a layer on this rank.
        version: of FlashAttention, as vLLM counts them.
        device: where the step runs.
        graph_spans: most requests in a CUDA graph, of steps of a token and its drafts; 0 if there are none.
        graph_splits: most parts of a sequence in a CUDA graph.
    """

    def __init__(
        self,
        spec: AHNWindowSpec,
        *,
        num_heads: int,
        version: int,
        device: torch.device,
        graph_spans: int = 0,
        graph_splits: int = 0,
    ) -> None:
        assert spec.rearrangeable
        self.spec = spec
        self.num_heads = num_heads
        self.version = version
        self.graph_spans = graph_spans if version == 3 else 0
        self.graph_splits = graph_splits
        self.graph_queries = 1 + spec.max_drafts
        self.kept: torch.Tensor | None = None
        """Where graphs find their schedule."""
        if self.graph_spans:
            on_device = {"dtype": torch.int32, "device": device}
            most = AttentionSpans(
                query_start_loc=torch.arange(graph_spans + 1, **on_device) * self.graph_queries,
                lens=torch.ones(graph_spans, **on_device),
                block_table=torch.zeros((graph_spans, 1), **on_device),
                max_query_len=self.graph_queries,
                max_len=spec.block_size,
                sliding_window=spec.capacity,
                sinks=None,
            )
            self.kept = torch.zeros_like(self._work_out_schedule(most))

    def schedule(self, spans: AttentionSpans) -> None:
        """Set ``spans.schedule``."""
        if self.version != 3:
            return
        schedule = self._work_out_schedule(spans)
        if self.kept is not None and self._is_for_graphs(spans):
            self.kept[: len(schedule)].copy_(schedule)
            self.kept[len(schedule) :].zero_()
            schedule = self.kept[: len(schedule)]
        spans.schedule = schedule

    def attend(
        self, pages: WindowPages, query: torch.Tensor, output: torch.Tensor, spans: AttentionSpans, scale: float
    ) -> None:
        assert spans.sinks is None
        fa_utils.flash_attn_varlen_func(
            q=query,
            # On Hopper an axis of one KV head must have a proper stride too.
            k=canonicalize_singleton_dim_strides(pages.keys.transpose(1, 2)),
            v=canonicalize_singleton_dim_strides(pages.values.transpose(1, 2)),
            out=output,
            cu_seqlens_q=spans.query_start_loc,
            max_seqlen_q=spans.max_query_len,
            seqused_k=spans.lens,
            max_seqlen_k=spans.max_len,
            softmax_scale=scale,
            causal=True,
            window_size=list(self._window_size(spans)),
            block_table=spans.block_table,
            scheduler_metadata=spans.schedule,
            num_splits=0 if spans.schedule is None else self._max_splits(spans),
            fa_version=self.version,
        )

    def _is_for_graphs(self, spans: AttentionSpans) -> bool:
        return spans.max_query_len <= self.graph_queries and len(spans.lens) <= self.graph_spans

    def _max_splits(self, spans: AttentionSpans) -> int:
        """Most parts of a sequence, the same for schedule and call; 0 for FlashAttention's own choice."""
        return self.graph_splits if self._is_for_graphs(spans) else 0

    def _window_size(self, spans: AttentionSpans) -> tuple[int, int]:
        return (-1, -1) if spans.sliding_window is None else (spans.sliding_window - 1, 0)

    def _work_out_schedule(self, spans: AttentionSpans) -> torch.Tensor:
        schedule: torch.Tensor = fa_utils.get_scheduler_metadata(
            batch_size=len(spans.lens),
            max_seqlen_q=spans.max_query_len,
            max_seqlen_k=spans.max_len,
            num_heads_q=self.num_heads,
            num_heads_kv=self.spec.num_kv_heads,
            headdim=self.spec.head_size,
            cache_seqlens=spans.lens,
            qkv_dtype=self.spec.dtype,
            cu_seqlens_q=spans.query_start_loc,
            page_size=self.spec.block_size,
            causal=True,
            window_size=self._window_size(spans),
            num_splits=self._max_splits(spans),
        )
        return schedule
