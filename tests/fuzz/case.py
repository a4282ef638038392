"""A case: an engine and the requests it gets, all drawn from one seed."""

import random
from dataclasses import dataclass, field
from typing import Any

from vllm_ahn.memory.spec import MEMORIES

VOCAB = 320
BLOCK_SIZES = (16, 32, 64, 128)
HEADS = ((2, 1), (2, 2), (3, 1), (4, 1), (4, 2), (4, 4), (6, 2), (6, 3))
"""Heads and KV heads."""
HEAD_SIZES = (32, 32, 64)
MAX_DRAFTS = 15


@dataclass(frozen=True)
class Limits:
    """How large cases get."""

    requests: int = 14
    capacity: int = 170
    """Most tokens of window and sinks."""
    capacities: float = 3.2
    """The longest prompts, in multiples of ``W + S``."""
    max_tokens: tuple[int, ...] = (1, 2, 9, 17, 33, 60)
    block_sizes: tuple[int, ...] = BLOCK_SIZES


CPU = Limits()
INTERPRETED = Limits(requests=4, capacity=36, capacities=2, max_tokens=(1, 3, 6), block_sizes=(16, 32))
"""A step of three decodes takes Triton's interpreter a second, and 100 tokens of a prompt take it five."""


@dataclass
class Request:
    """One request of a case."""

    text: list[int]
    """Its prompt; for a follow-up, what comes after the parent's prompt and answer."""
    parent: int | None
    """The request whose next turn this is."""
    arrival: int
    """The step before which it comes; for a follow-up, steps after the parent's end."""
    max_tokens: int
    priority: int
    """Without meaning where the policy is "fcfs"."""
    abort_after: int | None
    """Steps after its arrival before which it is aborted, unless it has finished."""
    logprobs: int
    """Log-probabilities asked for: -1 is all, 0 those of its own tokens."""


@dataclass
class Drafts:
    """How an engine speculates."""

    method: str
    """"ngram" or "custom_class"."""
    num_tokens: int


@dataclass
class Case:
    """An engine and its requests."""

    seed: int
    model: dict[str, Any]
    """Arguments of `make_tiny`."""
    window: int
    sinks: int
    engine: dict[str, Any]
    """Arguments of the engine."""
    spare_blocks: int | None
    """Blocks beyond the smallest pool that vLLM starts with; None for plenty."""
    requests: list[Request] = field(default_factory=list)
    drafts: Drafts | None = None

    @property
    def capacity(self) -> int:
        return self.window + self.sinks

    @property
    def exact(self) -> bool:
        """Whether all is computed in float32."""
        return self.engine["dtype"] == "float32" and self.engine["mamba_ssm_cache_dtype"] == "float32"

    def longest(self, index: int) -> int:
        """Most tokens that request ``index`` comes to, its answer included."""
        request = self.requests[index]
        before = 0 if request.parent is None else self.longest(request.parent)
        return before + len(request.text) + request.max_tokens

    def describe(self) -> str:
        lines = [
            f"seed {self.seed}: W={self.window} S={self.sinks} {self.model} {self.engine}"
            f" spare_blocks={self.spare_blocks} {self.drafts or ''}"
        ]
        for index, r in enumerate(self.requests):
            kind = f"{len(r.text)} tokens" if r.parent is None else f"turn after {r.parent} with {len(r.text)} tokens"
            ending = "" if r.abort_after is None else f", aborted {r.abort_after} later"
            lines.append(f"  {index}: {kind} at {r.arrival}, max_tokens {r.max_tokens}, priority {r.priority}{ending}")
        return "\n".join(lines)


def draw(seed: int, limits: Limits = CPU, *, drafts: bool = False, inexact: bool = False) -> Case:
    """The case of a seed.

    Args:
        seed: the same seed and switches give the same case.
        limits: how large it may be.
        drafts: let the engine speculate.
        inexact: keep the model, the state or both in bfloat16.
    """
    rng = random.Random(seed)
    block_size = rng.choice(limits.block_sizes)
    window, sinks = _lengths(rng, block_size, limits)
    engine = {
        "block_size": block_size,
        "max_num_batched_tokens": rng.choice([1, rng.randint(2, 16), 16, 32, 48, rng.randint(20, 200), 64, 128, 2048]),
        "enable_prefix_caching": rng.random() < 0.75,
        "scheduling_policy": rng.choice(["fcfs", "priority"]),
        "long_prefill_token_threshold": rng.choice([0, 0, 0, rng.randint(1, 40)]),
        "async_scheduling": rng.random() < 0.5,
        # Without it a request is admitted before all of its prompt has room, and preempted more often.
        "scheduler_reserve_full_isl": rng.random() < 0.4,
        "seed": seed % 2**31,
    }
    engine["max_num_seqs"] = min(engine["max_num_batched_tokens"], rng.choice([1, 2, 4, 8]))
    case = Case(
        seed=seed,
        model=_model(rng, seed),
        window=window,
        sinks=sinks,
        engine=engine,
        spare_blocks=rng.choice([None, None, 0, 0, 1, 2, rng.randint(3, 12)]),
    )
    case.requests = _requests(rng, case, limits)
    engine["max_model_len"] = max(case.longest(index) for index in range(len(case.requests)))
    # Switches draw from generators of their own: what a seed gives without them stays what it was.
    own = random.Random(f"{seed} dtypes")
    dtypes = own.choice([("bfloat16", "float32"), ("bfloat16", "bfloat16"), ("float32", "bfloat16")])
    engine["dtype"], engine["mamba_ssm_cache_dtype"] = dtypes if inexact else ("float32", "float32")
    if drafts:
        _speculate(random.Random(f"{seed} drafts"), case)
    return case


