"""vLLM's Triton attention over the spans of a step."""

import torch
from vllm.utils.math_utils import next_power_of_2
from vllm.v1.attention.ops.triton_unified_attention import unified_attention

from vllm_ahn.attention.plan import AttentionSpans
from vllm_ahn.cache.specs import AHNWindowSpec
from vllm_ahn.kernels.pages import WindowPages
from vllm_ahn.plugin.compat import can_split_masked_attention

SEGMENTS = 16
"""Parts of a sequence that a decode works on at the same time."""

MIN_PROGRAMS = 128
"""Decodes with fewer (sequence, KV head) pairs than this are split into segments to occupy the device."""

FLOOR = -1e30
"""Below every score, and finite."""


class TritonAttention:
    """The choice of ``--attention-backend TRITON_ATTN``; see :class:`PagedAttention`.

    Args:
        spec: the window group's spec.
        num_heads: query heads of a layer on this rank.
        device: where the step runs.
    """

    def __init__(self, spec: AHNWindowSpec, *, num_heads: int, device: torch.device) -> None:
        splits = spec.rearrangeable or can_split_masked_attention(spec.block_size)
        self.max_split_spans = MIN_PROGRAMS // spec.num_kv_heads if splits else 0
        parts = (self.max_split_spans, num_heads, SEGMENTS)
        # Where the kernel leaves the parts of a decode before it adds them up, all float32.
        self.part_outputs = torch.empty((*parts, next_power_of_2(spec.head_size)), device=device)
        self.part_maxima = torch.empty(parts, device=device)
        self.part_sums = torch.empty(parts, device=device)
        # The kernel may take a query's first tile for scores of 0 if all of it is masked, as the older end of a window
        # is for the later queries of a tile; real scores far below then vanish beside it. A key without a value and
        # with a score below all others, one a head, comes first instead, and weighs nothing.
        self.floor = torch.full((num_heads,), FLOOR, device=device)

    def schedule(self, spans: AttentionSpans) -> None:
        """Nothing: every call is complete in itself."""

    def attend(
        self, pages: WindowPages, query: torch.Tensor, output: torch.Tensor, spans: AttentionSpans, scale: float
    ) -> None:
        masked = spans.sinks is not None
        unified_attention(
            q=query,
            k=pages.keys.transpose(1, 2),
            v=pages.values.transpose(1, 2),
            out=output,
            cu_seqlens_q=spans.query_start_loc,
            max_seqlen_q=spans.max_query_len,
            seqused_k=spans.lens,
            max_seqlen_k=spans.max_len,
            softmax_scale=scale,
            causal=True,
            # With an ordinary sliding window tiles outside of it are not visited, with a mask all are.
            window_size=(-1, -1) if masked or spans.sliding_window is None else (spans.sliding_window - 1, 0),
            block_table=spans.block_table,
            softcap=0,
            q_descale=None,
            k_descale=None,
            v_descale=None,
            seq_threshold_3D=self.max_split_spans,
            num_par_softmax_segments=SEGMENTS,
            softmax_segm_output=self.part_outputs,
            softmax_segm_max=self.part_maxima,
            softmax_segm_expsum=self.part_sums,
            sinks=self.floor,
            rswa_prefix_lens=spans.sinks,
            rswa_window=spans.sliding_window if masked else None,
        )
