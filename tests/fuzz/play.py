"""Run a case: its requests come, are aborted and finish in a real engine, which is stepped here."""

import contextlib
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from vllm import LLM, SamplingParams
from vllm.v1.core.kv_cache_utils import get_kv_cache_groups
from vllm.v1.engine import core

from fuzz import drafts
from fuzz.case import Case, Request
from support import spoilt_drafts
from support.engines import cache_manager, engine, metric, worker_layers
from vllm_ahn.attention.layer import AHNAttention
from vllm_ahn.reference import ReferenceModel, from_folders
from vllm_ahn.tools.tiny import TinyPaths, make_tiny


class Failure(AssertionError):
    """The engine did something wrong."""


@dataclass
class Answer:
    """What a request got."""

    prompt: list[int]
    tokens: list[int] = field(default_factory=list)
    logprobs: list[Any] = field(default_factory=list)
    """For each token vLLM's dictionary from tokens to log-probabilities."""
    num_cached_tokens: int = 0
    aborted: bool = False


@dataclass
class Played:
    """What a case came to."""

    answers: list[Answer]
    """In the order of the case's requests."""
    steps: int = 0
    core: str = ""
    """The class that computed the layers."""
    preemptions: int = 0
    prefix_hit_tokens: int = 0
    accepted_drafts: dict[int, int] = field(default_factory=dict)
    """How often how many were accepted."""
    num_accepted_drafts: int = 0


@contextlib.contextmanager
def checkpoint(case: Case) -> Iterator[TinyPaths]:
    """The case's checkpoints, in a folder that is removed afterwards."""
    with tempfile.TemporaryDirectory(prefix="vllm-ahn-fuzz-") as folder:
        yield make_tiny(Path(folder), **case.model)


def reference(case: Case, paths: TinyPaths) -> ReferenceModel:
    """The independent model, in float64 and token by token."""
    assert paths.ahn is not None
    return from_folders(paths.base, paths.ahn, case.window, case.sinks, recurrence="naive", dtype=torch.float64)


@contextlib.contextmanager
def case_engine(case: Case, paths: TinyPaths, **arguments: Any) -> Iterator[LLM]:
    """The case's engine, every page of which holds NaN; ``arguments`` come before the case's."""
    asked = {**case.engine, **arguments}
    if case.drafts is not None and "speculative_config" not in arguments:
        asked["speculative_config"] = drafts.speculative_config(case.drafts)
    asked = {name: value for name, value in asked.items() if value is not None}
    asked["use_tqdm_on_load"] = False
    ahn = {"checkpoint": str(paths.ahn), "window": case.window, "sinks": case.sinks}
    threads = torch.get_num_threads()
    try:
        with _pool(case.spare_blocks), engine(paths.base, ahn, **asked) as llm:
            for layer in worker_layers(llm).values():
                layer.kv_cache.fill_(float("nan"))
            yield llm
    finally:
        torch.set_num_threads(threads)  # vLLM's n-gram proposer leaves torch with two


@contextlib.contextmanager
def _pool(spare_blocks: int | None) -> Iterator[None]:
    """Let engines start with so many blocks more than the fewest that vLLM starts with; None changes nothing."""
    plan = core.get_kv_cache_configs

    def with_few_blocks(vllm_config: Any, kv_cache_specs: Any, available_memory: Any) -> Any:
        if spare_blocks is not None:
            groups = get_kv_cache_groups(vllm_config, dict(kv_cache_specs[0]))
            vllm_config.cache_config.num_gpu_blocks_override = smallest_pool(vllm_config, groups) + spare_blocks
        return plan(vllm_config, kv_cache_specs, available_memory)

    with mock.patch.object(core, "get_kv_cache_configs", with_few_blocks):
        yield


