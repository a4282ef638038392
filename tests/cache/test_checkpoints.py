"""Prefix caching beyond ``W + S``, in vLLM's own schedulers: where requests resume, and that they find what is theirs.

Nothing is computed here, see :mod:`support.bookkeeping`; ``tests/engine/test_prefix_caching.py`` compares tokens.
"""

import random
from typing import Any

import pytest
from vllm.lora.request import LoRARequest
from vllm.v1.core.kv_cache_utils import get_group_id, resolve_block_hashes
from vllm.v1.request import Request

from support.bookkeeping import World
from vllm_ahn.cache.checkpoints import find_checkpoint
from vllm_ahn.cache.managers import AHNStateManager


def tokens(length: int, seed: int) -> list[int]:
    generator = random.Random(seed)
    return [generator.randrange(512) for _ in range(length)]


PROMPT = tokens(300, 1)


def world(num_blocks: int = 400, **arguments: Any) -> World:
    return World(num_blocks, **{"window": 24, "sinks": 8, "block_size": 16, "budget": 64, **arguments})


def hit(served: World, prompt: list[int], max_tokens: int = 33, **arguments: Any) -> int:
    """Serve a prompt alone; where it resumed."""
    served.add(f"{len(served.worker.hits)}", prompt, max_tokens, **arguments)
    served.run()
    return served.worker.hits[-1][1]


def checkpoints(served: World, request: Request) -> list[int]:
    """Boundaries of a request's prefix of which there are checkpoints."""
    state = served.manager.coordinator.single_type_managers[1]
    pool = served.manager.block_pool
    hashes = resolve_block_hashes(request.block_hashes, pool.hash_block_size, state.block_size)
    found = [find_checkpoint(pool, hashes[i], state.num_pages, [1]) is not None for i in range(len(hashes))]
    return [(i + 1) * state.block_size for i, there in enumerate(found) if there]


