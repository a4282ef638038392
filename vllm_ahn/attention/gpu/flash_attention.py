"""FlashAttention over the rows of a step."""

import torch
from vllm.utils.torch_utils import canonicalize_singleton_dim_strides
from vllm.v1.attention.backends import fa_utils

from vllm_ahn.attention.gpu.rows import AttentionRows
from vllm_ahn.cache.specs import AHNWindowSpec
from vllm_ahn.kernels.pages import WindowPages


class FlashAttention:
    """The choice of ``--attention-backend FLASH_ATTN``; see :class:`PagedAttention`.

    FlashAttention knows sliding windows and no mask for sinks: the spec has to be ``rearrangeable``. It takes keys and
    values from pages at any stride, as long as a head's elements are contiguous and all else starts at multiples of 16
    bytes, which window pages do.

    Version 3 works out how to spread rows over the device in a kernel of its own. That is done once a step for all
    layers, and kept in place where a CUDA graph of decodes will look for it. As the graph fixes how much room there is
    for parts of a split sequence, their number is bounded for all decodes that graphs are for.

    Args:
        spec: the window group's spec.
        num_heads: query heads of a layer on this rank.
        version: of FlashAttention, as vLLM counts them.
        device: where the step runs.
        graph_rows: most decodes in a CUDA graph; 0 if there are none.
        graph_splits: most parts of a sequence in a CUDA graph.
    """

    def __init__(
        self,
        spec: AHNWindowSpec,
        *,
        num_heads: int,
        version: int,
        device: torch.device,
        graph_rows: int = 0,
        graph_splits: int = 0,
    ) -> None:
        assert spec.rearrangeable
        self.spec = spec
        self.num_heads = num_heads
        self.version = version
        self.graph_rows = graph_rows if version == 3 else 0
        self.graph_splits = graph_splits
        self.kept: torch.Tensor | None = None
        """Where graphs find their schedule."""
        if self.graph_rows:
            on_device = {"dtype": torch.int32, "device": device}
            most = AttentionRows(
                query_start_loc=torch.arange(graph_rows + 1, **on_device),
                lens=torch.ones(graph_rows, **on_device),
                block_table=torch.zeros((graph_rows, 1), **on_device),
                max_query_len=1,
                max_len=spec.block_size,
                window=spec.capacity,
                sinks=None,
            )
            self.kept = torch.zeros_like(self._work_out_schedule(most))

    def schedule(self, rows: AttentionRows) -> None:
        """Set ``rows.schedule``."""
        if self.version != 3:
            return
        schedule = self._work_out_schedule(rows)
        if self.kept is not None and self._is_for_graphs(rows):
            self.kept[: len(schedule)].copy_(schedule)
            self.kept[len(schedule) :].zero_()
            schedule = self.kept[: len(schedule)]
        rows.schedule = schedule

    def attend(
        self, pages: WindowPages, query: torch.Tensor, output: torch.Tensor, rows: AttentionRows, scale: float
    ) -> None:
        assert rows.sinks is None
        fa_utils.flash_attn_varlen_func(
            q=query,
            # On Hopper an axis of one KV head must have a proper stride too.
            k=canonicalize_singleton_dim_strides(pages.keys.transpose(1, 2)),
            v=canonicalize_singleton_dim_strides(pages.values.transpose(1, 2)),
            out=output,
            cu_seqlens_q=rows.query_start_loc,
            max_seqlen_q=rows.max_query_len,
            seqused_k=rows.lens,
            max_seqlen_k=rows.max_len,
            softmax_scale=scale,
            causal=True,
            window_size=list(self._window_size(rows)),
            block_table=rows.block_table,
            scheduler_metadata=rows.schedule,
            num_splits=0 if rows.schedule is None else self._max_splits(rows),
            fa_version=self.version,
        )

    def _is_for_graphs(self, rows: AttentionRows) -> bool:
        return rows.max_query_len <= 1 and len(rows.lens) <= self.graph_rows

    def _max_splits(self, rows: AttentionRows) -> int:
        """Most parts of a sequence, the same for schedule and call; 0 for FlashAttention's own choice."""
        return self.graph_splits if self._is_for_graphs(rows) else 0

    def _window_size(self, rows: AttentionRows) -> tuple[int, int]:
        return (-1, -1) if rows.window is None else (rows.window - 1, 0)

    def _work_out_schedule(self, rows: AttentionRows) -> torch.Tensor:
        schedule: torch.Tensor = fa_utils.get_scheduler_metadata(
            batch_size=len(rows.lens),
            max_seqlen_q=rows.max_query_len,
            max_seqlen_k=rows.max_len,
            num_heads_q=self.num_heads,
            num_heads_kv=self.spec.num_kv_heads,
            headdim=self.spec.head_size,
            cache_seqlens=rows.lens,
            qkv_dtype=self.spec.dtype,
            cu_seqlens_q=rows.query_start_loc,
            page_size=self.spec.block_size,
            causal=True,
            window_size=self._window_size(rows),
            num_splits=self._max_splits(rows),
        )
        return schedule
