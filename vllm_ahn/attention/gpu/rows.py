"""Rows: queries of one request that share a block table in a call of paged attention."""

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch

from vllm_ahn.kernels.pages import WindowPages


@dataclass
class AttentionRows:
    """Queries for paged attention, and the keys they may see. All of it is causal."""

    query_start_loc: torch.Tensor
    """``[R + 1]`` int32."""
    lens: torch.Tensor
    """``[R]`` int32, tokens in the row's table; its queries are the last of them."""
    block_table: torch.Tensor
    """``[R, width]`` int32."""
    max_query_len: int
    max_len: int
    """Upper bounds, known to the host."""
    window: int | None
    """How many keys a query sees, up to and with its own; None for all."""
    sinks: torch.Tensor | None
    """``[R]`` int32, how many keys at the beginning of the table it sees beside them; None for none."""
    schedule: torch.Tensor | None = None
    """What the kernel worked out for these rows ahead of the layers' calls, if it does such a thing."""


class PagedAttention(Protocol):
    """A kernel of vLLM's that attends to keys in pages."""

    def schedule(self, rows: AttentionRows) -> None:
        """Work out once a step what all layers' calls have in common."""

    def attend(
        self, pages: WindowPages, query: torch.Tensor, output: torch.Tensor, rows: AttentionRows, scale: float
    ) -> None:
        """Attend for all rows.

        Args:
            pages: the layer's pages.
            query: ``[num_tokens, num_heads, head_size]``, all rows' queries.
            output: likewise, at least as long; written where a row has a query.
            rows: what sees what.
            scale: factor on scores.
        """


def cut_into_rows(
    starts: np.ndarray, seq_lens: np.ndarray, queries_per_row: int, block_size: int = 1
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Cut the requests of a batch into rows of at most ``queries_per_row`` queries.

    Args:
        starts: ``[num_requests + 1]``, where the requests' new tokens begin in the batch.
        seq_lens: ``[num_requests]``, their tokens, with the new ones.
        queries_per_row: a multiple of ``block_size``.
        block_size: rows are cut between blocks of so many tokens, and ``queries_per_row`` is counted from the start of
            the block in which a row's first query lies.

    Returns:
        ``requests [R]``, the request of each row; ``row_starts [R + 1]``, where the rows begin in the batch; and
        ``row_lens [R]``, tokens of the request up to and with the row's last query. Requests without new tokens have
        no row.
    """
    query_lens = np.diff(starts)
    in_block = np.where(query_lens > 0, (seq_lens - query_lens) % block_size, 0)
    num_rows = -(-(in_block + query_lens) // queries_per_row)
    requests = np.arange(len(query_lens)).repeat(num_rows)
    index_in_request = np.arange(len(requests)) - (num_rows.cumsum() - num_rows).repeat(num_rows)
    cuts = (starts[:-1] - in_block)[requests] + index_in_request * queries_per_row
    row_starts = np.maximum(cuts, starts[:-1][requests])
    row_ends = np.minimum(cuts + queries_per_row, starts[1:][requests])
    row_lens = seq_lens[requests] - (starts[1:][requests] - row_ends)
    return requests, np.concatenate((row_starts, starts[-1:])), row_lens
