"""An engine in a process of its own, driven step by step, so that several engines can take turns on one machine.

The engine runs inside that process (``VLLM_ENABLE_V1_MULTIPROCESSING=0``): the benchmark times the engine's own
steps, with neither HTTP nor sockets between. Compilation works, since a process compiles for one engine only. While
it waits for a command it uses neither CPU nor GPU.
"""

from __future__ import annotations

import dataclasses
import multiprocessing
import os
import time
import traceback
from collections.abc import Sequence
from multiprocessing.connection import Connection
from typing import Any

from stepped_engine import Answer, Choice, Decoding, Held, SteppedEngine, Throughput

ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
}


class EngineError(RuntimeError):
    """The engine's process failed; the message is what it said."""


@dataclasses.dataclass(frozen=True)
class _Failure:
    message: str


class EngineProcess:
    """An engine behind a pipe. ``arguments`` are those of `vllm.LLM`, ``seed`` that of its random weights, if any.

    ``threads`` are OpenMP's, None for its own choice. Unless ``wait`` is false the engine has started on return; else
    `wait` says when. Every method raises `EngineError`, with the process's own traceback above it, if the process
    fails.
    """

    def __init__(
        self, arguments: dict[str, Any], threads: int | None = None, *, seed: int | None = None, wait: bool = True
    ) -> None:
        # Before the process starts: what it imports on its way reads the number of threads.
        os.environ.update(ENVIRONMENT)
        if threads is not None:
            os.environ["OMP_NUM_THREADS"] = str(threads)
        os.environ.pop("VLLM_CPU_KVCACHE_SPACE", None)
        context = _context()
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_run, args=(theirs, arguments, seed), daemon=True)
        self._process.start()
        theirs.close()
        self.info: dict[str, Any] = {}
        if wait:
            self.wait()

    def wait(self) -> None:
        """Returns when the engine has started; `info` then says what it is."""
        self.info = self._receive()

    def answer(self, prompt: Sequence[int], max_tokens: int) -> Answer:
        """One request alone, greedy, exactly ``max_tokens`` long."""
        return self._call("answer", list(prompt), max_tokens)

    def throughput(self, prompts: Sequence[Sequence[int]], max_tokens: int) -> Throughput:
        """All requests at once, greedy, each exactly ``max_tokens`` long."""
        return self._call("throughput", [list(prompt) for prompt in prompts], max_tokens)

    def choices(self, prompts: Sequence[Sequence[int]], max_tokens: int, logprobs: int) -> list[list[Choice]]:
        """As `throughput`, but with the ``logprobs`` most likely tokens of every step."""
        return self._call("choices", [list(prompt) for prompt in prompts], max_tokens, logprobs)

    def count(self, context: int) -> float:
        """How many sequences of ``context`` tokens fit by vLLM's own count."""
        return self._call("count", context)

    def hold(self, prompt: Sequence[int], max_tokens: int) -> Held:
        """Takes in one more sequence, to stay with those before it, if there is room; ``max_tokens`` must outlast it.

        Returns once it has its first token. The others get tokens of theirs meanwhile.
        """
        return self._call("hold", list(prompt), max_tokens)

    def decode(self, steps: int) -> Decoding:
        """So many decode steps of all the sequences that are held."""
        return self._call("decode", steps)

    def drop(self) -> None:
        """Ends the newest of the sequences that are held."""
        self._call("drop")

    def release(self) -> None:
        """Ends all the sequences that are held."""
        self._call("release")

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
            received = self._pipe.recv()
        except EOFError:
            self._process.join(20)
            raise EngineError(f"the engine's process ended, exit code {self._process.exitcode}") from None
        if isinstance(received, _Failure):
            raise EngineError(received.message)
        return received


def _context() -> Any:
    """On a CPU, processes begin with vLLM imported, which is most of a start; CUDA does not outlive a fork."""
    import torch

    if torch.cuda.is_available():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["vllm", "vllm.entrypoints.llm"])
    return context


def _run(pipe: Connection, arguments: dict[str, Any], seed: int | None) -> None:
    try:
        started = time.perf_counter()
        engine = SteppedEngine(arguments, seed)
        pipe.send({"start_s": time.perf_counter() - started, **engine.describe()})
        while True:
            try:
                name, *values = pipe.recv()
            except EOFError:
                return
            pipe.send(getattr(engine, name)(*values))
    except Exception as error:
        traceback.print_exc()
        pipe.send(_Failure(f"{type(error).__name__}: {error}"))
