"""An engine in a process of its own, driven step by step, so that two engines can take turns on one machine.

The engine runs inside that process (``VLLM_ENABLE_V1_MULTIPROCESSING=0``): the benchmark times the engine's own
steps, with neither HTTP nor sockets between, and reads its block pool. Compilation works, since a process
compiles for one engine only. While it waits for a command it uses no CPU.
"""

from __future__ import annotations

import dataclasses
import itertools
import multiprocessing
import os
import statistics
import time
from collections.abc import Sequence
from multiprocessing.connection import Connection
from typing import Any

ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
}


@dataclasses.dataclass(frozen=True)
class Answer:
    """One request that had the engine to itself."""

    first_token_s: float
    """Seconds from its arrival to its first token."""
    steps_s: list[float]
    """Seconds of each decode step, one token each."""
    tokens: list[int]
    blocks: int
    """Most cache blocks it held between two decode steps."""
    block_bytes: int
    """Bytes of a block, over all layers."""

    @property
    def total_s(self) -> float:
        """Seconds from arrival to the last token."""
        return self.first_token_s + sum(self.steps_s)

    @property
    def step_s(self) -> float:
        """Seconds of a decode step, the median."""
        return statistics.median(self.steps_s)


@dataclasses.dataclass(frozen=True)
class Throughput:
    """Several requests at once."""

    seconds: float
    cpu_s: float
    """Seconds of processor time, all threads: what other programs take is not in it."""
    first_tokens_s: float
    """Seconds until every request had its first token."""
    tokens: list[list[int]]


class EngineProcess:
    """An engine behind a pipe. ``arguments`` are those of `vllm.LLM`; ``threads`` are OpenMP's.

    Every method raises ``RuntimeError`` with the process's own traceback above it if the process fails.
    """

    def __init__(self, arguments: dict[str, Any], threads: int) -> None:
        # Before the process starts: what it imports on its way reads the number of threads.
        os.environ.update(ENVIRONMENT, OMP_NUM_THREADS=str(threads))
        os.environ.pop("VLLM_CPU_KVCACHE_SPACE", None)
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_run, args=(theirs, arguments), daemon=True)
        self._process.start()
        theirs.close()
        self.info: dict[str, Any] = self._receive()

    def answer(self, prompt: Sequence[int], max_tokens: int) -> Answer:
        """One request alone, greedy, exactly ``max_tokens`` long."""
        return self._call("answer", list(prompt), max_tokens)

    def throughput(self, prompts: Sequence[Sequence[int]], max_tokens: int) -> Throughput:
        """All requests at once, greedy, each exactly ``max_tokens`` long."""
        return self._call("throughput", [list(prompt) for prompt in prompts], max_tokens)

    def profile(self, prompt: Sequence[int], max_tokens: int) -> str:
        """Where the decode steps of one request spend their time, as a table."""
        return self._call("profile", list(prompt), max_tokens)

    def close(self) -> None:
        """Ends the process."""
        self._pipe.close()
        self._process.join(20)
        self._process.kill()
        self._process.join()

    def _call(self, *command: Any) -> Any:
        self._pipe.send(command)
        return self._receive()

    def _receive(self) -> Any:
        try:
            return self._pipe.recv()
        except EOFError:
            self._process.join(20)
            raise RuntimeError(f"the engine's process ended, exit code {self._process.exitcode}") from None


def _run(pipe: Connection, arguments: dict[str, Any]) -> None:
    started = time.perf_counter()
    engine = _Engine(arguments)
    pipe.send({"start_s": time.perf_counter() - started, **engine.describe()})
    while True:
        try:
            name, *values = pipe.recv()
        except EOFError:
            return
        pipe.send(getattr(engine, name)(*values))


