"""Draws windows and sinks at random, so that one memory serves them all."""

from __future__ import annotations

import random
from collections.abc import Sequence

LOSSLESS = (32, 64, 128, 256, 512, 1024, 2048, 4096, 8192)
"""The paper's range of W + S, tokens."""

SINKS = (0, 32, 64, 128, 512, 2048, 4096)
"""The paper's choices of S, tokens."""

MAX_RATIO = 8
"""The paper's limit: a sample is shorter than this many times its W + S."""


def possible(lossless: Sequence[int], length: int, max_ratio: int = MAX_RATIO) -> list[int]:
    """Return the W + S that a sample of `length` tokens may have: more than ``1 / max_ratio`` of it, less than all.

    At least two positions then lie beyond the window, and the first of them has a next token in the sample.
    """
    return [size for size in lossless if length < max_ratio * size and size + 1 < length]


def draw(
    rng: random.Random, length: int, lossless: Sequence[int], sinks: Sequence[int], max_ratio: int = MAX_RATIO
) -> tuple[int, int]:
    """Draw W and S for a sample of `length` tokens, for which `possible` is not empty. At most half are sinks."""
    size = rng.choice(possible(lossless, length, max_ratio))
    chosen = rng.choice([n for n in sinks if 2 * n <= size] or [0])
    return size - chosen, chosen
