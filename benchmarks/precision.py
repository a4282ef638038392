"""What it costs to keep gates or the state in bfloat16, over 100,000 tokens.

    python benchmarks/precision.py gates
    python benchmarks/precision.py state

The recurrence runs in float64 on the same random tokens, exactly and with something rounded, and states and read-outs
are compared along the sequence.

* **gates** are computed in float32 and stored beside K and V in the cache dtype until their token leaves the window:
  the recurrence runs with them as read back from a bfloat16 page. As a yardstick it also runs with K and V in bfloat16
  instead, which is what any bfloat16 cache does to them.
* **state** (``--mamba-ssm-cache-dtype bfloat16``) is rounded whenever it is written. A decode writes it after each
  token, a prefill once for all of its tokens in a step: it is rounded after each token, and after each 2,048.

Each memory has eight heads: four time scales, from a half-life of 10 tokens to one of 100,000, each with gates that
vary from token to token and with gates that hardly do. The latter are rounded the same way every time: their errors add
up instead of averaging out, which comes to a decay or a rate that is off by at most 2^-8, 0.39 %.
"""

from __future__ import annotations

import itertools
import math
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

import report
from vllm_ahn.kernels import chunk_recurrence, l2_normalize, naive_recurrence
from vllm_ahn.kernels.settled import GRANULARITY
from vllm_ahn.memory.spec import MEMORIES, MemorySpec

HEADS, KV_HEADS, HEAD_SIZE = 8, 2, 64
HALF_LIVES = (10, 300, 5000, 100_000)  # tokens; two heads each, the second with steady gates
RATE_LOGITS = (-4.1, -1.7, 0.4, 2.3)  # DeltaNet has no decay: how much of a token it takes in sets its time scale
VARIATION, STEADY = 1.0, 0.001  # standard deviation of a projected gate
SEGMENT = 5000  # tokens at a time
PREFILL = 2048  # tokens that one step of a prefill absorbs
READ = 64  # tokens whose read-outs are compared
MARKS = (1000, 10_000, 100_000)

Tokens = tuple[torch.Tensor, ...]
"""A stretch of a sequence, float32: ``q [T, H, D]``, ``k`` and ``v`` ``[T, Hkv, D]``, and the gates that are kept."""
Result = tuple[torch.Tensor, torch.Tensor]
"""Read-outs ``[T, H, D]`` and the state ``[1, H, D, D]`` after them, float64."""


def by_head(values: tuple[float, ...]) -> torch.Tensor:
    """Return ``[H]``, each value for two heads."""
    return torch.tensor(values).repeat_interleave(2)


