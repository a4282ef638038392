"""Runs requests on an engine of vLLM and hands out each answer when it is finished."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

ENVIRONMENT = {
    # The engine in the worker's own process: an error in it is the worker's error, and its scheduler can be read.
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_NO_USAGE_STATS": "1",
}
"""Set for a worker unless the user has set something else."""

_numbers = itertools.count()


def run_requests(
    llm: Any,
    requests: Sequence[tuple[Sequence[int], Any]],
    finished: Callable[[int, Any], None],
    after_step: Callable[[], None] = lambda: None,
) -> None:
    """Asks everything at once and returns when all is answered.

    Args:
        llm: a `vllm.LLM` that nobody else uses meanwhile.
        requests: for each the tokens of the prompt and its `vllm.SamplingParams`.
        finished: called with the number of a request and its ``RequestOutput`` as soon as that is finished.
        after_step: called after every step of the engine.
    """
    from vllm.sampling_params import RequestOutputKind

    engine = llm.llm_engine
    number_of: dict[str, int] = {}
    for number, (tokens, params) in enumerate(requests):
        name = f"ahn-eval-{next(_numbers)}"
        params = params.clone()
        params.output_kind = RequestOutputKind.FINAL_ONLY
        engine.add_request(name, {"prompt_token_ids": list(tokens)}, params)
        number_of[name] = number
    while engine.has_unfinished_requests():
        outputs = engine.step()
        after_step()
        for output in outputs:
            if output.finished:
                finished(number_of.pop(output.request_id), output)


class HeldCache:
    """The cache that an in-process engine's requests hold."""

    def __init__(self, llm: Any) -> None:
        """`llm` is a `vllm.LLM` in this process (``VLLM_ENABLE_V1_MULTIPROCESSING=0``)."""
        self._scheduler = llm.llm_engine.engine_core.engine_core.scheduler
        config = self._scheduler.kv_cache_config
        # Every entry gives the size of the one allocation, in which the groups of an AHN lie over each other.
        of_worker = max(tensor.size for tensor in config.kv_cache_tensors) // config.num_blocks
        self.block_bytes = of_worker * llm.llm_engine.vllm_config.parallel_config.world_size
        """Bytes of a block, over all layers and workers."""

    def read(self) -> tuple[int, int] | None:
        """Tokens of the only request so far, and the bytes held for them; None if no request is there."""
        running = self._scheduler.running
        if not running:
            return None
        pool = self._scheduler.kv_cache_manager.block_pool
        held = pool.num_gpu_blocks - 1 - pool.get_num_free_blocks()  # one is vLLM's null block
        return running[0].num_computed_tokens, held * self.block_bytes
