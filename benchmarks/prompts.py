"""Prompts of random tokens, the same in every run."""

from __future__ import annotations

import random


def prompt(length: int, seed: int = 0, vocab: int = 60000) -> list[int]:
    """``length`` random tokens below ``vocab``; the first 60,000 of Qwen's and of ours have a text."""
    return random.Random(f"{seed} {length}").choices(range(vocab), k=length)