def smallest_pool(vllm_config: Any, groups: Any) -> int:
    """Blocks of the smallest pool that admits a request of ``max_model_len``, with the one that vLLM keeps as null."""
    specs = [group.kv_cache_spec for group in groups]
    return 1 + sum(-(-spec.max_memory_usage_bytes(vllm_config) // spec.page_size_bytes) for spec in specs)


def play(case: Case, paths: TinyPaths, model: ReferenceModel | None = None) -> Played:
    """Run a case and check that its engine comes to an end and gives all blocks back.

    Args:
        case: the case.
        paths: its checkpoints.
        model: the reference, which knows the answers that drafts are made of.

    Raises:
        Failure: the engine is stuck, or blocks are missing.
    """
    spoilt_drafts.forget()
    with case_engine(case, paths) as llm:
        pool = cache_manager(llm).block_pool
        free = pool.get_num_free_blocks()
        played = _Stage(case, llm, model).run()
        played.core = next(type(x.core).__name__ for x in worker_layers(llm).values() if isinstance(x, AHNAttention))
        played.preemptions = int(metric(llm, "vllm:num_preemptions"))
        if case.engine["enable_prefix_caching"]:
            played.prefix_hit_tokens = int(metric(llm, "vllm:prefix_cache_hits"))
        if case.drafts is not None:
            played.num_accepted_drafts = int(metric(llm, "vllm:spec_decode_num_accepted_tokens"))
            played.accepted_drafts = dict(spoilt_drafts.accepted)
        missing = free - pool.get_num_free_blocks()
        if missing or cache_manager(llm).usage:
            raise Failure(f"{missing} of {free} blocks did not come back")
        if not llm.llm_engine.reset_prefix_cache():
            raise Failure("the prefix cache cannot be reset")
    return played


class _Stage:
    """One run of a case's requests."""

    def __init__(self, case: Case, llm: LLM, model: ReferenceModel | None) -> None:
        self.case, self.engine, self.model = case, llm.llm_engine, model
        self.answers: dict[int, Answer] = {}
        self.arrived: dict[int, int] = {}
        self.ended: dict[int, int] = {}
        self.step = self.idle = 0

    def run(self) -> Played:
        requests = self.case.requests
        # A preemption makes a request start again; with few blocks that happens often.
        tokens = sum(self.case.longest(index) for index in range(len(requests)))
        most = 500 + 40 * tokens
        while len(self.ended) < len(requests):
            for index, request in enumerate(requests):
                if index not in self.arrived and self._is_due(request):
                    self._add(index, request)
                elif index in self.arrived and index not in self.ended and self._is_aborted(index, request):
                    self.engine.abort_request([str(index)])
                    self.answers[index].aborted = True
                    self.ended[index] = self.step
            outputs = self.engine.step()
            for output in outputs:
                self._take(output)
            self.step += 1
            # Prompts may take a step for each of their tokens, and come in turns.
            self.idle = 0 if outputs else self.idle + 1
            if self.idle > 200 + 2 * tokens:
                raise Failure(f"for {self.idle} steps {len(requests) - len(self.ended)} requests got no token")
            if self.step > most:
                raise Failure(f"after {most} steps {len(requests) - len(self.ended)} requests have not ended")
        while self.engine.has_unfinished_requests() or self._busy():
            self.engine.step()
            self.step += 1
            if self.step > most + 10:
                raise Failure("all requests have ended, and the engine has not")
        return Played([self.answers[index] for index in range(len(requests))], self.step)

    def _busy(self) -> bool:
        return bool(self.engine.engine_core.engine_core.scheduler.has_requests())

    def _is_due(self, request: Request) -> bool:
        if request.parent is None:
            return self.step >= request.arrival
        return request.parent in self.ended and self.step >= self.ended[request.parent] + request.arrival

    def _is_aborted(self, index: int, request: Request) -> bool:
        return request.abort_after is not None and self.step >= self.arrived[index] + request.abort_after

    def _add(self, index: int, request: Request) -> None:
        prompt = list(request.text)
        if request.parent is not None:
            before = self.answers[request.parent]
            prompt = before.prompt + before.tokens + prompt
        if self.case.drafts is not None and self.model is not None:
            answer = self.model.generate(torch.tensor([prompt]), request.max_tokens).tokens[0].tolist()
            spoilt_drafts.know(prompt + answer)
        params = SamplingParams(
            temperature=0, max_tokens=request.max_tokens, ignore_eos=True, detokenize=False, logprobs=request.logprobs
        )
        self.engine.add_request(str(index), {"prompt_token_ids": prompt}, params, priority=request.priority)
        self.answers[index], self.arrived[index] = Answer(prompt), self.step

    def _take(self, output: Any) -> None:
        index = int(output.request_id)
        if index in self.ended:
            raise Failure(f"request {index} has ended and still gets tokens")
        answer, completion = self.answers[index], output.outputs[0]
        answer.tokens, answer.logprobs = list(completion.token_ids), list(completion.logprobs or [])
        answer.num_cached_tokens = output.num_cached_tokens or 0
        if output.finished:
            self.ended[index] = self.step
            if len(answer.tokens) != self.case.requests[index].max_tokens:
                raise Failure(f"request {index} ends after {len(answer.tokens)} tokens")
