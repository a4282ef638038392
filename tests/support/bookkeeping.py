"""vLLM's scheduler over our managers, and a worker that computes nothing but knows what every page holds.

The worker reads what the kernels would read and writes what they would write, by the rule of
:mod:`vllm_ahn.kernels.settled` alone: keys are names of prefixes, and a state is the name of what it has absorbed. So
thousands of steps take seconds, and whatever a request finds in a page that is not its own is an error at once.
"""

import dataclasses
import random
from collections import Counter, deque
from collections.abc import Sequence
from typing import Any

from vllm import SamplingParams
from vllm.config import VllmConfig
from vllm.config.kv_events import KVEventsConfig
from vllm.engine.arg_utils import EngineArgs
from vllm.utils.hashing import get_hash_fn_by_name
from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.kv_cache_interface import KVCacheConfig, KVCacheGroupSpec
from vllm.v1.outputs import DraftTokenIds, ModelRunnerOutput
from vllm.v1.request import Request, RequestStatus
from vllm.v1.structured_output import StructuredOutputManager

from support.golden_data import CONFIGURATIONS
from vllm_ahn.cache.layer import LayerSizes, layer_specs
from vllm_ahn.config import AHNConfig
from vllm_ahn.kernels.settled import GRANULARITY, Settling
from vllm_ahn.plugin import register

GDN = CONFIGURATIONS["gdn_qwen2"]
VOCABULARY = 512


def config_of(
    *,
    window: int,
    sinks: int,
    block_size: int,
    budget: int,
    drafts: int = 0,
    asynchronous: bool = False,
    events: bool = False,
    **ahn: Any,
) -> VllmConfig:
    """An engine's configuration, made of arguments; `ahn` are more keys of the AHN's setting."""
    register()
    speculation = {"method": "ngram", "num_speculative_tokens": drafts} if drafts else None
    config = EngineArgs(
        model=str(GDN.base),
        dtype="float32",
        max_model_len=1024,
        block_size=block_size,
        max_num_batched_tokens=budget,
        max_num_seqs=8,
        enforce_eager=True,
        skip_tokenizer_init=True,
        enable_prefix_caching=True,
        speculative_config=speculation,
        kv_events_config=KVEventsConfig(enable_kv_cache_events=True, publisher="null") if events else None,
        additional_config={"ahn": {"checkpoint": str(GDN.ahn), "window": window, "sinks": sinks, **ahn}},
    ).create_engine_config()
    config.scheduler_config.async_scheduling = asynchronous
    return config


def extended(names: Sequence[int], tokens: Sequence[int], seed: object) -> list[int]:
    """Names of the prefixes that end with each of `tokens`, behind those of `names`."""
    result = []
    last: object = names[-1] if names else seed
    for token in tokens:
        last = hash((last, token))
        result.append(last)
    return result


@dataclasses.dataclass
class _Row:
    """What the worker knows of a request."""

    tokens: list[int]
    names: list[int]
    seed: object
    num_computed: int
    tables: list[list[int]]

    def extend(self, tokens: Sequence[int]) -> None:
        self.names += extended(self.names, tokens, self.seed)
        self.tokens += tokens


