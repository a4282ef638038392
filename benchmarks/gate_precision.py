"""What it costs that gates are kept in bfloat16, over 100,000 tokens.

    python benchmarks/gate_precision.py

Gates are computed in float32 and stored beside K and V in the cache dtype until their token leaves the window. Here the
recurrence runs in float64 on the same random tokens, once with the gates as computed and once with the gates as read
back from a bfloat16 page, and states and read-outs are compared along the sequence. As a yardstick it runs a third
time with K and V in bfloat16 instead, which is what any bfloat16 cache does to them.

Each memory has eight heads: four time scales, from a half-life of 10 tokens to one of 100,000, each with gates that
vary from token to token and with gates that hardly do. The latter are rounded the same way every time: their errors add
up instead of averaging out, which comes to a decay or a rate that is off by at most 2^-8, 0.39 %. Writes
``results/gate-precision.json`` and ``.md`` beside this file.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import math
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from machine import describe

from vllm_ahn.kernels import chunk_recurrence, l2_normalize, naive_recurrence

HEADS, KV_HEADS, HEAD_SIZE = 8, 2, 64
HALF_LIVES = (10, 300, 5000, 100_000)  # tokens; two heads each, the second with steady gates
RATE_LOGITS = (-4.1, -1.7, 0.4, 2.3)  # DeltaNet has no decay: how much of a token it takes in sets its time scale
VARIATION, STEADY = 1.0, 0.001  # standard deviation of a projected gate
SEGMENT = 5000  # tokens at a time
READ = 64  # tokens whose read-outs are compared
MARKS = (1000, 10_000, 100_000)

Gates = tuple[torch.Tensor, ...]


@dataclasses.dataclass(frozen=True)
class Kind:
    """A memory: the gates that a token keeps, and how the recurrence's scalars come out of them."""

    delta: bool
    scale: float
    gates: Callable[[torch.Tensor, torch.Tensor], Gates]
    """From two standard normal tensors ``[T, H]`` to the kept gates, ``[T, H]`` float32 each."""
    decay_and_rate: Callable[[Gates], tuple[torch.Tensor, torch.Tensor]]


def by_head(values: tuple[float, ...]) -> torch.Tensor:
    """``[H]``, each value for two heads."""
    return torch.tensor(values).repeat_interleave(2)


