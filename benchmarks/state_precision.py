"""What it costs to keep the state in bfloat16 (``--mamba-ssm-cache-dtype bfloat16``), over 100,000 tokens.

    python benchmarks/state_precision.py

Arithmetic is float32 in both cases; the state is rounded whenever it is written. A decode writes it after each token, a
prefill once for all of its tokens in a step. So the recurrence runs in float64 on the same random tokens three times:
with the state as it is, rounded after each token, and rounded after each 2,048 tokens. Memories, heads and tokens are
those of ``gate_precision.py``. Writes ``results/state-precision.json`` and ``.md`` beside this file.
"""

from __future__ import annotations

import itertools
from typing import Any

import torch
from gate_precision import (
    HEADS,
    MARKS,
    READ,
    Kind,
    Tokens,
    by_head,
    error_rows,
    in_bfloat16,
    recur,
    relative,
    run,
    stretches,
)

from vllm_ahn.kernels import l2_normalize, recurrent_step

PREFILL = 2048  # tokens that one step of a prefill absorbs
EVERY_TOKEN, EVERY_CHUNK = "decoded", f"prefilled, {PREFILL:,} tokens a step"
VARIANTS = (EVERY_TOKEN, EVERY_CHUNK)
WHAT = ("state", "read-outs")

State = torch.Tensor | None


def part(tokens: Tokens, start: int, end: int) -> Tokens:
    """Tokens ``[start, end)`` of a stretch."""
    q, k, v = (x[start:end] for x in (tokens.q, tokens.k, tokens.v))
    return Tokens(q, k, v, tuple(x[start:end] for x in tokens.gates))


def rounded(state: State) -> torch.Tensor:
    """A state as it comes back from a bfloat16 page."""
    assert state is not None
    return in_bfloat16(state).double()


def decode(kind: Kind, tokens: Tokens, state: State) -> tuple[torch.Tensor, torch.Tensor]:
    """`recur`, the state rounded after each token. What is read is the state before that."""
    g, b = (x.double() for x in kind.decay_and_rate(tokens.gates))
    q, k, v = l2_normalize(tokens.q.double()), l2_normalize(tokens.k.double()), tokens.v.double()
    if state is None:
        state = torch.zeros(1, q.shape[1], k.shape[2], v.shape[2], dtype=torch.float64)
    outputs = []
    for t in range(len(q)):
        token = (x[t : t + 1] for x in (q, k, v, g, b))
        o, state = recurrent_step(*token, kind.scale, kind.delta, state)
        state = rounded(state)
        outputs.append(o)
    return torch.cat(outputs), state


def prefill(kind: Kind, tokens: Tokens, state: State, done: int) -> tuple[torch.Tensor, torch.Tensor]:
    """`recur`, the state rounded after each `PREFILL` tokens of the sequence, of which `done` came before."""
    steps = range(PREFILL - done % PREFILL, len(tokens.q), PREFILL)
    outputs = []
    for start, end in itertools.pairwise((0, *steps, len(tokens.q))):
        o, state = recur(kind, part(tokens, start, end), state)
        outputs.append(o)
        if (done + end) % PREFILL == 0:
            state = rounded(state)
    assert state is not None
    return torch.cat(outputs), state


def measure(kind: Kind, tokens: int) -> dict[str, dict[str, dict[str, list[float]]]]:
    """Variant -> number of tokens -> relative errors by head, of the ``state`` and of the last ``read-outs``."""
    errors: dict[str, dict[str, dict[str, list[float]]]] = {name: {} for name in VARIANTS}
    states: dict[str, State] = dict.fromkeys(("exact", *errors))
    done = 0
    for stretch in stretches(kind, tokens):
        ends = [mark - done for mark in MARKS if done < mark <= done + len(stretch.q)]
        for start, end in itertools.pairwise(sorted({0, len(stretch.q), *ends})):
            piece = part(stretch, start, end)
            outputs: dict[str, torch.Tensor] = {}
            outputs["exact"], states["exact"] = recur(kind, piece, states["exact"])
            outputs[EVERY_TOKEN], states[EVERY_TOKEN] = decode(kind, piece, states[EVERY_TOKEN])
            outputs[EVERY_CHUNK], states[EVERY_CHUNK] = prefill(kind, piece, states[EVERY_CHUNK], done + start)
            if end not in ends:
                continue
            exact_state, exact_o = states["exact"], outputs["exact"][-READ:]
            for name in errors:
                assert exact_state is not None
                errors[name][str(done + end)] = {
                    "state": relative(rounded(states[name])[0], exact_state[0], (1, 2)),
                    "read-outs": relative(outputs[name][-READ:], exact_o, (0, 2)),
                }
        done += len(stretch.q)
    return errors


def table(result: dict[str, Any]) -> str:
    """The result for reading."""
    machine = result["machine"]
    lines = [
        "# What it costs to keep the state in bfloat16",
        "",
        f"    {result['command']}",
        "",
        f"{machine['cpu']}, {machine['versions']}; {result['seconds']:.0f} s. Relative errors against a state that is "
        f"never rounded, the recurrence in float64: median over {HEADS} heads, and the largest. Half of the heads have "
        f"gates that hardly vary. Read-outs are those of the last {READ} tokens.",
        "",
        "| memory | tokens | " + " | ".join(f"{what}, {name}" for name in VARIANTS for what in WHAT) + " |",
        "|---" * 6 + "|",
    ]
    heads = by_head(result, EVERY_TOKEN, "decoded tokens by head")
    return "\n".join([*lines, *error_rows(result, VARIANTS), *heads]) + "\n"


if __name__ == "__main__":
    run("state-precision", __doc__, measure, table)