class Worker:
    """The pages and what is in them."""

    def __init__(
        self, settling: Settling, block_size: int, num_pages: int, seed: int, seeds: dict[str, object]
    ) -> None:
        self.settling = settling
        self.block_size = block_size
        self.num_pages = num_pages
        self.random = random.Random(seed)
        self.seeds = seeds
        self.pages: dict[int, dict[int, object]] = {}
        self.rows: dict[str, _Row] = {}
        self.drafts: dict[str, list[int]] = {}
        self.hits: list[tuple[str, int]] = []
        self.num_copies = 0

    def execute(self, output: SchedulerOutput) -> ModelRunnerOutput:
        """Run a step; raises AssertionError for anything that a request would read and that is not its own."""
        self._apply(output)
        names = list(output.num_scheduled_tokens)
        sampled = []
        for name in names:
            scheduled = output.scheduled_spec_decode_tokens.get(name, [])
            sampled.append(self._run(name, output.num_scheduled_tokens[name], scheduled))
        return ModelRunnerOutput(names, {name: index for index, name in enumerate(names)}, sampled)

    def _apply(self, output: SchedulerOutput) -> None:
        for name in output.finished_req_ids:
            self.rows.pop(name, None)
        for new in output.scheduled_new_reqs:
            tokens = getattr(new, "prefill_token_ids", None) or new.prompt_token_ids
            self._admit(new.req_id, list(tokens), new.num_computed_tokens, new.block_ids)
        cached = output.scheduled_cached_reqs
        for index, name in enumerate(cached.req_ids):
            blocks = cached.new_block_ids[index]
            if name in cached.resumed_req_ids:
                assert blocks is not None
                self._admit(name, list(cached.all_token_ids[name]), cached.num_computed_tokens[index], blocks)
            elif blocks is not None:
                for table, more in zip(self.rows[name].tables, blocks, strict=True):
                    table += more
        copies = output.kv_cache_block_copies or []
        self.num_copies += len(copies)
        contents = [dict(self.pages.get(copy[0], {})) for copy in copies]
        for copy, content in zip(copies, contents, strict=True):
            self.pages[copy[1]] = content

    def _admit(self, name: str, tokens: list[int], num_computed: int, blocks: Sequence[Sequence[int]]) -> None:
        seed = self.seeds.get(name, 0)
        self.rows[name] = _Row(tokens, extended([], tokens, seed), seed, num_computed, [list(ids) for ids in blocks])
        self.hits.append((name, num_computed))

    def _run(self, name: str, num_new: int, scheduled: list[int]) -> list[int]:
        row = self.rows[name]
        drafts = [self.drafts.get(name, []) + [-1] * len(scheduled)][0][: len(scheduled)]
        if scheduled and scheduled[0] >= 0:
            drafts = scheduled
        first, num_known = row.num_computed, num_new - len(drafts)
        tokens = row.tokens[first : first + num_known] + drafts
        assert len(tokens) == num_new
        end = first + num_new
        path = row.names[:first] + extended(row.names[:first], tokens, row.seed)
        self._read(row, first, end)
        for position in range(first, end):
            self._page(row.tables[0][position // self.block_size])[position % self.block_size] = path[position]
        self._settle(row, first, end, path)
        if first + num_known < len(row.tokens):
            row.num_computed = end
            return []
        accepted: list[int] = []
        for draft in drafts:
            if draft != self._next([*row.names, *extended(row.names, accepted, row.seed)][-1]):
                break
            accepted.append(draft)
        row.num_computed = end - (len(drafts) - len(accepted))
        row.extend(accepted)
        row.extend([self._next(row.names[-1])])
        new = row.tokens[len(row.tokens) - len(accepted) - 1 :]
        self.drafts[name] = self._guess(row)
        return new

    def _page(self, block: int) -> dict[int, object]:
        assert block != 0, "the null block"
        return self.pages.setdefault(block, {})

    def _read(self, row: _Row, first: int, end: int) -> None:
        window, sinks = self.settling.window, self.settling.sinks
        boundary = self.settling.boundary(first)
        absorbed = self.settling.absorbed(boundary)
        oldest = first - window + 1 if end <= self.settling.capacity else min(first - window + 1, absorbed)
        for position in range(first):
            if position < sinks or position >= oldest:
                page = self._page(row.tables[0][position // self.block_size])
                found = page.get(position % self.block_size)
                assert found == row.names[position], f"key of {position} of {first} is another one's"
        if self.num_pages and end > self.settling.capacity and absorbed > sinks:
            for page in self._slot(row, boundary):
                expected = (boundary, row.names[absorbed - 1])
                assert page.get(-1) == expected, f"state of {boundary} of {first} is {page.get(-1)}"

    def _settle(self, row: _Row, first: int, end: int, path: list[int]) -> None:
        if not self.num_pages or end <= self.settling.capacity:
            return
        if min(end - self.settling.capacity, end - first) <= GRANULARITY:
            boundary = self.settling.boundary(end)
            targets = [boundary] if boundary > self.settling.boundary(first) else []
        else:
            targets = self.settling.targets(first, end)
        for boundary in targets:
            absorbed = self.settling.absorbed(boundary)
            for page in self._slot(row, boundary):
                page.clear()
                page[-1] = (boundary, path[absorbed - 1] if absorbed else None)

    def _slot(self, row: _Row, boundary: int) -> list[dict[int, object]]:
        start = self.settling.slot(boundary) * self.num_pages
        return [self._page(block) for block in row.tables[1][start : start + self.num_pages]]

    @staticmethod
    def _next(name: int) -> int:
        return name % VOCABULARY

    def _guess(self, row: _Row) -> list[int]:
        """Drafts of which any number is right."""
        drafts: list[int] = []
        while len(drafts) < GRANULARITY:
            right = self._next([*row.names, *extended(row.names, drafts, row.seed)][-1])
            drafts.append(right if self.random.random() < 0.8 else (right + 1) % VOCABULARY)
        return drafts


class World:
    """A scheduler and its worker.

    Args:
        num_blocks: of the pool, one of which is vLLM's null block.
        drafts: of a step; 0 without speculation.
        asynchronous: schedule a step before the output of the one before is known.
        algorithm: of block hashes.
        arguments: see `config_of`.
    """

    def __init__(
        self,
        num_blocks: int,
        *,
        drafts: int = 0,
        asynchronous: bool = False,
        seed: int = 0,
        algorithm: str = "sha256",
        hash_block_size: int | None = None,
        **arguments: Any,
    ) -> None:
        config = config_of(drafts=drafts, asynchronous=asynchronous, **arguments)
        self.config, self.num_drafts, self.asynchronous = config, drafts, asynchronous
        self.random = random.Random(seed)
        block_size = config.cache_config.block_size
        ahn = AHNConfig.from_vllm_config(config)
        window, state = layer_specs(
            ahn, LayerSizes(4, 2, 32), block_size=block_size, dtype=config.model_config.dtype, vllm_config=config
        )
        groups = [KVCacheGroupSpec(["window"], window)]
        if state is not None:
            groups.append(KVCacheGroupSpec(["state"], state))
        config.cache_config.num_gpu_blocks = num_blocks
        scheduler_class = AsyncScheduler if asynchronous else Scheduler
        self.scheduler = scheduler_class(
            config,
            KVCacheConfig(num_blocks, [], groups, prefix_cache_retention_interval=0),
            StructuredOutputManager(config),
            block_size,
            hash_block_size=hash_block_size or block_size,
            log_stats=True,
        )
        self.manager = self.scheduler.kv_cache_manager
        hash_function = get_hash_fn_by_name(algorithm)
        init_none_hash(hash_function)
        self.hasher = get_request_block_hasher(hash_block_size or block_size, hash_function)
        self.seeds: dict[str, object] = {}
        num_pages = 0 if state is None else state.num_pages
        self.worker = Worker(window.settling, block_size, num_pages, seed, self.seeds)
        self.in_flight: deque[tuple[SchedulerOutput, ModelRunnerOutput]] = deque()
        self.done: dict[str, Request] = {}
        self.num_scheduled = 0
        self.scheduled: Counter[str] = Counter()

    def add(self, name: str, prompt: list[int], max_tokens: int, seed: object = 0, **arguments: Any) -> Request:
        params = SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True)
        request = Request(name, prompt, params, None, block_hasher=self.hasher, **arguments)
        self.seeds[name] = seed
        self.scheduler.add_request(request)
        return request

    def abort(self, name: str) -> None:
        self.scheduler.finish_requests(name, RequestStatus.FINISHED_ABORTED)

    def step(self) -> None:
        if self.in_flight and not self.scheduler.has_requests():
            self._update()
            return
        output = self.scheduler.schedule()
        self.num_scheduled += output.total_num_scheduled_tokens
        self.scheduled.update(output.num_scheduled_tokens)
        self.in_flight.append((output, self.worker.execute(output)))
        if not self.asynchronous or len(self.in_flight) == 2 or not output.total_num_scheduled_tokens:
            self._update()

    def _update(self) -> None:
        output, result = self.in_flight.popleft()
        self.scheduler.update_from_output(output, result)
        if self.num_drafts and not self.asynchronous:
            names = [name for name, tokens in zip(result.req_ids, result.sampled_token_ids, strict=True) if tokens]
            drafts = [
                self.worker.drafts[name][: self.random.randint(self.num_drafts - 1, self.num_drafts)] for name in names
            ]
            self.scheduler.update_draft_token_ids(DraftTokenIds(names, drafts))

    def run(self, most: int = 20_000) -> None:
        """Step until no request is left."""
        while self.scheduler.has_unfinished_requests() or self.in_flight:
            self.step()
            most -= 1
            assert most, "requests wait for ever"

    def check_empty(self) -> None:
        """All blocks have come back, and the cache can be reset."""
        assert self.manager.usage == 0
        assert self.manager.reset_prefix_cache()
