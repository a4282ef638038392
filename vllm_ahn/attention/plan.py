"""What both wings do with a step's batch before they plan it: sort its requests, and cut its queries into spans.

A step gives every request some new tokens. Requests that still fit ``W + S`` need plain causal attention. The others
are beyond the window, wholly or in part, and their queries there read the memory. They fall into

* **steps**: few queries that read, at most `GRANULARITY`. They take the state as it is settled and make up the rest.
* **chunks**: more. Tokens are absorbed many at a time, up to the last boundary that has to be written; the queries
  behind it are a step of their own.

Everything is decided by position. What a block table holds below the window, or behind a request's end, is other
requests' business.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch

from vllm_ahn.kernels.prefill_plan import Stretch
from vllm_ahn.kernels.settled import GRANULARITY, Settling


@dataclass(frozen=True)
class StepRequests:
    """A step's requests as the host knows them; one without new tokens pads the batch."""

    starts: np.ndarray
    """``[num_requests + 1]``, where the requests' new tokens begin in the batch."""
    seq_lens: np.ndarray
    """``[num_requests]``, their tokens, with the new ones."""
    settling: Settling

    @cached_property
    def query_lens(self) -> np.ndarray:
        """``[num_requests]``, new tokens."""
        return np.diff(self.starts)

    @cached_property
    def num_reads(self) -> np.ndarray:
        """``[num_requests]``, queries beyond ``W + S``."""
        return np.clip(self.seq_lens - self.settling.capacity, 0, self.query_lens)

    @cached_property
    def beyond_window(self) -> np.ndarray:
        """``[num_requests]`` bool: the last token is beyond ``W + S``."""
        return self.num_reads > 0

    @cached_property
    def passes(self) -> list[list[Stretch]]:
        """What chunks absorb before their last queries step: pass by pass, as a request's later one needs its earlier.

        A boundary ends each stretch, and its state is written. There is seldom more than one pass: a chunk that ends
        at a block's end, or blocks longer than the granularity, have more boundaries to write.
        """
        passes: list[list[Stretch]] = []
        for request in (self.num_reads > GRANULARITY).nonzero()[0].tolist():
            for index, stretch in enumerate(self._stretches(request)):
                if index == len(passes):
                    passes.append([])
                passes[index].append(stretch)
        return passes

    def _stretches(self, request: int) -> list[Stretch]:
        settling, seq_len = self.settling, int(self.seq_lens[request])
        num_computed = seq_len - int(self.query_lens[request])
        targets = settling.targets(num_computed, seq_len)
        if len(targets) > 1 and seq_len - targets[-2] <= GRANULARITY:
            del targets[-1]  # the step comes to it
        stretches, source, position = [], settling.boundary(num_computed), max(num_computed, settling.capacity)
        for target in targets:
            first_token = int(self.starts[request + 1]) - (seq_len - position)
            stretches.append(Stretch(request, first_token, position, target - position, source, target))
            source = position = target
        return stretches

    @cached_property
    def num_steps(self) -> np.ndarray:
        """``[num_requests]``, queries that step, the last of the request's; at most `GRANULARITY`."""
        num_steps = self.num_reads.copy()
        for stretches in self.passes:
            for stretch in stretches:
                num_steps[stretch.request] = self.seq_lens[stretch.request] - stretch.target
        return num_steps


@dataclass
class AttentionSpans:
    """Queries for paged attention, and the keys that they see; all of it is causal.

    A span is a number of consecutive queries of one request that share a block table.
    """

    query_start_loc: torch.Tensor
    """``[R + 1]`` int32, where the spans' queries begin."""
    lens: torch.Tensor
    """``[R]`` int32, tokens in a span's table; its queries are the last of them."""
    block_table: torch.Tensor
    """``[R, width]`` int32."""
    max_query_len: int
    max_len: int
    """Upper bounds, known to the host."""
    sliding_window: int | None = None
    """How many keys a query sees, up to and with its own; None for all."""
    sinks: torch.Tensor | None = None
    """``[R]`` int32, how many keys at the beginning of its table a query sees beside them; None for none."""
    tokens: torch.Tensor | None = None
    """``[num_queries]`` int64, where in the batch the queries are; None if they are all of it, in its order."""
    schedule: Any = None
    """What the attention kernel worked out for all layers' calls, if it does such a thing."""


def cut_into_spans(
    requests: StepRequests, queries_per_span: int, block_size: int = 1
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Cut the queries of a batch into spans of at most ``queries_per_span``.

    Args:
        requests: the batch's.
        queries_per_span: a multiple of ``block_size``.
        block_size: spans are cut between blocks of so many tokens, and ``queries_per_span`` is counted from the start
            of the block in which a span's first query lies.

    Returns:
        ``owners [R]``, the request of each span; ``span_starts [R + 1]``, where the spans begin in the batch; and
        ``span_lens [R]``, tokens of the request up to and with the span's last query. Requests without new tokens have
        no span.
    """
    starts, query_lens = requests.starts, requests.query_lens
    in_block = np.where(query_lens > 0, (requests.seq_lens - query_lens) % block_size, 0)
    num_spans = -(-(in_block + query_lens) // queries_per_span)
    owners = np.arange(len(query_lens)).repeat(num_spans)
    index_in_request = np.arange(len(owners)) - (num_spans.cumsum() - num_spans).repeat(num_spans)
    cuts = (starts[:-1] - in_block)[owners] + index_in_request * queries_per_span
    span_starts = np.maximum(cuts, starts[:-1][owners])
    span_ends = np.minimum(cuts + queries_per_span, starts[1:][owners])
    span_lens = requests.seq_lens[owners] - (starts[1:][owners] - span_ends)
    return owners, np.concatenate((span_starts, starts[-1:])), span_lens