SPREAD = torch.tensor([VARIATION, STEADY]).repeat(HEADS // 2)
DECAY = math.log(2) / by_head(tuple(map(float, HALF_LIVES)))  # -g of an average token
DT = 0.05  # softplus(dt_bias) of GatedDeltaNet, an average one of its published initialisation


def _inverse_softplus(x: torch.Tensor) -> torch.Tensor:
    return x + torch.log(-torch.expm1(-x))


def random_gates(memory: MemorySpec, a: torch.Tensor, b: torch.Tensor) -> Tokens:
    """Return the gates that tokens keep, ``[T, H]`` float32 each, from two standard normal tensors ``[T, H]``."""
    if memory.keeps_decay:  # g = -exp(A_log) softplus(a + dt_bias), b a sigmoid
        steps = F.softplus(a * SPREAD + _inverse_softplus(torch.tensor(DT)))
        return -DECAY / DT * steps, torch.sigmoid(0.4 + b * SPREAD)
    if memory.decay_from_rate:  # d = softplus(dt + dt_bias), with A = 1
        return (F.softplus(a * SPREAD + _inverse_softplus(DECAY)),)
    return (torch.sigmoid(by_head(RATE_LOGITS) + b * SPREAD),)


def stretches(memory: MemorySpec, tokens: int) -> Iterator[Tokens]:
    """Yield random tokens. Keys and queries share a direction, as those of language models do: not orthogonal."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    common = normal(KV_HEADS, HEAD_SIZE)
    for start in range(0, tokens, SEGMENT):
        length = min(SEGMENT, tokens - start)
        q = normal(length, HEADS, HEAD_SIZE) + common.repeat_interleave(HEADS // KV_HEADS, 0)
        k, v = normal(length, KV_HEADS, HEAD_SIZE) + common, normal(length, KV_HEADS, HEAD_SIZE)
        yield q, k, v, *random_gates(memory, normal(length, HEADS), normal(length, HEADS))


def part(tokens: Tokens, start: int, end: int) -> Tokens:
    """Return tokens ``[start, end)``."""
    return tuple(x[start:end] for x in tokens)


def in_bfloat16(x: torch.Tensor) -> torch.Tensor:
    """Return ``x`` as it comes back from a bfloat16 page."""
    return x.bfloat16().to(x.dtype)


def inputs(memory: MemorySpec, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *gates: torch.Tensor) -> Tokens:
    """Return what the recurrence takes, float64: ``q, k, v, g, b``."""
    first, last = gates[0].double(), gates[-1].double()
    g = first if memory.keeps_decay else -first if memory.decay_from_rate else torch.zeros_like(first)
    return l2_normalize(q.double()), l2_normalize(k.double()), v.double(), g, last


def recur(memory: MemorySpec, tokens: Tokens, state: Any, done: int = 0, recurrence: Any = chunk_recurrence) -> Result:
    """Return the read-outs and the state after a stretch, before which ``done`` tokens came."""
    values = (x[None] for x in inputs(memory, *tokens))
    o, state = recurrence(*values, memory.scale(HEAD_SIZE), memory.delta, state)
    return o[0], state


def rounded_gates(memory: MemorySpec, tokens: Tokens, *before: Any) -> Result:
    """`recur` with gates in bfloat16."""
    return recur(memory, (*tokens[:3], *map(in_bfloat16, tokens[3:])), *before)


def rounded_keys(memory: MemorySpec, tokens: Tokens, *before: Any) -> Result:
    """`recur` with K and V in bfloat16."""
    return recur(memory, (tokens[0], *map(in_bfloat16, tokens[1:3]), *tokens[3:]), *before)


def decoded(memory: MemorySpec, tokens: Tokens, state: Any, done: int) -> Result:
    """`recur` as decodes keep it in bfloat16: the state rounded at each boundary, and updates once they were read."""
    outputs = []
    if state is None:
        state = torch.zeros(1, HEADS, HEAD_SIZE, HEAD_SIZE, dtype=torch.float64)
    for index, (q, k, v, g, b) in enumerate(zip(*(x.split(1) for x in inputs(memory, *tokens)), strict=True)):
        group = HEADS // k.shape[1]
        k, v = (x.repeat_interleave(group, 1) for x in (k, v))
        q, k, v = (x.unsqueeze(-2) for x in (q, k, v))
        state = g.exp()[..., None, None] * state
        update = b[..., None, None] * (v - k @ state if memory.delta else v)
        outputs.append(memory.scale(HEAD_SIZE) * (q @ state + (q * k).sum(-1, keepdim=True) * update).squeeze(-2))
        state = state + k.mT * (in_bfloat16(update) if memory.delta else update)
        if (done + index + 1) % GRANULARITY == 0:
            state = in_bfloat16(state)
    return torch.cat(outputs), state


def prefilled(memory: MemorySpec, tokens: Tokens, state: Any, done: int) -> Result:
    """`recur` with the state rounded after each `PREFILL` tokens of the sequence."""
    steps = range(PREFILL - done % PREFILL, len(tokens[0]), PREFILL)
    outputs = []
    for start, end in itertools.pairwise((0, *steps, len(tokens[0]))):
        o, state = recur(memory, part(tokens, start, end), state)
        outputs.append(o)
        if (done + end) % PREFILL == 0:
            state = in_bfloat16(state)
    return torch.cat(outputs), state


VARIANTS: dict[str, dict[str, Callable[..., Result]]] = {
    "gates": {"gates in bfloat16": rounded_gates, "K and V in bfloat16": rounded_keys},
    "state": {"decoded": decoded, f"prefilled, {PREFILL:,} tokens a step": prefilled},
}
TEXTS = {
    "gates": (
        "gate-precision",
        "What it costs that gates are kept in bfloat16",
        "float32 gates",
        " The last two columns are a yardstick: what keeping K and V in bfloat16 does, gates exact.",
    ),
    "state": ("state-precision", "What it costs to keep the state in bfloat16", "a state that is never rounded", ""),
}
"""Name of the files, title, what the errors are against, and what else there is to say."""


def verify(memory: MemorySpec) -> None:
    """Compare the chunk-parallel recurrence with the token loop; exit with a sentence if they differ."""
    tokens = next(stretches(memory, 300))
    difference = recur(memory, tokens, None)[1] - recur(memory, tokens, None, recurrence=naive_recurrence)[1]
    if difference.abs().max() > 1e-6:
        sys.exit(f"the recurrences differ by {difference.abs().max():.1e}")


def relative(x: torch.Tensor, exact: torch.Tensor, dims: tuple[int, ...]) -> list[float]:
    """Return the norm of the error over that of the exact value, one for each head."""
    return ((x - exact).square().sum(dims) / exact.square().sum(dims)).sqrt().tolist()


def measure(memory: MemorySpec, what: str, tokens: int) -> dict[str, dict[str, dict[str, list[float]]]]:
    """Return, by variant and number of tokens, relative errors by head, of the state and of the last read-outs."""
    variants = VARIANTS[what]
    states: dict[str, Any] = dict.fromkeys(("exact", *variants))
    errors: dict[str, dict[str, dict[str, list[float]]]] = {name: {} for name in variants}
    done = 0
    for stretch in stretches(memory, tokens):
        length = len(stretch[0])
        ends = [mark - done for mark in MARKS if done < mark <= done + length]
        for start, end in itertools.pairwise(sorted({0, length, *ends})):
            piece = part(stretch, start, end)
            outputs: dict[str, torch.Tensor] = {}
            for name, run in {"exact": recur, **variants}.items():
                outputs[name], states[name] = run(memory, piece, states[name], done + start)
            for name in errors if end in ends else ():
                state = in_bfloat16(states[name]) if what == "state" else states[name]
                errors[name][str(done + end)] = {
                    "state": relative(state[0], states["exact"][0], (1, 2)),
                    "read-outs": relative(outputs[name][-READ:], outputs["exact"][-READ:], (0, 2)),
                }
        done += length
    return errors


def paragraphs(result: dict[str, Any], what: str) -> list[str]:
    """Return the result for reading."""
    machine, first = result["machine"], next(iter(VARIANTS[what]))
    *_, against, more = TEXTS[what]
    rows, heads = [], []
    for memory, errors in result["errors"].items():
        for mark in errors[first]:
            values = [torch.tensor(errors[name][mark][part]) for name in errors for part in ("state", "read-outs")]
            rows.append([memory, f"{int(mark):,}", *(f"{x.median():.2%}, {x.max():.2%}" for x in values)])
        for offset, gates in enumerate(("vary", "steady")):
            last = errors[first][str(MARKS[-1])]["state"][offset::2]
            heads.append([memory, gates, *(f"{value:.2%}" for value in last)])
    half_lives = ", ".join(f"{n:,}" for n in HALF_LIVES)
    rates = ", ".join(f"{1 / (1 + math.exp(-x)):.2f}" for x in RATE_LOGITS)
    columns = [f"{part}, {name}" for name in VARIANTS[what] for part in ("state", "read-outs")]
    return [
        f"{machine['cpu']}, {machine['versions']}; {result['seconds']:.0f} s. Relative errors against {against}, the "
        f"recurrence in float64: median over {HEADS} heads, and the largest. Half of the heads have gates that hardly "
        f"vary. Read-outs are those of the last {READ} tokens.{more}",
        report.table(["memory", "tokens", *columns], rows),
        f"State errors after {MARKS[-1]:,} tokens by head, {first}:",
        report.table(["memory", "gates", *(f"time scale {n + 1}" for n in range(4))], heads, left=2),
        f"Time scales: half-lives of {half_lives} tokens (GatedDeltaNet, Mamba2); mean rates of {rates} (DeltaNet).",
    ]


@torch.inference_mode()
def main() -> None:
    parser = report.parser(__doc__)
    parser.add_argument("what", choices=list(VARIANTS))
    parser.add_argument("--output", type=Path, help="without .json and .md; default: results/gate-precision and so on")
    args = parser.parse_args()
    name, title, *_ = TEXTS[args.what]
    torch.set_num_threads(1)  # the products are small: threads would mostly wait for each other
    began, errors = time.monotonic(), {}
    for memory in MEMORIES.values():
        verify(memory)
        errors[memory.name] = measure(memory, args.what, MARKS[-1])
        report.say(f"{memory.name}: {time.monotonic() - began:.0f} s")
    more = {"half_lives": HALF_LIVES, "rate_logits": RATE_LOGITS, "errors": errors}
    result = report.head(began) | more
    report.write(args.output or report.FOLDER / name, result, title, paragraphs(result, args.what))


if __name__ == "__main__":
    main()
