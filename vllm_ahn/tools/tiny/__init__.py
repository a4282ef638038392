"""A seeded random base model with a tokenizer, and an AHN checkpoint for it.

Nothing in them is learnt. They have the layout of real ones, run in seconds on a CPU, and their random memory is as
strong as their attention, so that a wrong memory gives other tokens.
"""

from vllm_ahn.tools.tiny.make import TinyPaths, make_tiny

__all__ = ["TinyPaths", "make_tiny"]
