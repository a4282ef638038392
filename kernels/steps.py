"""Steps: a few queries each of several requests, whose state is made up from what is settled."""

from dataclasses import dataclass
from functools import cached_property

import torch


@dataclass(frozen=True)
class Steps:
    """The queries of a batch that step, at most `GRANULARITY` of a request; all are at ``W + S`` or past it.

    Attributes:
        requests: ``[R]`` int64, indices in the block tables.
        first_tokens: ``[R]`` int64, where in the batch their first queries are; the others follow.
        lens: ``[R]`` int64, queries, at least 1.
        computed: ``[R]`` int64, tokens of the request before its first query here, at least ``W + S``.
    """

    requests: torch.Tensor
    first_tokens: torch.Tensor
    lens: torch.Tensor
    computed: torch.Tensor

    @cached_property
    def first_reads(self) -> torch.Tensor:
        """``[R]`` int64, where among the ``N`` queries of all requests theirs begin."""
        return self.lens.cumsum(0) - self.lens

    @cached_property
    def owners(self) -> torch.Tensor:
        """``[N]`` int64, which of the ``R`` a query belongs to."""
        return torch.arange(len(self.lens)).repeat_interleave(self.lens)

    @cached_property
    def within(self) -> torch.Tensor:
        """``[N]`` int64, its number among the queries of its request."""
        return torch.arange(len(self.owners)) - self.first_reads[self.owners]

    @cached_property
    def tokens(self) -> torch.Tensor:
        """``[N]`` int64, where in the batch it is."""
        return self.first_tokens[self.owners] + self.within

    @cached_property
    def positions(self) -> torch.Tensor:
        """``[N]`` int64, its position ``t``."""
        return self.computed[self.owners] + self.within