class _Engine:
    def __init__(self, arguments: dict[str, Any]) -> None:
        from vllm import LLM

        # A cached prefix would answer a repetition without computing it.
        fixed = {
            "enable_prefix_caching": False,
            "skip_tokenizer_init": True,
            "distributed_executor_backend": "uni",
        }
        self.engine = LLM(**fixed, **arguments).llm_engine
        self.scheduler = self.engine.engine_core.engine_core.scheduler
        self.counter = 0

    def describe(self) -> dict[str, Any]:
        import torch

        config = self.engine.vllm_config
        return {
            "max_model_len": config.model_config.max_model_len,
            "block_size": config.cache_config.block_size,
            "num_blocks": self.scheduler.kv_cache_config.num_blocks,
            "block_bytes": self.block_bytes(),
            "threads": torch.get_num_threads(),
            "compiled": not config.model_config.enforce_eager,
            "attention": sorted({type(layer).__name__ for layer in self.layers()}),
        }

    def layers(self) -> list[Any]:
        return list(self.engine.vllm_config.compilation_config.static_forward_context.values())

    def block_bytes(self) -> int:
        """What a block takes in the pool, over all layers: the memory allocated for it, over the number of blocks."""
        storages = [layer.kv_cache.untyped_storage() for layer in self.layers()]
        allocated = {storage.data_ptr(): storage.nbytes() for storage in storages}  # groups lie over each other
        return sum(allocated.values()) // self.scheduler.kv_cache_config.num_blocks

    def held_blocks(self) -> int:
        pool = self.scheduler.kv_cache_manager.block_pool
        return pool.num_gpu_blocks - 1 - pool.get_num_free_blocks()  # one is vLLM's null block

    def add(self, prompt: list[int], max_tokens: int) -> None:
        from vllm import SamplingParams

        params = SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True, detokenize=False)
        self.engine.add_request(str(self.counter), {"prompt_token_ids": prompt}, params)
        self.counter += 1

    def answer(self, prompt: list[int], max_tokens: int) -> Answer:
        self.add(prompt, max_tokens)
        times, blocks = [time.perf_counter()], 0
        outputs: list[Any] = []
        while not outputs or not outputs[-1].finished:
            new = self.engine.step()
            if not new:
                continue
            outputs += new
            times.append(time.perf_counter())
            if len(times) > 3:  # the first decode step still holds what the last chunk of the prompt needed
                blocks = max(blocks, self.held_blocks())
        steps = [after - before for before, after in itertools.pairwise(times[1:])]
        tokens = list(outputs[-1].outputs[0].token_ids)
        return Answer(times[1] - times[0], steps, tokens, blocks, self.block_bytes())

    def throughput(self, prompts: list[list[int]], max_tokens: int) -> Throughput:
        first = self.counter
        started, cpu = time.perf_counter(), time.process_time()
        for prompt in prompts:
            self.add(prompt, max_tokens)
        begun: set[str] = set()
        tokens: dict[str, list[int]] = {}
        first_tokens_s = 0.0
        while self.engine.has_unfinished_requests():
            for output in self.engine.step():
                begun.add(output.request_id)
                if output.finished:
                    tokens[output.request_id] = list(output.outputs[0].token_ids)
            if len(begun) == len(prompts) and not first_tokens_s:
                first_tokens_s = time.perf_counter() - started
        seconds, cpu_s = time.perf_counter() - started, time.process_time() - cpu
        in_order = [tokens[str(first + number)] for number in range(len(prompts))]
        return Throughput(seconds, cpu_s, first_tokens_s, in_order)

    def profile(self, prompt: list[int], max_tokens: int) -> str:
        from torch.profiler import ProfilerActivity
        from torch.profiler import profile as torch_profile

        self.add(prompt, max_tokens)
        steps = 0
        while steps < 3:  # the prompt, and what the first decode steps set up
            steps += bool(self.engine.step())
        with torch_profile(activities=[ProfilerActivity.CPU]) as profiler:
            while self.engine.has_unfinished_requests():
                self.engine.step()
        return str(profiler.key_averages().table(sort_by="self_cpu_time_total", row_limit=25))
