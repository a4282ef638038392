"""Perplexity by position: sums over buckets of positions, from one log-probability a token."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Sequence


@dataclasses.dataclass
class Bucket:
    """Tokens that were predicted from between `start` and `end` - 1 tokens before them."""

    start: int
    end: int
    tokens: int = 0
    nats: float = 0.0
    """Sum of -ln p."""

    bytes: int = 0
    """UTF-8 bytes of the tokens' text."""

    @property
    def perplexity(self) -> float | None:
        """exp of nats a token; None without tokens."""
        return math.exp(self.nats / self.tokens) if self.tokens else None

    @property
    def bits_per_byte(self) -> float | None:
        """Comparable between tokenizers; None without text."""
        return self.nats / math.log(2) / self.bytes if self.bytes else None

    def add(self, nats: float, size: int) -> None:
        """Counts one token of `size` bytes."""
        self.tokens += 1
        self.nats += nats
        self.bytes += size

    def describe(self) -> dict[str, float | int | None]:
        """JSON values, the two rates included."""
        rates = {"perplexity": self.perplexity, "bits_per_byte": self.bits_per_byte}
        return dataclasses.asdict(self) | rates


def bucketed(stretches: Sequence[tuple[Sequence[float], Sequence[int]]], edges: Sequence[int]) -> list[Bucket]:
    """The buckets between neighbouring `edges`, filled with `stretches` of text.

    Args:
        stretches: for each the log-probabilities of its tokens but the first (element i is of the token at position
            i + 1, predicted from i + 1 tokens), and the bytes of all its tokens.
        edges: ascending positions. A token outside of them is not counted.
    """
    buckets = [Bucket(start, end) for start, end in itertools.pairwise(edges)]
    for logprobs, sizes in stretches:
        at = 0
        for position, logprob in enumerate(logprobs, 1):
            while at < len(buckets) and position >= buckets[at].end:
                at += 1
            if at == len(buckets):
                break
            if position >= buckets[at].start:
                buckets[at].add(-logprob, sizes[position])
    return buckets


def even_edges(length: int, count: int) -> list[int]:
    """Edges of at most `count` buckets of one width over the positions 1 .. `length` - 1 (the last may be narrower)."""
    width = max(1, math.ceil((length - 1) / count))
    return [*range(1, length, width), length]


def token_bytes(text: str, ends: Sequence[int]) -> list[int]:
    """UTF-8 bytes of each token of `text`, given where it ends, in characters.

    The bytes of a character that several tokens share count for the first of them, so that sums are right.
    """
    sizes, before = [], 0
    for end in ends:
        sizes.append(len(text[before:end].encode("utf-8", "surrogatepass")))
        before = max(before, end)
    return sizes