SPREAD = torch.tensor([VARIATION, STEADY]).repeat(HEADS // 2)
DECAY = math.log(2) / by_head(tuple(map(float, HALF_LIVES)))  # -g of an average token
DT = 0.05  # softplus(dt_bias) of GatedDeltaNet, an average one of its published initialisation


def inverse_softplus(x: torch.Tensor) -> torch.Tensor:
    return x + torch.log(-torch.expm1(-x))


def gated_delta_net(a: torch.Tensor, b: torch.Tensor) -> Gates:
    """``g = -exp(A_log) softplus(a + dt_bias)``, ``b`` a sigmoid."""
    steps = F.softplus(a * SPREAD + inverse_softplus(torch.tensor(DT)))
    return -DECAY / DT * steps, torch.sigmoid(0.4 + b * SPREAD)


def delta_net(_: torch.Tensor, b: torch.Tensor) -> Gates:
    return (torch.sigmoid(by_head(RATE_LOGITS) + b * SPREAD),)


def mamba2(a: torch.Tensor, _: torch.Tensor) -> Gates:
    """``d = softplus(dt + dt_bias)``, with ``A = 1``: ``g = -d``, ``b = d``."""
    return (F.softplus(a * SPREAD + inverse_softplus(DECAY)),)


KINDS = {
    "GatedDeltaNet": Kind(True, HEAD_SIZE**-0.5, gated_delta_net, lambda gates: (gates[0], gates[1])),
    "DeltaNet": Kind(True, HEAD_SIZE**-0.5, delta_net, lambda gates: (torch.zeros_like(gates[0]), gates[0])),
    "Mamba2": Kind(False, 1.0, mamba2, lambda gates: (-gates[0], gates[0])),
}


@dataclasses.dataclass(frozen=True)
class Tokens:
    """A stretch of a sequence, float32: ``q [T, H, D]``, ``k`` and ``v`` ``[T, Hkv, D]``, and the kept gates."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    gates: Gates


def stretches(kind: Kind, tokens: int) -> Iterator[Tokens]:
    """Random tokens. Keys and queries share a direction, as those of language models do: they are not orthogonal."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    common = normal(KV_HEADS, HEAD_SIZE)
    for start in range(0, tokens, SEGMENT):
        length = min(SEGMENT, tokens - start)
        q = normal(length, HEADS, HEAD_SIZE) + common.repeat_interleave(HEADS // KV_HEADS, 0)
        k, v = normal(length, KV_HEADS, HEAD_SIZE) + common, normal(length, KV_HEADS, HEAD_SIZE)
        yield Tokens(q, k, v, kind.gates(normal(length, HEADS), normal(length, HEADS)))


def in_bfloat16(x: torch.Tensor) -> torch.Tensor:
    """``x`` as it comes back from a bfloat16 page."""
    return x.bfloat16().float()


VARIANTS: dict[str, Callable[[Tokens], Tokens]] = {
    "exact": lambda tokens: tokens,
    "gates in bfloat16": lambda t: dataclasses.replace(t, gates=tuple(map(in_bfloat16, t.gates))),
    "K and V in bfloat16": lambda t: dataclasses.replace(t, k=in_bfloat16(t.k), v=in_bfloat16(t.v)),
}


def recur(
    kind: Kind, tokens: Tokens, state: torch.Tensor | None, recurrence: Callable[..., Any] = chunk_recurrence
) -> tuple[torch.Tensor, torch.Tensor]:
    """Read-outs ``[T, H, D]`` and the state after the stretch, float64."""
    g, b = (x.double()[None] for x in kind.decay_and_rate(tokens.gates))
    q, k = (l2_normalize(x.double())[None] for x in (tokens.q, tokens.k))
    o, state = recurrence(q, k, tokens.v.double()[None], g, b, kind.scale, kind.delta, state)
    return o[0], state


def verify(kind: Kind) -> None:
    """The chunk-parallel recurrence against the token loop; exits with a sentence if they differ."""
    tokens = next(stretches(kind, 300))
    difference = recur(kind, tokens, None)[1] - recur(kind, tokens, None, naive_recurrence)[1]
    if difference.abs().max() > 1e-6:
        sys.exit(f"the recurrences differ by {difference.abs().max():.1e}")


def relative(x: torch.Tensor, exact: torch.Tensor, dims: tuple[int, ...]) -> list[float]:
    """Norm of the error over that of the exact value, one for each head."""
    return ((x - exact).square().sum(dims) / exact.square().sum(dims)).sqrt().tolist()


def measure(kind: Kind, tokens: int) -> dict[str, dict[str, dict[str, list[float]]]]:
    """Variant -> number of tokens -> relative errors by head, of the ``state`` and of the last ``read-outs``."""
    states: dict[str, torch.Tensor | None] = dict.fromkeys(VARIANTS)
    errors: dict[str, dict[str, dict[str, list[float]]]] = {name: {} for name in VARIANTS if name != "exact"}
    done = 0
    for stretch in stretches(kind, tokens):
        ends = [mark - done for mark in MARKS if done < mark <= done + len(stretch.q)]
        pieces = sorted({0, len(stretch.q), *ends})
        for start, end in itertools.pairwise(pieces):
            q, k, v = (x[start:end] for x in (stretch.q, stretch.k, stretch.v))
            piece = Tokens(q, k, v, tuple(x[start:end] for x in stretch.gates))
            outputs: dict[str, torch.Tensor] = {}
            for name, change in VARIANTS.items():
                outputs[name], states[name] = recur(kind, change(piece), states[name])
            if end not in ends:
                continue
            exact_state, exact_o = states["exact"], outputs["exact"][-READ:]
            for name in errors:
                state = states[name]
                assert state is not None and exact_state is not None
                errors[name][str(done + end)] = {
                    "state": relative(state[0], exact_state[0], (1, 2)),
                    "read-outs": relative(outputs[name][-READ:], exact_o, (0, 2)),
                }
        done += len(stretch.q)
    return errors


def table(result: dict[str, Any]) -> str:
    """The result for reading."""
    machine = result["machine"]
    lines = [
        "# What it costs that gates are kept in bfloat16",
        "",
        f"    {result['command']}",
        "",
        f"{machine['cpu']}, {machine['versions']}; {result['seconds']:.0f} s. Relative errors against float32 "
        f"gates, the recurrence in float64: median over {HEADS} heads, and the largest. Half of the heads have gates "
        "that hardly vary, so that rounding errors add up. Read-outs are those of the last "
        f"{READ} tokens. The last two columns are a yardstick: what keeping K and V in bfloat16 does, gates exact.",
        "",
        "| memory | tokens | state, gates bf16 | read-out, gates bf16 | state, K and V bf16 | read-out, K and V bf16 |",
        "|---|---|---|---|---|---|",
    ]
    return (
        "\n".join([*lines, *error_rows(result, ("gates in bfloat16", "K and V in bfloat16")), *by_head(result)]) + "\n"
    )


def error_rows(result: dict[str, Any], variants: Sequence[str]) -> list[str]:
    """Rows of a table: median and largest error of states and read-outs, for each memory and length."""
    lines = []
    for memory, errors in result["errors"].items():
        for mark in errors[variants[0]]:
            cells = []
            for name in variants:
                for what in ("state", "read-outs"):
                    values = torch.tensor(errors[name][mark][what])
                    cells.append(f"{values.median():.2%}, {values.max():.2%}")
            lines.append(f"| {memory} | {int(mark):,} | {' | '.join(cells)} |")
    return lines


def by_head(
    result: dict[str, Any], variant: str = "gates in bfloat16", tokens: str = "tokens by head, gates in bfloat16"
) -> list[str]:
    """A table of the heads' state errors with a variant, after the last of `MARKS`."""
    lines = ["", f"State errors after {MARKS[-1]:,} {tokens}:", ""]
    lines += ["| memory | gates | " + " | ".join(f"time scale {n + 1}" for n in range(4)) + " |", "|---" * 6 + "|"]
    for memory, errors in result["errors"].items():
        values = errors[variant][str(MARKS[-1])]["state"]
        for offset, name in enumerate(("vary", "steady")):
            lines.append(f"| {memory} | {name} | " + " | ".join(f"{value:.2%}" for value in values[offset::2]) + " |")
    half_lives = ", ".join(f"{n:,}" for n in HALF_LIVES)
    rates = ", ".join(f"{1 / (1 + math.exp(-x)):.2f}" for x in RATE_LOGITS)
    lines += [
        "",
        f"Time scales: half-lives of {half_lives} tokens (GatedDeltaNet, Mamba2); mean rates of {rates} (DeltaNet).",
    ]
    return lines


@torch.inference_mode()
def run(
    name: str,
    description: str | None,
    measure: Callable[[Kind, int], dict[str, Any]],
    table: Callable[[dict[str, Any]], str],
) -> None:
    """A whole program: measure every memory, write ``results/NAME.json`` and ``.md``."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / name)
    args = parser.parse_args()
    torch.set_num_threads(1)  # the products are small: threads would mostly wait for each other
    started = time.perf_counter()
    errors = {}
    for memory, kind in KINDS.items():
        verify(kind)
        errors[memory] = measure(kind, MARKS[-1])
        print(f"{memory}: {time.perf_counter() - started:.0f} s", file=sys.stderr, flush=True)
    result = {
        "command": " ".join([f"python benchmarks/{Path(sys.argv[0]).name}", *sys.argv[1:]]),
        "machine": describe(),
        "seconds": time.perf_counter() - started,
        "half_lives": HALF_LIVES,
        "rate_logits": RATE_LOGITS,
        "errors": errors,
    }
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.with_suffix(".json").write_text(json.dumps(result, indent=1) + "\n")
    args.output.with_suffix(".md").write_text(table(result))
    print(table(result))


if __name__ == "__main__":
    run("gate-precision", __doc__, measure, table)
