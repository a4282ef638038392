"""Engines in processes of their own, driven step by step, so that several can take turns on one machine.

An engine runs inside its process (``VLLM_ENABLE_V1_MULTIPROCESSING=0``), so the engine's own steps are timed, with
neither HTTP nor sockets between, and its block pool can be read. Compilation works, since a process compiles for one
engine only. An engine that waits for a command uses neither CPU nor GPU.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import multiprocessing
import os
import time
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from typing import Any, NamedTuple

Prompt = list[int]

ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
}


class EngineError(RuntimeError):
    """The engine failed; the message is what it said."""


@dataclasses.dataclass(frozen=True)
class Generation:
    """Greedy answers to some prompts at once.

    Attributes:
        seconds: from the arrival of the prompts to the last token.
        cpu_s: seconds of processor time, all threads: what other programs take is not in it.
        first_token_s: seconds until every request had its first token.
        steps_s: seconds of each step after that.
        blocks: most cache blocks held between two decode steps.
    """

    seconds: float
    cpu_s: float
    first_token_s: float
    steps_s: list[float]
    tokens: list[list[int]]
    blocks: int


class Choice(NamedTuple):
    """One greedy token, and the log-probabilities of the most likely tokens, itself among them."""

    token: int
    logprobs: dict[int, float]


class Held(NamedTuple):
    """Seconds to the first token of a sequence that was to stay; or why there was no room for it, else empty."""

    first_token_s: float
    refused: str


class Decoding(NamedTuple):
    """Decode steps of all the sequences that are held, a token each in every step.

    ``preemptions`` counts sequences that had to give their blocks back, the first of which ends the steps; ``blocks``
    are those that all the sequences hold after the last step.
    """

    steps_s: list[float]
    preemptions: int
    blocks: int


class EngineProcess:
    """An engine in a process of its own. Its methods are those of `Engine`; they raise `EngineError`.

    ``arguments`` are those of `vllm.LLM`, ``threads`` OpenMP's; ``seed`` makes weights for ``load_format="dummy"``.
    """

    def __init__(self, arguments: dict[str, Any], threads: int | None = None, seed: int | None = None) -> None:
        # Before the process starts: what it imports on its way reads the number of threads.
        os.environ.update(ENVIRONMENT | ({"OMP_NUM_THREADS": str(threads)} if threads else {}))
        os.environ.pop("VLLM_CPU_KVCACHE_SPACE", None)
        self._process = ProcessPoolExecutor(1, mp_context=_context())
        self._started = self._process.submit(_call, "start", arguments, seed)
        self.info: dict[str, Any] = {}

    def wait(self) -> None:
        """Return when the engine has started; `info` then says what it is."""
        self.info = self._started.result()

    def close(self) -> None:
        """End the process."""
        self._process.shutdown(cancel_futures=True)

    def __getattr__(self, method: str) -> Callable[..., Any]:
        return lambda *values: self._process.submit(_call, method, *values).result()


@contextlib.contextmanager
def started(
    arguments: dict[str, dict[str, Any]], threads: int | None, seed: int | None = None
) -> Iterator[dict[str, EngineProcess]]:
    """Yield engines by name, which have been told to start, and end them afterwards."""
    with contextlib.ExitStack() as stack:
        engines = {name: EngineProcess(values, threads, seed) for name, values in arguments.items()}
        for engine in engines.values():
            stack.callback(engine.close)
        yield engines


def _context() -> Any:
    import torch

    if torch.cuda.is_available():  # which does not outlive a fork
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["vllm", "vllm.entrypoints.llm"])  # most of what a start takes
    return context


_engine: Engine | None = None
"""The one of this process."""


def _call(method: str, *values: Any) -> Any:
    """Start the engine or call it. All errors are raised as `EngineError`: not all of vLLM's can leave the process."""
    global _engine
    began = time.perf_counter()
    try:
        if method != "start":
            return getattr(_engine, method)(*values)
        _engine = Engine(*values)
        return {"start_s": time.perf_counter() - began, **_engine.describe()}
    except Exception as error:
        traceback.print_exc()
        raise EngineError(f"{type(error).__name__}: {error}") from None


