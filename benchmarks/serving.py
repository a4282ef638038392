"""A base model with an AHN and without, served by turns on one machine: speed, and cache held.

    python benchmarks/serving.py [--threads N] [--repetitions N] [--dtype bfloat16|float32] [--eager]

The model has the shape of Qwen2.5-0.5B with 4 layers and random weights; the AHN is GatedDeltaNet, W = 992, S = 32,
blocks of 32 tokens. The two engines take turns within every repetition, and what is reported is the median over
repetitions of ratios within one, so that what else the machine does falls on both. Before anything is timed, tokens are
checked: inside the window against the base's, past it against the reference in float32.

One thread by default: with more, every product waits for the slowest, and on a machine that is shared that is a thread
that another program has pushed aside. Writes ``results/serving-cpu.json`` and ``.md`` beside this file.
"""

from __future__ import annotations

import dataclasses
import os
import statistics
import time
from typing import Any

import models
import report
from agreement import check_rows
from engines import EngineProcess, Generation
from inputs import prompt
from models import AHN, FULL, Comparison, running
from report import Aim

BLOCK, CACHE_BYTES = 32, 512 << 20
SHORT, REQUESTS = 512, 8
ROUNDS = 5  # turns inside the window in every repetition: short ones, so that a burst of other work spoils few
NEAR, FAR, ANSWER = 2048, 16384, 64
TOLERANCE = 0.15
"""How much less than the best a token's logit may be in float32 for bfloat16 to choose it; the best is about 4."""

Figures = dict[str, float]


def main() -> None:
    parser = models.parser(__doc__, "serving-cpu", "threads", "repetitions", "dtype")
    parser.add_argument("--eager", action="store_true", help="without vLLM's default compilation")
    args = parser.parse_args()
    began = time.monotonic()
    engine = {"load_format": "auto", "block_size": BLOCK, "kv_cache_memory_bytes": CACHE_BYTES}
    fixed: dict[str, Any] = {"model": "0.5B", "layers": 4, "rows": (FULL, AHN), "contexts": (FAR + 1024,)}
    fixed |= {"window": 992, "sinks": 32, "max_batch": REQUESTS, "sequences": 1, "budget": 2048, "steps": ANSWER}
    fixed |= {"tolerance": TOLERANCE, "engine": engine | {"enforce_eager": args.eager}}
    setting = Comparison.read({"dtype": "bfloat16", "repetitions": 5}, args, **fixed)
    with running(setting, getattr(args, "threads", 1)) as (engines, folders):
        base, ahn = engines.values()
        prompts = [prompt(SHORT, seed) for seed in range(REQUESTS)]
        checks = check_rows(setting, engines, folders, prompts, [prompt(NEAR)], ANSWER)
        repetitions = [measure(base, ahn, number) for number in range(setting.repetitions)]
    result = {
        **report.head(began),
        "setting": dataclasses.asdict(setting),
        "engines": {"base": base.info, "ahn": ahn.info},
        "checks": checks,
        "summary": summarise(repetitions),
        "repetitions": repetitions,
    }
    report.write(args.output, result, "Serving with an AHN and without, on a CPU", paragraphs(setting, result))


def measure(base: EngineProcess, ahn: EngineProcess, number: int) -> dict[str, Any]:
    """Run one repetition: the engines take turns, the first one alternating."""
    began, load = time.perf_counter(), os.getloadavg()[0]
    by_turns = [("base", base), ("ahn", ahn)]
    if number % 2:
        by_turns.reverse()

    def both(prompts: list[list[int]], answer: int) -> dict[str, Generation]:
        return {name: engine.generate(prompts, answer) for name, engine in by_turns}

    inside = []
    for turn in range(ROUNDS):
        prompts = [prompt(SHORT, 1000 * number + 100 * turn + seed) for seed in range(REQUESTS)]
        many, one = both(prompts, ANSWER), both(prompts[:1], ANSWER)
        inside.append({name: inside_figures(many[name], one[name]) for name in ("base", "ahn")})
        by_turns.reverse()
    # The near prompt before the far one and after it: a machine that slows down meanwhile does so on both sides.
    near, far, again = (both([prompt(length, number)], ANSWER) for length in (NEAR, FAR, NEAR))
    blocks = {"base": base.info["block_bytes"], "ahn": ahn.info["block_bytes"]}
    past = {name: past_figures(near[name], far[name], again[name], blocks[name]) for name in ("base", "ahn")}
    report.say(f"repetition {number + 1}: {time.perf_counter() - began:.0f} s, load {load:.1f}")
    return {"load": load, "inside": inside, "past": [past]}


def inside_figures(many: Generation, one: Generation) -> Figures:
    """Return what one engine did inside the window in one turn."""
    return {
        "tokens_per_s": REQUESTS * (SHORT + ANSWER) / many.seconds,
        "tokens_per_cpu_s": REQUESTS * (SHORT + ANSWER) / many.cpu_s,
        "prefill_tokens_per_s": REQUESTS * SHORT / many.first_token_s,
        "decode_ms": 1e3 * (many.seconds - many.first_token_s) / ANSWER,
        "alone_decode_ms": 1e3 * statistics.median(one.steps_s),
    }


