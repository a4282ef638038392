"""Perplexity of a text and cache held, both by position, through the engine: what a worker does for one method."""

from __future__ import annotations

import dataclasses
import hashlib
from array import array
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from vllm_ahn.errors import AHNError
from vllm_ahn.tools.evaluate.answers import Answers
from vllm_ahn.tools.evaluate.engine import HeldCache, run_requests
from vllm_ahn.tools.evaluate.positions import bucketed, even_edges, token_bytes

BUCKETS = 32
"""Points of a curve."""

AFTER_PROMPT = 3
"""Tokens that are generated: the engine gives none of the prompt's log-probabilities without one, and while it makes
the third the cache that the whole text needs, and no step's tokens more, is held."""


def engine_arguments(context: int) -> dict[str, Any]:
    """Arguments of `vllm.LLM` for texts of `context` tokens, for every method, unless the user has given others."""
    return {
        # A cached prefix is not computed, so it would have no log-probabilities.
        "enable_prefix_caching": False,
        # The cache of a step's tokens is held in any case, so steps are to be short beside the text; and the logits
        # of a whole step are in memory at once, 4 bytes for each token of the vocabulary.
        "max_num_batched_tokens": min(1024, max(32, context // BUCKETS)),
    }


@dataclasses.dataclass(frozen=True)
class Stretch:
    """A piece of text that is read from its start."""

    source: str
    tokens: list[int]
    sizes: list[int]
    """UTF-8 bytes of each token."""


def cut_text(tokenizer: Any, source: str, text: str, context: int) -> list[Stretch]:
    """`text` in stretches of `context` tokens, the last one shorter; without special tokens."""
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    tokens, sizes = encoded["input_ids"], token_bytes(text, [end for _, end in encoded["offset_mapping"]])
    starts = range(0, len(tokens), context)
    pieces = [Stretch(source, tokens[start : start + context], sizes[start : start + context]) for start in starts]
    return [piece for piece in pieces if len(piece.tokens) > 1]  # the first token is predicted from nothing


def longest_book(tokenizer: Any, books: Iterable[tuple[str, str]], context: int) -> Stretch:
    """The first `context` tokens of the first book that has as many, or the longest book if none has.

    Args:
        books: title and text.
    """
    best: Stretch | None = None
    for title, text in books:
        for stretch in cut_text(tokenizer, title, text, context)[:1]:
            if best is None or len(stretch.tokens) > len(best.tokens):
                best = stretch
        if best is not None and len(best.tokens) == context:
            break
    if best is None:
        raise AHNError("pg19: no text in the data, expected books")
    return best


def measure(
    llm: Any,
    stretches: Sequence[Stretch],
    answers: Answers,
    *,
    capacity: int,
    context: int,
    progress: Callable[[int, bool], None],
) -> dict[str, Any]:
    """Perplexity by position over all stretches, and the cache held by the first.

    Args:
        llm: in this process, with `engine_arguments`.
        capacity: W + S. Tokens are also summed up by whether the window had been left when they were predicted.
        context: tokens of a whole stretch.
        progress: called for every stretch with its number, and whether its answer was kept from before.

    Returns:
        JSON values: ``buckets`` (`positions.Bucket.describe`), ``inside``, ``beyond`` and ``all`` (the same, in one
        bucket each), ``held``: pairs of tokens so far and bytes of cache, ``block_bytes``, ``stretches``, ``tokens``.
    """
    keys = [answers.key({"prompt_logprobs": _hash_tokens(stretch.tokens)}) for stretch in stretches]
    missing = [number for number, key in enumerate(keys) if answers.get(key) is None]
    for number in sorted(set(range(len(stretches))) - set(missing)):
        progress(number, True)
    # The first is alone in the engine, so that what is held is held for it.
    for batch in (missing[:1], missing[1:]) if missing[:1] == [0] else ([], missing):
        _ask(llm, stretches, batch, keys, answers, alone=batch == [0], progress=progress)

    values = [answers.get(key) for key in keys]
    read = [(value["logprobs"], stretch.sizes) for value, stretch in zip(values, stretches, strict=True) if value]
    limits = {"inside": (1, min(capacity + 1, context)), "beyond": (capacity + 1, context), "all": (1, context)}
    sums = {name: bucketed(read, edges)[0].describe() for name, edges in limits.items() if edges[0] < edges[1]}
    first = values[0] or {}
    return {
        "buckets": [bucket.describe() for bucket in bucketed(read, even_edges(context, BUCKETS))],
        **sums,
        "held": first["held"],
        "block_bytes": first["block_bytes"],
        "stretches": len(stretches),
        "tokens": sum(len(stretch.tokens) for stretch in stretches),
        "sources": sorted({stretch.source for stretch in stretches}),
    }


def _ask(
    llm: Any,
    stretches: Sequence[Stretch],
    numbers: Sequence[int],
    keys: Sequence[str],
    answers: Answers,
    *,
    alone: bool,
    progress: Callable[[int, bool], None],
) -> None:
    from vllm import SamplingParams

    cache = HeldCache(llm)
    held: list[tuple[int, int]] = []
    params = SamplingParams(
        temperature=0, max_tokens=AFTER_PROMPT, ignore_eos=True, prompt_logprobs=0, detokenize=False
    )

    def after_step() -> None:
        if alone and (reading := cache.read()) is not None:
            held.append(reading)

    def finished(number: int, output: Any) -> None:
        stretch = stretches[numbers[number]]
        entries = zip(stretch.tokens[1:], output.prompt_logprobs[1:], strict=True)
        logprobs = [float(entry[token].logprob) for token, entry in entries]
        value: dict[str, Any] = {"logprobs": logprobs}
        if alone:
            value |= {"held": held, "block_bytes": cache.block_bytes}
        answers.put(keys[numbers[number]], value)
        progress(numbers[number], False)

    run_requests(llm, [(stretches[number].tokens, params) for number in numbers], finished, after_step)


def _hash_tokens(tokens: Sequence[int]) -> str:
    return hashlib.sha256(array("I", tokens).tobytes()).hexdigest()