class Engine:
    """vLLM's engine, in this process. See `EngineProcess`."""

    def __init__(self, arguments: dict[str, Any], seed: int | None) -> None:
        from vllm import LLM

        if seed is not None:
            from inputs import replace_dummy_weights

            replace_dummy_weights(seed)
        # A cached prefix would answer a repetition without computing it.
        fixed = {
            "disable_log_stats": False,
            "enable_prefix_caching": False,
            "skip_tokenizer_init": True,
            "distributed_executor_backend": "uni",
        }
        self.llm = LLM(**(fixed | arguments))
        self.engine = self.llm.llm_engine
        self.scheduler = self.engine.engine_core.engine_core.scheduler
        self.held: list[str] = []
        self._names = map(str, itertools.count())

    def describe(self) -> dict[str, Any]:
        """Return what the engine is and what its cache is made of."""
        import torch
        from vllm.platforms import current_platform

        config = self.engine.vllm_config
        layers = list(config.compilation_config.static_forward_context.values())
        storages = [layer.kv_cache.untyped_storage() for layer in layers]
        allocated = {storage.data_ptr(): storage.nbytes() for storage in storages}  # groups lie over each other
        num_blocks = self.scheduler.kv_cache_config.num_blocks
        runner = type(self.engine.model_executor.driver_worker.worker.model_runner)
        return {
            "max_model_len": config.model_config.max_model_len,
            "block_size": config.cache_config.block_size,
            "num_blocks": num_blocks,
            "block_bytes": sum(allocated.values()) // num_blocks,
            "threads": torch.get_num_threads(),
            "compiled": not config.model_config.enforce_eager,
            "attention": sorted({type(layer).__name__ for layer in layers}),
            "runner": f"{runner.__module__}.{runner.__name__}",
            "device": current_platform.get_device_name(),
        }

    def count(self, context: int) -> float:
        """Return how many sequences of ``context`` tokens fit by vLLM's own count, the one it logs when it starts."""
        from vllm.v1.core.kv_cache_utils import get_max_concurrency_for_kv_cache_config

        config = self.engine.vllm_config
        longest, config.model_config.max_model_len = config.model_config.max_model_len, context
        try:
            return float(get_max_concurrency_for_kv_cache_config(config, self.scheduler.kv_cache_config))
        finally:
            config.model_config.max_model_len = longest

    def generate(self, prompts: list[Prompt], max_tokens: int) -> Generation:
        """Answer all prompts at once, each with exactly ``max_tokens`` tokens."""
        began, cpu = time.perf_counter(), time.process_time()
        names = [self._add(prompt, max_tokens) for prompt in prompts]
        tokens: dict[str, list[int]] = {}
        begun: set[str] = set()
        times: list[float] = []
        blocks = 0
        while self.engine.has_unfinished_requests():
            outputs = self.engine.step()
            begun |= {output.request_id for output in outputs}
            tokens |= {output.request_id: list(output.outputs[0].token_ids) for output in outputs if output.finished}
            if outputs and len(begun) == len(prompts):
                times.append(time.perf_counter())
                if len(times) > 2:  # the first decode step still holds what the last chunk of the prompt needed
                    blocks = max(blocks, self._held_blocks())
        steps = [after - before for before, after in itertools.pairwise(times)]
        cpu_s = time.process_time() - cpu
        return Generation(times[-1] - began, cpu_s, times[0] - began, steps, [tokens[name] for name in names], blocks)

    def choices(self, prompts: list[Prompt], max_tokens: int, logprobs: int) -> list[list[Choice]]:
        """Answer as `generate` does; return every token, with the ``logprobs`` most likely ones in its place."""
        inputs = [{"prompt_token_ids": prompt} for prompt in prompts]
        sampling = self._sampling(max_tokens, logprobs=logprobs)
        answers = []
        for output in (answer.outputs[0] for answer in self.llm.generate(inputs, sampling, use_tqdm=False)):
            best = [{token: entry.logprob for token, entry in step.items()} for step in output.logprobs]
            answers.append([Choice(*step) for step in zip(output.token_ids, best, strict=True)])
        return answers

    def hold(self, prompt: Prompt, max_tokens: int) -> Held:
        """Take in one more sequence, to stay with those before it and generate up to ``max_tokens``, if there is room.

        Returns once it has its first token; the others get tokens of theirs meanwhile.
        """
        known, preempted = set(self.scheduler.requests), self._preemptions()
        began = time.perf_counter()
        name = self._add(prompt, max_tokens)
        request = next(request for key, request in self.scheduler.requests.items() if key not in known)
        refused = ""
        while not refused:
            if any(output.request_id == name for output in self.engine.step()):
                self.held.append(name)
                return Held(time.perf_counter() - began, "")
            # Nothing else waits, so a step that does not take it in has no room for it.
            if request.status.name == "WAITING":
                refused = "it would not fit beside the others"
            elif self._preemptions() > preempted:
                refused = "one was preempted for want of room"
        self.engine.abort_request([name])
        self._settle()
        return Held(0.0, refused)

    def decode(self, steps: int) -> Decoding:
        """Run so many decode steps of all the sequences that are held, after one that is not timed."""
        self._settle()
        preempted = self._preemptions()
        steps_s: list[float] = []
        before = time.perf_counter()
        while len(steps_s) < steps and self._preemptions() == preempted:
            if len(self._step()) == len(self.held):
                now = time.perf_counter()
                steps_s.append(now - before)
                before = now
        return Decoding(steps_s, self._preemptions() - preempted, self._held_blocks())

    def drop(self) -> None:
        """End the newest of the sequences that are held."""
        self.engine.abort_request([self.held.pop()])
        self._settle()

    def cached_blocks(self) -> int:
        """Return how many blocks the prefix cache holds."""
        return sum(block.block_hash is not None for block in self.scheduler.kv_cache_manager.block_pool.blocks)

    def metric(self, name: str) -> float:
        """Return vLLM's own counter ``name``."""
        return next(float(metric.value) for metric in self.llm.get_metrics() if metric.name == name)

    def release(self) -> None:
        """End all the sequences that are held."""
        self.engine.abort_request(self.held)
        self.held = []
        while self.engine.has_unfinished_requests():
            self.engine.step()

    def _sampling(self, max_tokens: int, **keywords: Any) -> Any:
        from vllm import SamplingParams

        return SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True, detokenize=False, **keywords)

    def _add(self, prompt: Prompt, max_tokens: int) -> str:
        name = next(self._names)
        self.engine.add_request(name, {"prompt_token_ids": prompt}, self._sampling(max_tokens))
        return name

    def _settle(self) -> None:
        """Step until every sequence that is held gets a token in one step."""
        while self.held and len(self._step()) < len(self.held):
            pass

    def _step(self) -> list[Any]:
        outputs: list[Any] = self.engine.step()
        if any(output.finished and output.request_id in self.held for output in outputs):
            raise RuntimeError("a sequence that was to stay came to its end: it was given too few tokens")
        return outputs

    def _preemptions(self) -> int:
        return sum(request.num_preemptions for request in self.scheduler.requests.values())

    def _held_blocks(self) -> int:
        pool = self.scheduler.kv_cache_manager.block_pool
        return pool.num_gpu_blocks - 1 - pool.get_num_free_blocks()  # one is vLLM's null block