def _lengths(rng: random.Random, block_size: int, limits: Limits) -> tuple[int, int]:
    """W and S: some fill blocks, some do not."""
    while True:
        sinks = rng.choice([0, 0, 1, rng.randint(1, 24), block_size, 2 * block_size])
        window = rng.choice([rng.randint(1, 8), rng.randint(9, 70), block_size, 2 * block_size, block_size + 1])
        window += rng.choice([0, 0, rng.randint(0, 30)])
        if window + sinks <= limits.capacity:
            return window, sinks


def _model(rng: random.Random, seed: int) -> dict[str, Any]:
    heads, kv_heads = rng.choice(HEADS)
    head_dim = rng.choice(HEAD_SIZES)
    memory = rng.choice(list(MEMORIES))
    layers = rng.choice([1, 2, 2, 3])
    full = sorted(rng.sample(range(layers), rng.randint(1, layers - 1))) if layers > 1 and rng.random() < 0.2 else []
    model_type = rng.choice(["qwen2", "qwen3"])
    return {
        "seed": seed % 2**31,
        "model_type": model_type,
        "memory": memory,
        "layers": layers,
        "heads": heads,
        "kv_heads": kv_heads,
        "head_dim": head_dim,
        "hidden": heads * head_dim if model_type == "qwen2" else rng.choice([64, 96]),
        "intermediate": 64,
        "vocab": VOCAB,
        "use_q_proj": memory == "GatedDeltaNet" and rng.random() < 0.3,
        "use_router": rng.random() < 0.3,
        "fa_layer_ids": ",".join(map(str, full)),
    }


def _requests(rng: random.Random, case: Case, limits: Limits) -> list[Request]:
    capacity, block_size = case.capacity, case.engine["block_size"]
    longest = int(limits.capacities * capacity) + 20
    trunks = [_tokens(rng, longest) for _ in range(2)]
    # Tokens to compute bound the time; with a small budget each of them is nearly a step.
    steps = 900 if min(case.engine["max_num_batched_tokens"], limits.requests) < 8 else 4000
    requests: list[Request] = []
    for index in range(rng.randint(limits.requests // 2, limits.requests)):
        parent = None
        if index and rng.random() < 0.35:
            parent = rng.randrange(index)
            text = _tokens(rng, rng.choice([1, 2, rng.randint(1, 40), block_size]))
        else:
            length = _length(rng, capacity, block_size, longest)
            kind = rng.random()
            if kind < 0.3:
                text = _tokens(rng, length)
            elif kind < 0.5:  # a trunk, or another prompt, to the token
                text = rng.choice(trunks)[:length]
            else:  # a trunk with a tail of its own, from anywhere or from the end of a block
                cut = rng.choice([rng.randint(0, length), length // block_size * block_size, length - 1])
                text = rng.choice(trunks)[:cut]
                text = text + _tokens(rng, length - len(text))
        request = Request(
            text=text,
            parent=parent,
            arrival=rng.choice([0, 0, rng.randint(0, 60)]),
            max_tokens=rng.choice(limits.max_tokens),
            priority=rng.randint(0, 3),
            abort_after=rng.randint(0, 50) if rng.random() < 0.12 else None,
            logprobs=rng.choice([-1, 0]),
        )
        requests.append(request)
        steps -= len(text) + request.max_tokens
        if steps < 0:
            break
    return requests


def _length(rng: random.Random, capacity: int, block_size: int, longest: int) -> int:
    """Lengths at which something happens: around ``W + S``, around the ends of blocks, several windows."""
    length = rng.choice(
        [
            capacity + rng.randint(-2, 2),
            block_size * rng.randint(1, max(1, longest // block_size)) + rng.randint(-1, 1),
            rng.randint(1, capacity + 1),
            rng.randint(capacity, longest),
            rng.randint(1, longest),
        ]
    )
    return max(1, min(length, longest))


def _tokens(rng: random.Random, length: int) -> list[int]:
    return [rng.randrange(VOCAB) for _ in range(length)]


def _speculate(rng: random.Random, case: Case) -> None:
    counts = [count for count in (1, 2, 3, 5, 8, MAX_DRAFTS) if count < case.window]
    if not counts:
        return
    case.drafts = Drafts(rng.choice(["ngram", "custom_class", "custom_class"]), rng.choice(counts))
    case.engine["async_scheduling"] = False
    least = case.drafts.num_tokens + 1
    case.engine["max_num_batched_tokens"] = max(case.engine["max_num_batched_tokens"], least)