@pytest.mark.parametrize("block_size", [16, 32, 48, 64, 128])
@pytest.mark.parametrize("asynchronous", [False, True])
def test_turns_of_a_chat(block_size: int, asynchronous: bool) -> None:
    """Every turn resumes at the end of the last block of the turn before, answer included."""
    served = world(block_size=block_size, asynchronous=asynchronous)
    first = served.add("first", PROMPT, 33)
    served.run()
    turn = first
    for length in (50, 20, 100):
        prompt = [*turn.all_token_ids, *tokens(length, length)]
        turn = served.add(f"{length}", prompt, 17)
        served.run()
        computed = len(prompt) - length - 1
        assert served.worker.hits[-1] == (f"{length}", computed // block_size * block_size)
    assert hit(served, PROMPT) == 299 // block_size * block_size
    assert hit(served, PROMPT + tokens(9, 2)) == 300 // block_size * block_size
    served.check_empty()


def test_a_prompt_that_ends_on_a_block() -> None:
    """The same tokens hit all but the last block, and others that go on behind it hit all of it."""
    served = world()
    assert hit(served, PROMPT[:288], 40) == 0
    assert hit(served, PROMPT[:288]) == 272
    assert hit(served, PROMPT) == 288


def test_an_answer_that_ends_on_a_block() -> None:
    served = world(checkpoint_interval=0)
    request = served.add("0", PROMPT, 21)
    served.run()
    computed = list(request.all_token_ids)[:320]
    assert checkpoints(served, request) == [288, 304, 320]
    assert hit(served, computed) == 304
    assert hit(served, [*computed, 1]) == 320


@pytest.mark.parametrize(
    ("interval", "expected"), [(0, [288]), (None, [64, 128, 192, 256, 288]), (100, [128, 256, 288])]
)
def test_checkpoints_within_a_prompt(interval: int | None, expected: list[int]) -> None:
    """Behind each multiple of the interval, at the first end of a chunk; without one, at the end only."""
    served = world(checkpoint_interval=interval)
    request = served.add("0", PROMPT, 2)
    served.run()
    assert checkpoints(served, request) == expected
    # Without one, up to W + S.
    assert hit(served, PROMPT[:200] + tokens(30, 3)) == max(
        [32, *(boundary for boundary in expected if boundary < 200)]
    )


def test_requests_of_one_step_share_a_checkpoint() -> None:
    """The first takes the pages, the others get copies, and the cache keeps one."""
    served = world()
    hit(served, PROMPT)
    before = served.worker.num_copies
    for index in range(3):
        served.add(f"again{index}", PROMPT + tokens(2, index), 9)
    served.run()
    assert [at for _, at in served.worker.hits[1:]] == [288] * 3
    num_pages = served.manager.coordinator.single_type_managers[1].num_pages
    assert served.worker.num_copies - before == 3 * num_pages
    assert hit(served, PROMPT + tokens(2, 9)) == 288
    served.check_empty()


def test_a_hit_needs_no_more_blocks_than_none() -> None:
    """In a pool for one request and nothing else."""
    needed = world().manager.coordinator.single_type_managers
    blocks = 1 + needed[0].max_admission_blocks_per_request + needed[1].spec.pages_per_request
    served = world(blocks)
    request = served.add("0", PROMPT, 33)
    served.run()
    prompt = [*request.all_token_ids, *tokens(100, 5)]
    assert hit(served, prompt) == 320
    served.check_empty()


def test_preempted_requests_resume_at_their_last_block() -> None:
    """What they compute again is less than a block each time."""
    served = world(30, checkpoint_interval=0)
    stopped: list[int] = []
    preempt = served.scheduler._preempt_request

    def note(request: Request, *arguments: Any, **others: Any) -> None:
        stopped.append(request.num_computed_tokens)
        preempt(request, *arguments, **others)

    served.scheduler._preempt_request = note  # type: ignore[method-assign]
    requests = [served.add(f"{i}", tokens(20 + 3 * i, i), 200) for i in range(3)]
    served.run()
    assert stopped and max(stopped) > 32
    assert [at for _, at in served.worker.hits[3:]] == [at // 16 * 16 for at in stopped]
    computed_once = sum(request.num_tokens - 1 for request in requests)
    assert served.num_scheduled - computed_once == sum(at % 16 for at in stopped)


def test_adapters_and_salts_keep_apart() -> None:
    served = world()
    adapters = [LoRARequest(name, index, f"/{name}") for index, name in enumerate("ab", 1)]
    ways: list[dict[str, Any]] = [
        {},
        {"cache_salt": "x", "seed": "x"},
        {"cache_salt": "y", "seed": "y"},
        {"lora_request": adapters[0], "seed": "a"},
        {"lora_request": adapters[1], "seed": "b"},
    ]
    for way in ways:
        assert hit(served, PROMPT, **way) == 0
    for way in ways:
        assert hit(served, PROMPT, **way) == 288


@pytest.mark.parametrize("algorithm", ["sha256", "sha256_cbor", "xxhash", "xxhash_cbor"])
def test_hash_functions(algorithm: str) -> None:
    pytest.importorskip("xxhash" if "xxhash" in algorithm else "hashlib")
    served = world(algorithm=algorithm, block_size=32, hash_block_size=16)
    assert [hit(served, PROMPT) for _ in range(2)] == [0, 288]


@pytest.mark.parametrize("block_size", [16, 64])
def test_without_a_memory_the_window_is_enough(block_size: int) -> None:
    """Only one group, and no state: any run of the window's blocks serves."""
    served = world(checkpoint="none", block_size=block_size)
    assert [hit(served, PROMPT, 1), hit(served, PROMPT, 1)] == [0, 299 // block_size * block_size]
    assert hit(served, PROMPT[:200] + tokens(50, 1), 1) == 200 // block_size * block_size
    served.check_empty()


def test_blocks_that_serve_no_hit_leave_the_cache() -> None:
    """Of a long prompt, the blocks of W + S and those of the checkpoint's window stay."""
    served = world(checkpoint_interval=0)
    request = served.add("0", tokens(900, 1), 30)
    served.run()
    assert checkpoints(served, request) == [896, 928]
    keys = served.manager.block_pool.cached_block_hash_to_block._cache
    assert len([key for key in keys if get_group_id(key) == 0]) == 2 + 2 * 2


def test_a_running_request_makes_way_for_nothing() -> None:
    """Checkpoints are made of what is free when a step is scheduled: whoever runs is never preempted for one."""
    needed = world().manager.coordinator.single_type_managers
    one = needed[0].max_admission_blocks_per_request + needed[1].spec.pages_per_request
    for spare in range(6):
        served = world(1 + one + spare, checkpoint_interval=16)
        requests = [served.add(f"{i}", tokens(300, i), 9) for i in range(3)]
        served.run()
        assert not any(request.num_preemptions for request in requests)


def test_reset_while_requests_run() -> None:
    served = world()
    for index in range(4):
        served.add(f"{index}", PROMPT + tokens(9, index), 40)
    for _ in range(12):
        served.step()
    assert served.scheduler.reset_prefix_cache(reset_running_requests=True)
    served.run()
    assert hit(served, PROMPT) == 256
    served.check_empty()
    assert hit(served, PROMPT) == 0


def test_events_speak_of_tokens_only() -> None:
    """States are not blocks of tokens: nothing is published about them, stored, hit or evicted."""
    served = world(30, events=True)
    seen: list[Any] = []
    take = served.manager.take_events

    def note() -> list[Any]:
        seen.extend(take())
        return []

    served.manager.take_events = note  # type: ignore[method-assign]
    for seed in (0, 0, 1, 2, 1, 0):
        request = served.add(f"{len(served.worker.hits)}", tokens(100, seed), 20)
        request.kv_cache_report_mode = "full"
        served.run()
    assert [at for _, at in served.worker.hits[:2]] == [0, 96]
    assert {type(event).__name__ for event in seen} == {"BlockStored", "BlockRemoved"}
    assert {event.group_idx for event in seen} == {0}


def test_the_worker_notices_a_wrong_slot(monkeypatch: pytest.MonkeyPatch) -> None:
    right = AHNStateManager._first_page
    monkeypatch.setattr(AHNStateManager, "_first_page", lambda self, boundary: right(self, boundary + 16))
    served = world()
    hit(served, PROMPT)
    with pytest.raises(AssertionError, match="state of 288"):
        hit(served, PROMPT)


@pytest.mark.parametrize("drafts", [False, True], ids=["", "drafts"])
@pytest.mark.parametrize("asynchronous", [False, True], ids=["sync", "async"])
@pytest.mark.parametrize("seed", [*range(3), *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(3, 12))])
def test_requests_at_random(seed: int, asynchronous: bool, drafts: bool) -> None:
    """Shared beginnings, own endings, further turns and aborts, in pools that hold from one to six requests."""
    rng = random.Random(seed)
    window, sinks = rng.choice([(24, 8), (24, 0), (33, 17), (50, 40), (64, 16), (17, 3)])
    arguments: dict[str, Any] = {
        "window": window,
        "sinks": sinks,
        "block_size": rng.choice([16, 32, 48, 64, 128]),
        "budget": rng.choice([24, 32, 64, 100, 512]),
        "drafts": rng.choice([1, 3, 8, 15]) if drafts else 0,
        "asynchronous": asynchronous,
        "checkpoint_interval": rng.choice([None, 0, 48, 64]),
        "seed": seed,
    }
    needed = World(1000, **arguments).manager.coordinator.single_type_managers
    one = needed[0].spec.max_admission_blocks_per_request(1024) + needed[1].spec.pages_per_request
    served = World(1 + rng.choice([one, one + 2, 2 * one, 3 * one, 6 * one]), **arguments)
    trunks = [tokens(400, 1000 + seed), tokens(400, 2000 + seed)]
    arrivals = []
    for index in range(30):
        shared = rng.choice(trunks)[: rng.choice([rng.randint(1, 400), 304, 288, 256, 320])]
        prompt = shared + tokens(rng.choice([0, rng.randint(1, 40)]), index)
        arrivals.append((rng.randrange(100), f"{index}", prompt, rng.choice([1, 2, 9, 33, 60])))
    requests: list[Request] = []
    step = turns = 0
    while arrivals or served.scheduler.has_requests():
        for arrival in [arrival for arrival in arrivals if arrival[0] <= step]:
            arrivals.remove(arrival)
            requests.append(served.add(*arrival[1:]))
        for request in [request for request in requests if request.is_finished()]:
            requests.remove(request)
            if turns < 20 and request.num_tokens < 800 and rng.random() < 0.5:
                turns += 1
                prompt = [*request.all_token_ids, *tokens(rng.randint(0, 30), turns)]
                arrivals.append((step + rng.randrange(20), f"turn {turns}", prompt, rng.choice([1, 9, 33])))
        if requests and rng.random() < 0.01:
            served.abort(rng.choice(requests).request_id)
        served.step()
        step += 1
        assert step < 10_000, "requests wait for ever"
    served.run()
    assert any(at > window + sinks for _, at in served.worker.hits)
    served.check_empty()
