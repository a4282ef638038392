"""Engines for tests: the real one, started in this process through the ways that users have.

An engine costs under a second here. Most of the four seconds that vLLM would take for a tiny model goes to what one
process need not do for each of many engines: see :func:`_without_collections` and :func:`_register_overrides_once`.
"""

import contextlib
import functools
import gc
from collections.abc import Iterator, Sequence
from typing import Any
from unittest import mock

import torch
from vllm import LLM, SamplingParams
from vllm.platforms import current_platform

DEFAULTS: dict[str, Any] = {
    "dtype": "float32",
    "max_model_len": 1024,
    "block_size": 32,
    "enforce_eager": True,
    "enable_prefix_caching": False,
    "kv_cache_memory_bytes": 64 << 20,
    "distributed_executor_backend": "uni",
    "skip_tokenizer_init": True,
    "max_logprobs": -1,
    "disable_log_stats": False,
}


@contextlib.contextmanager
def engine(base: Any, ahn: Any = None, **arguments: Any) -> Iterator[LLM]:
    """An engine over the model folder ``base``; ``ahn`` is what a user gives as ``additional_config["ahn"]``."""
    if ahn is not None:
        arguments["additional_config"] = {"ahn": ahn}
    _register_overrides_once()
    with _without_collections():
        llm = LLM(model=str(base), **(DEFAULTS | arguments))
    try:
        yield llm
    finally:
        with _without_collections():
            llm.llm_engine.engine_core.shutdown()
        del llm
        gc.collect()
        gc.freeze()


@contextlib.contextmanager
def _without_collections() -> Iterator[None]:
    """Leave out vLLM's own collections of garbage.

    Between one engine and the next there are nine of them, each over all that vLLM has imported. :func:`engine`
    collects once, over what is new.
    """
    with contextlib.ExitStack() as stack:
        for name in ("collect", "freeze", "unfreeze"):
            stack.enter_context(mock.patch.object(gc, name))
        yield


@functools.cache
def _register_overrides_once() -> None:
    """Let vLLM replace its Triton kernels by CPU functions for the first engine only: it looks through all modules."""
    platform = type(current_platform)
    register = functools.cache(platform.register_triton_kernel_overrides)
    platform.register_triton_kernel_overrides = staticmethod(register)  # type: ignore[method-assign]


def greedy(
    llm: LLM,
    prompts: Sequence[Sequence[int] | torch.Tensor],
    max_tokens: int,
    logprobs: int | None = None,
    lora_request: Any = None,
) -> list[tuple[list[int], torch.Tensor | None]]:
    """Greedy continuations of token prompts, all submitted at once; ``lora_request`` is as in ``LLM.generate``.

    Returns:
        For each prompt its tokens and, if ``logprobs`` is -1, ``[max_tokens, vocab]`` of what the engine reports.
    """
    params = SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True, detokenize=False, logprobs=logprobs)
    inputs = [{"prompt_token_ids": torch.as_tensor(prompt).tolist()} for prompt in prompts]
    outputs = [output.outputs[0] for output in llm.generate(inputs, params, use_tqdm=False, lora_request=lora_request)]
    return [(list(output.token_ids), _dense(output.logprobs)) for output in outputs]


def _dense(logprobs: Any) -> torch.Tensor | None:
    if not logprobs:
        return None
    return torch.tensor([[step[token].logprob for token in range(len(step))] for step in logprobs])


def metric(llm: LLM, name: str) -> float:
    """The engine's own counter or gauge ``name``."""
    return next(float(m.value) for m in llm.get_metrics() if m.name == name)


def cache_manager(llm: LLM) -> Any:
    """The scheduler's KV cache manager of an in-process engine."""
    return llm.llm_engine.engine_core.engine_core.scheduler.kv_cache_manager


def worker_layers(llm: LLM) -> dict[str, Any]:
    """The worker's layers that have a cache, by name."""
    return llm.llm_engine.vllm_config.compilation_config.static_forward_context
