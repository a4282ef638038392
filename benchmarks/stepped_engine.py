"""An engine in this process, driven step by step: the benchmark times the engine's own steps and reads its block pool.

vLLM is imported when an engine is made, so that a program may read the results' classes without it.
"""

from __future__ import annotations

import dataclasses
import itertools
import statistics
import time
from typing import Any


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


@dataclasses.dataclass(frozen=True)
class Choice:
    """One greedy token, and what it was chosen from."""

    token: int
    logprobs: dict[int, float]
    """Of the most likely tokens, the chosen one among them."""


@dataclasses.dataclass(frozen=True)
class Held:
    """What became of a sequence that was to stay."""

    first_token_s: float
    """Seconds from its arrival to its first token."""
    refused: str
    """Why there was no room for it; empty if it stays."""


@dataclasses.dataclass(frozen=True)
class Decoding:
    """Decode steps of all the sequences that are held, a token each in every step."""

    steps_s: list[float]
    """Seconds of each step."""
    preemptions: int
    """Sequences that had to give their blocks back meanwhile; the steps end with the first."""
    blocks: int
    """Cache blocks that all the sequences hold, after the last step."""


class SteppedEngine:
    """``arguments`` are those of `vllm.LLM`.

    With a ``seed``, ``load_format="dummy"`` loads the values of `random_weights` instead of vLLM's.
    """

    def __init__(self, arguments: dict[str, Any], seed: int | None = None) -> None:
        from vllm import LLM

        if seed is not None:
            from random_weights import replace_dummy_weights

            replace_dummy_weights(seed)
        # A cached prefix would answer a repetition without computing it.
        fixed = {
            "enable_prefix_caching": False,
            "skip_tokenizer_init": True,
            "distributed_executor_backend": "uni",
        }
        self.llm = LLM(**fixed, **arguments)
        self.engine = self.llm.llm_engine
        self.scheduler = self.engine.engine_core.engine_core.scheduler
        self.counter = 0
        self.held: list[str] = []

    def describe(self) -> dict[str, Any]:
        import torch
        from vllm.platforms import current_platform

        config = self.engine.vllm_config
        runner = self.engine.model_executor.driver_worker.worker.model_runner
        return {
            "max_model_len": config.model_config.max_model_len,
            "block_size": config.cache_config.block_size,
            "num_blocks": self.scheduler.kv_cache_config.num_blocks,
            "block_bytes": self.block_bytes(),
            "threads": torch.get_num_threads(),
            "compiled": not config.model_config.enforce_eager,
            "attention": sorted({type(layer).__name__ for layer in self.layers()}),
            "runner": f"{type(runner).__module__}.{type(runner).__name__}",
            "device": current_platform.get_device_name(),
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

    def count(self, context: int) -> float:
        """How many sequences of ``context`` tokens fit by vLLM's own count, the one that it logs when it starts."""
        from vllm.v1.core.kv_cache_utils import get_max_concurrency_for_kv_cache_config

        model_config = self.engine.vllm_config.model_config
        longest, model_config.max_model_len = model_config.max_model_len, context
        try:
            return float(
                get_max_concurrency_for_kv_cache_config(self.engine.vllm_config, self.scheduler.kv_cache_config)
            )
        finally:
            model_config.max_model_len = longest

    def add(self, prompt: list[int], max_tokens: int) -> str:
        from vllm import SamplingParams

        params = SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True, detokenize=False)
        name = str(self.counter)
        self.engine.add_request(name, {"prompt_token_ids": prompt}, params)
        self.counter += 1
        return name

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

    def choices(self, prompts: list[list[int]], max_tokens: int, logprobs: int) -> list[list[Choice]]:
        from vllm import SamplingParams

        params = SamplingParams(
            temperature=0, max_tokens=max_tokens, ignore_eos=True, detokenize=False, logprobs=logprobs
        )
        inputs = [{"prompt_token_ids": prompt} for prompt in prompts]
        answers = [output.outputs[0] for output in self.llm.generate(inputs, params, use_tqdm=False)]
        return [
            [
                Choice(token, {other: entry.logprob for other, entry in step.items()})
                for token, step in zip(answer.token_ids, answer.logprobs, strict=True)
            ]
            for answer in answers
        ]

    def hold(self, prompt: list[int], max_tokens: int) -> Held:
        known, preempted = set(self.scheduler.requests), self.preemptions()
        started = time.perf_counter()
        name = self.add(prompt, max_tokens)
        request = next(request for key, request in self.scheduler.requests.items() if key not in known)
        refused = ""
        while not refused:
            if any(output.request_id == name for output in self.engine.step()):
                self.held.append(name)
                return Held(time.perf_counter() - started, "")
            # Nothing else waits, so a step that does not take it in has no room for it.
            if request.status.name == "WAITING":
                refused = "it would not fit beside the others"
            elif self.preemptions() > preempted:
                refused = "one was preempted for want of room"
        self.engine.abort_request([name])
        self.settle()
        return Held(0.0, refused)

    def decode(self, steps: int) -> Decoding:
        self.settle()
        preempted = self.preemptions()
        steps_s: list[float] = []
        before = time.perf_counter()
        while len(steps_s) < steps and self.preemptions() == preempted:
            if len(self.step_held()) == len(self.held):
                now = time.perf_counter()
                steps_s.append(now - before)
                before = now
        return Decoding(steps_s, self.preemptions() - preempted, self.held_blocks())

    def drop(self) -> None:
        """Ends the newest of the sequences that are held."""
        self.engine.abort_request([self.held.pop()])
        self.settle()

    def release(self) -> None:
        """Ends all the sequences that are held."""
        self.engine.abort_request(self.held)
        self.held = []
        while self.engine.has_unfinished_requests():
            self.engine.step()

    def settle(self) -> None:
        """Steps until every sequence that is held gets a token in one step."""
        while self.held and len(self.step_held()) < len(self.held):
            pass

    def step_held(self) -> list[Any]:
        outputs: list[Any] = self.engine.step()
        if any(output.finished and output.request_id in self.held for output in outputs):
            raise RuntimeError("a sequence that was to stay came to its end: it was given too few tokens")
        return outputs

    def preemptions(self) -> int:
        return sum(request.num_preemptions for request in self.scheduler.requests.values())

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
