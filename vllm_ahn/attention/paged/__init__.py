"""vLLM's paged attention kernels behind one interface."""

from typing import Protocol

import torch

from vllm_ahn.attention.plan import AttentionSpans
from vllm_ahn.kernels.pages import WindowPages


class PagedAttention(Protocol):
    """A kernel of vLLM's that attends to keys in pages."""

    def schedule(self, spans: AttentionSpans) -> None:
        """Work out once a step, in ``spans.schedule``, what all layers' calls have in common."""

    def attend(
        self, pages: WindowPages, query: torch.Tensor, output: torch.Tensor, spans: AttentionSpans, scale: float
    ) -> None:
        """Attend for all spans.

        Args:
            pages: the layer's pages.
            query: ``[num_tokens, num_heads, head_size]``, the batch's queries.
            output: shaped like ``query``; written where a span has a query.
            spans: what sees what.
            scale: factor on scores.
        """