def past_figures(near: Generation, far: Generation, again: Generation, block_bytes: int) -> Figures:
    """Return what one engine did past the window in one repetition."""
    return {
        "near_decode_ms": 1e3 * statistics.median(near.steps_s + again.steps_s),
        "far_decode_ms": 1e3 * statistics.median(far.steps_s),
        "near_first_token_s": min(near.first_token_s, again.first_token_s),
        "far_first_token_s": far.first_token_s,
        "far_answer_s": far.seconds,
        "far_blocks": far.blocks,
        "far_cache_bytes": far.blocks * block_bytes,
    }


_AHN, _BASE = "AHN / base", "base / AHN"
_MANY = f"{REQUESTS} requests"
_FAR_TO_NEAR = f"decode time per token at {FAR:,} over that at {NEAR:,}"
RATIOS: dict[str, tuple[str, str, str, str, Aim | None]] = {
    "a": ("inside", f"(a) tokens per second, {_MANY} inside the window", _AHN, "tokens_per_s", Aim(">=", 0.95)),
    "b": ("past", f"(b) {_FAR_TO_NEAR}", "AHN", "", Aim("<=", 1.1)),
    "c": ("past", f"(c) time to answer a prompt of {FAR:,}, {ANSWER} tokens", _BASE, "far_answer_s", None),
    "d": ("past", f"(d) cache bytes held while decoding at {FAR:,}", _BASE, "far_cache_bytes", Aim(">=", 10)),
    "a, processor time": ("inside", "tokens per second of processor time, as (a)", _AHN, "tokens_per_cpu_s", None),
    "inside, prefill": ("inside", f"prefill tokens per second, {_MANY}", _AHN, "prefill_tokens_per_s", None),
    "inside, decode": ("inside", f"decode time per token, {_MANY}", _BASE, "decode_ms", None),
    "inside, decode alone": ("inside", "decode time per token, one request", _BASE, "alone_decode_ms", None),
    "b, base": ("past", _FAR_TO_NEAR, "base", "", None),
    "first token": ("past", f"time to the first token after {FAR:,}", _BASE, "far_first_token_s", None),
}
"""Where it is measured, what it is, of what, the figure, and the aim. A ratio of one engine is its far to its near."""


def ratio(of: str, figure: str, turn: dict[str, Figures]) -> float:
    """Return one of `RATIOS` in one turn."""
    base, ahn = turn["base"], turn["ahn"]
    if of in (_AHN, _BASE):
        return ahn[figure] / base[figure] if of == _AHN else base[figure] / ahn[figure]
    one = ahn if of == "AHN" else base
    return one["far_decode_ms"] / one["near_decode_ms"]


def summarise(repetitions: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Return the median, least and greatest of each ratio, and whether it meets its aim."""
    summary: dict[str, dict[str, Any]] = {}
    for name, (part, what, of, figure, aim) in RATIOS.items():
        values = [ratio(of, figure, turn) for repetition in repetitions for turn in repetition[part]]
        median = statistics.median(values)
        summary[name] = {"what": f"{what}: {of}", "median": median, "least": min(values), "greatest": max(values)}
        if aim:
            summary[name] |= aim.judge(median)
    return summary


def paragraphs(setting: Comparison, result: dict[str, Any]) -> list[str]:
    """Return the result for reading."""
    machine, repetitions, info = result["machine"], result["repetitions"], result["engines"]["base"]
    loads = [repetition["load"] for repetition in repetitions]
    compiled = "vLLM's default compilation" if info["compiled"] else "eager"
    ratios = [
        [row["what"], f"{row['median']:.3f}", f"{row['least']:.3f} to {row['greatest']:.3f}", report.verdict(row)]
        for row in result["summary"].values()
    ]
    figures = []
    for part in ("inside", "past"):
        turns = [turn for repetition in repetitions for turn in repetition[part]]
        for key in turns[0]["base"]:
            values = (statistics.median(turn[name][key] for turn in turns) for name in ("base", "ahn"))
            figures.append([f"{part}: {key}", *(f"{x:,.4g}" if x < 1000 else f"{x:,.0f}" for x in values)])
    return [
        f"{machine['cpu']}, {machine['cores']} cores, {info['threads']} thread(s) an engine, {compiled}; "
        f"{machine['versions']}. {setting.describe()}, random weights; GatedDeltaNet, W = {setting.window}, "
        f"S = {setting.sinks}, blocks of {BLOCK}. Inside the window: prompts of {SHORT} tokens, answers of "
        f"{ANSWER}. Medians over {len(repetitions)} repetitions, in each of which the two engines took turns, "
        f"{ROUNDS} times inside the window and once past it; the load of the machine, shared with other work, was "
        f"{min(loads):.1f} to {max(loads):.1f}.",
        report.table(["ratio", "median", "least to greatest", "aim"], ratios),
        report.table(["median", "base", "AHN"], figures),
        *report.checked(result["checks"]),
    ]


if __name__ == "__main__":
    main()
