"""Perplexity of a text and cache held, both by position, through the engine: what a worker does for one method."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from vllm_ahn.tools.evaluate import texts
from vllm_ahn.tools.evaluate.answers import Answers, ask
from vllm_ahn.tools.evaluate.plan import AFTER_PROMPT, BUCKETS, Row


def measure(row: Row, answers: Answers, send: Callable[..., None]) -> dict[str, Any]:
    """Measure perplexity by position over all stretches, and the cache held by the first.

    Args:
        send: takes a worker's events.

    Returns:
        JSON values: ``buckets``, ``all``, ``within_window`` and ``beyond_window`` (`bucketed`, all but the
        first in one bucket each; a token is beyond the window if more than W + S tokens come before it), ``held``:
        pairs of tokens so far and bytes of cache, ``block_bytes``, ``stretches``, ``tokens``, ``sources``.
    """
    from vllm import LLM, SamplingParams

    setting = row.setting
    llm = LLM(**row.engine)
    stretches = texts.read_stretches(llm.get_tokenizer(), setting.texts, setting.data, setting.context, setting.limit)
    send(tasks={"text": len(stretches)})
    params = SamplingParams(temperature=0, max_tokens=1, ignore_eos=True, prompt_logprobs=0, detokenize=False)
    to_the_end = params.clone()
    to_the_end.max_tokens = AFTER_PROMPT
    (block_bytes, read_cache), held = held_cache(llm), []

    def after_step() -> None:
        if (reading := read_cache()) is not None:
            held.append(reading)

    def answered(kept: bool) -> None:
        send(answer="text", kept=kept)

    # The first is alone in the engine, so that what is held is held for it.
    [first] = ask(
        llm,
        [(stretches[0].tokens, to_the_end)],
        answers,
        lambda output: {"logprobs": prompt_logprobs(output), "held": held, "block_bytes": block_bytes},
        answered,
        after_step,
    )
    others = [(stretch.tokens, params) for stretch in stretches[1:]]
    rest = ask(llm, others, answers, lambda output: {"logprobs": prompt_logprobs(output)}, answered)

    measured = [(a["logprobs"], stretch.sizes) for a, stretch in zip([first, *rest], stretches, strict=True)]
    edge, end = min(setting.capacity + 1, setting.context), setting.context
    parts = {"all": (1, end), "within_window": (1, edge), "beyond_window": (edge, end)}
    return {
        "buckets": bucketed(measured, even_edges(end, BUCKETS)),
        **{name: bucketed(measured, limits)[0] for name, limits in parts.items() if limits[0] < limits[1]},
        "held": first["held"],
        "block_bytes": first["block_bytes"],
        "stretches": len(stretches),
        "tokens": sum(len(stretch.tokens) for stretch in stretches),
        "sources": sorted({stretch.source for stretch in stretches}),
    }


def bucketed(stretches: Sequence[tuple[Sequence[float], Sequence[int]]], edges: Sequence[int]) -> list[dict[str, Any]]:
    """Sum `stretches` of text over the buckets between neighbouring `edges`.

    Args:
        stretches: for each the log-probabilities of its tokens but the first (element i is of the token at position
            i + 1, predicted from i + 1 tokens), and the UTF-8 bytes of all its tokens.
        edges: ascending positions. A token outside them is not counted.

    Returns:
        for each bucket ``start`` and ``end``: its tokens were predicted from ``start`` to ``end`` - 1 tokens before
        them; ``tokens``; ``nats``, their sum of -ln p; ``bytes``; ``perplexity``, exp of nats a token, None without
        tokens; ``bits_per_byte``, comparable between tokenizers, None without bytes.
    """
    import numpy as np

    positions = np.concatenate([np.arange(1, len(logprobs) + 1) for logprobs, _ in stretches])
    sizes = np.concatenate([sizes[1 : len(logprobs) + 1] for logprobs, sizes in stretches])
    nats = -np.concatenate([logprobs for logprobs, _ in stretches])
    limits = np.asarray(edges) - 0.5  # between positions: np.histogram counts what is on the last edge
    sums = [np.histogram(positions, limits, weights=weights)[0].tolist() for weights in (None, nats, sizes)]
    return [
        {
            "start": start,
            "end": end,
            "tokens": int(tokens),
            "nats": nats,
            "bytes": int(size),
            "perplexity": math.exp(nats / tokens) if tokens else None,
            "bits_per_byte": nats / math.log(2) / size if size else None,
        }
        for start, end, tokens, nats, size in zip(edges[:-1], edges[1:], *sums, strict=True)
    ]


def even_edges(length: int, count: int) -> list[int]:
    """Return the edges of at most `count` buckets of one width over the positions 1 .. `length` - 1.

    The last bucket may be narrower.
    """
    width = max(1, math.ceil((length - 1) / count))
    return [*range(1, length, width), length]


def held_cache(llm: Any) -> tuple[int, Callable[[], tuple[int, int] | None]]:
    """Look into the cache of `llm`, a `vllm.LLM` in this process (``VLLM_ENABLE_V1_MULTIPROCESSING=0``).

    Returns:
        the bytes of a block, over all layers and workers; and a function that reads the tokens of the only request so
        far and the bytes held for them, None if there is no request.
    """
    scheduler = llm.llm_engine.engine_core.engine_core.scheduler
    config, pool = scheduler.kv_cache_config, scheduler.kv_cache_manager.block_pool
    # Every entry gives the size of the one allocation, in which the groups of an AHN lie over each other.
    of_worker = max(tensor.size for tensor in config.kv_cache_tensors) // config.num_blocks
    block_bytes = of_worker * llm.llm_engine.vllm_config.parallel_config.world_size

    def read() -> tuple[int, int] | None:
        held = pool.num_gpu_blocks - 1 - pool.get_num_free_blocks()  # one is vLLM's null block
        running = scheduler.running
        return (running[0].num_computed_tokens, held * block_bytes) if running else None

    return block_bytes, read


def prompt_logprobs(output: Any) -> list[float]:
    """Return the log-probability of every token of a prompt but the first, from a ``RequestOutput``."""
    entries = zip(output.prompt_token_ids[1:], output.prompt_logprobs[1:], strict=True)
    return [float(entry[token].logprob) for token, entry in entries]
