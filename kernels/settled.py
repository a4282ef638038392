"""When a state goes to its pages, and where: the settled state.

A query at ``t >= W + S`` absorbs the token at ``t - W``. The pages do not follow every step. They hold the state as it
was at the last **boundary**, a multiple of `GRANULARITY` tokens, and nothing else; it is *settled* for that many
tokens. What was absorbed since, fewer tokens than that, is still in the window's pages, and for memories with the delta
rule the pages of the state keep its **updates** ``u`` behind the state's columns. A step reads both, and writes the
state only when it crosses a boundary. With ``G_i`` the sums of ``g`` since the boundary, after ``m`` tokens::

    M_m^T x = exp(G_m) M^T x + sum_i exp(G_m - G_i) (k_i . x) u_i
    u       = b (v - exp(g) M_m^T k)
    o       = scale (exp(g) M_m^T q + (k . q) u)
    M       <- exp(G_m) M + sum_i exp(G_m - G_i) k_i u_i^T             at the next boundary

So the pages are a function of the number of computed tokens ``n`` alone, and never of how they came to be computed. A
draft that is rejected takes nothing back, and there is a checkpoint of the last boundary at every moment.

For that a request holds several states in **slots**:

* Without prefix caching and speculation one is enough. With speculation a step may cross a boundary and be taken back
  behind it: two, in turn.
* Prefix caching wants the state of the last boundary between two *blocks*, and, as a prompt that comes again never hits
  all of its tokens, of the last one before ``n``: two, in turn, for boundaries between blocks. Where blocks are longer
  than the granularity, boundaries inside a block have one slot of their own, or two with speculation.

This is one place for all kernels, planners and managers. The Triton kernels' is
:mod:`vllm_ahn.kernels.settled_slots`.
"""

from dataclasses import dataclass
from typing import TypeVar

import torch

GRANULARITY = 16
"""Tokens from one boundary to the next. More would save writes of the state and cost reads of kept updates: bytes moved
are least near ``sqrt(4 D)``, 16 for heads of 64 and 22 for heads of 128, and every block size is a multiple of 16."""

Count = TypeVar("Count", int, torch.Tensor)


@dataclass(frozen=True)
class Settling:
    """The rule for one model: what is absorbed, where boundaries are, and which slot holds the state of which."""

    window: int
    """``W``: tokens that a query sees, itself included, besides the sinks."""
    sinks: int
    """``S``: first tokens of a sequence, always seen and never absorbed."""
    period: int = 1
    """Boundaries from one block's end to the next, where those have slots of their own; else 1."""
    turns: int = 1
    """Slots of boundaries at a block's end, taken in turn."""
    inner: int = 0
    """Slots of the other boundaries, taken in turn; 0 if `period` is 1."""

    @classmethod
    def of(cls, window: int, sinks: int, *, block_size: int, caches_prefixes: bool, speculates: bool) -> "Settling":
        """The fewest slots that serve, see above.

        Args:
            window: ``W``.
            sinks: ``S``.
            block_size: tokens in a block, a multiple of `GRANULARITY`.
            caches_prefixes: prefix caching is on.
            speculates: steps may be taken back, by at most `GRANULARITY` tokens.
        """
        if not caches_prefixes:
            return cls(window, sinks, turns=2 if speculates else 1)
        period = block_size // GRANULARITY
        # Of two boundaries in turn only every second lies inside a block of two.
        inner = 0 if period == 1 else 2 if speculates and period > 2 else 1
        return cls(window, sinks, period, turns=2, inner=inner)

    @property
    def capacity(self) -> int:
        """``W + S``: tokens that a sequence may have before its state is used."""
        return self.window + self.sinks

    @property
    def num_slots(self) -> int:
        """States that a request holds."""
        return self.turns + self.inner

    def boundary(self, num_tokens: Count) -> Count:
        """The boundary for which the state is settled when so many tokens are computed.

        No token is absorbed up to ``W + S``: all boundaries there count as one, the last of them.
        """
        return _at_least(num_tokens, self.capacity) // GRANULARITY * GRANULARITY

    def absorbed(self, num_tokens: Count) -> Count:
        """The first token that a state after ``num_tokens`` has not absorbed: it holds ``[S, this)``."""
        return _at_least(num_tokens - self.window, self.sinks)

    def slot(self, boundary: Count) -> Count:
        """Which of the request's states is that of `boundary`."""
        index = boundary // GRANULARITY
        turn = index // self.period % self.turns
        if not self.inner:
            return turn
        inner = self.turns + index % self.inner
        if isinstance(index, torch.Tensor):
            return torch.where(index % self.period == 0, turn, inner)
        return turn if index % self.period == 0 else inner

    def targets(self, num_computed: int, seq_len: int) -> list[int]:
        """The boundaries whose states a step from ``num_computed`` to ``seq_len`` tokens has to leave, ascending.

        The last one, and, as far as they are new, the last at a block's end and the last of those before ``seq_len``.
        """
        block = self.period * GRANULARITY
        wanted = {self.boundary(seq_len), seq_len // block * block, (seq_len - 1) // block * block}
        return sorted(boundary for boundary in wanted if boundary > self.boundary(num_computed))


def _at_least(count: Count, least: int) -> Count:
    if isinstance(count, torch.Tensor):
        return count.clamp(min=least)
    return max(count, least)
