"""A base model with an AHN and without, served by turns on one machine: speed, and cache held.

    python benchmarks/serving.py [--threads N] [--repetitions N] [--dtype bfloat16|float32] [--eager] [--profile]

The model has the shape of Qwen2.5-0.5B with 4 layers and random weights; the AHN is GatedDeltaNet, W = 992, S = 32,
blocks of 32 tokens. The two engines take turns within every repetition, and what is reported is the median over
repetitions of ratios within one, so that what else the machine does falls on both. Before anything is timed, tokens are
checked: inside the window against the base's, past it against the reference in float32.

One thread by default: with more, every product waits for the slowest, and on a machine that is shared that is a thread
that another program has pushed aside. Writes ``results/serving-cpu.json`` and ``.md`` beside this file.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from operator import methodcaller
from pathlib import Path
from typing import Any

import report
from agreement import Mismatch
from checks import check_inside, check_past
from engine_process import EngineProcess
from engine_rows import SHAPES
from machine import describe
from prompts import prompt
from stepped_engine import Answer, Throughput

from vllm_ahn.tools.tiny import TinyPaths, make_tiny

SHAPE = SHAPES["0.5B"] | {"layers": 4, "max_position_embeddings": 32768}
WINDOW, SINKS, BLOCK = 992, 32, 32  # tokens
BUDGET = 2048  # tokens a step
CACHE_BYTES = 512 << 20
SHORT, REQUESTS, SHORT_ANSWER = 512, 8, 64
ROUNDS = 5  # turns inside the window in every repetition: short ones, so that a burst of other work spoils few
NEAR, FAR, ANSWER = 2048, 16384, 64
TOLERANCE = 0.15
"""How much less than the best a token's logit may be in float32 for bfloat16 to choose it; the best is about 4."""

AIMS = {"a": (">=", 0.95), "b": ("<=", 1.1), "d": (">=", 10.0)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1, help="of OpenMP, for each engine")
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--eager", action="store_true", help="without vLLM's default compilation")
    parser.add_argument("--profile", action="store_true", help="print where decode steps spend their time, and stop")
    parser.add_argument("--output", type=Path, default=report.FOLDER / "serving-cpu")
    args = parser.parse_args()

    with tempfile.TemporaryDirectory(prefix="vllm-ahn-benchmark-") as folder:
        paths = make_tiny(folder, memory="GatedDeltaNet", dtype=args.dtype, **SHAPE)
        base, ahn = engines(paths, args)
        try:
            if args.profile:
                for engine, length in ((base, SHORT), (ahn, SHORT), (ahn, NEAR)):
                    print(engine.info["attention"], length, engine.profile(prompt(length), ANSWER), sep="\n")
                return
            checks = verify(base, ahn, paths)
            repetitions = [measure(base, ahn, number) for number in range(args.repetitions)]
        except Mismatch as error:
            sys.exit(f"not verified: {error}")
        finally:
            base.close()
            ahn.close()
    result = {
        "command": report.command(),
        "machine": describe(),
        "threads": args.threads,
        "dtype": args.dtype,
        "compiled": not args.eager,
        "model": SHAPE | {"memory": "GatedDeltaNet", "window": WINDOW, "sinks": SINKS, "block_size": BLOCK},
        "engines": {"base": base.info, "ahn": ahn.info},
        "checks": checks,
        "summary": summarise(repetitions),
        "repetitions": repetitions,
    }
    report.write(args.output, result, table(result))


def engines(paths: TinyPaths, args: argparse.Namespace) -> tuple[EngineProcess, EngineProcess]:
    """The base's engine and the AHN's, alike in all else."""
    common = {
        "model": str(paths.base),
        "dtype": args.dtype,
        "block_size": BLOCK,
        "max_model_len": FAR + 1024,
        "max_num_batched_tokens": BUDGET,
        "max_num_seqs": REQUESTS,
        "kv_cache_memory_bytes": CACHE_BYTES,
        "enforce_eager": args.eager,
    }
    setting = {"checkpoint": str(paths.ahn), "window": WINDOW, "sinks": SINKS}
    base = EngineProcess(common, args.threads)
    return base, EngineProcess({**common, "additional_config": {"ahn": setting}}, args.threads)


def verify(base: EngineProcess, ahn: EngineProcess, paths: TinyPaths) -> dict[str, Any]:
    """Checks tokens before anything is timed, and warms both engines up. Raises `Mismatch` if they are wrong."""
    from vllm_ahn.reference import from_folders

    prompts = [prompt(SHORT, seed) for seed in range(REQUESTS)]
    inside = check_inside(base, ahn, prompts, SHORT_ANSWER)
    reference = from_folders(paths.base, paths.ahn, WINDOW, SINKS)
    past = check_past(base, ahn, reference, [prompt(NEAR)], ANSWER, TOLERANCE)
    return {"inside the window": inside, "past the window": past}


def measure(base: EngineProcess, ahn: EngineProcess, number: int) -> dict[str, Any]:
    """One repetition: the engines take turns, the first one alternating."""
    started = time.perf_counter()
    load = os.getloadavg()[0]
    by_turns = [("base", base), ("ahn", ahn)]
    if number % 2:
        by_turns.reverse()

    def both(run: Callable[[EngineProcess], Any]) -> dict[str, Any]:
        return {name: run(engine) for name, engine in by_turns}

    inside = []
    for turn in range(ROUNDS):
        prompts = [prompt(SHORT, 1000 * number + 100 * turn + seed) for seed in range(REQUESTS)]
        many: dict[str, Throughput] = both(methodcaller("throughput", prompts, SHORT_ANSWER))
        one: dict[str, Answer] = both(methodcaller("answer", prompts[0], SHORT_ANSWER))
        inside.append({name: inside_figures(many[name], one[name]) for name in ("base", "ahn")})
        by_turns.reverse()
    # The near prompt before the far one and after it: a machine that slows down meanwhile does so on both sides.
    near: dict[str, Answer] = both(methodcaller("answer", prompt(NEAR, number), ANSWER))
    far: dict[str, Answer] = both(methodcaller("answer", prompt(FAR, number), ANSWER))
    again: dict[str, Answer] = both(methodcaller("answer", prompt(NEAR, number), ANSWER))
    past = {name: past_figures(near[name], far[name], again[name]) for name in ("base", "ahn")}
    seconds = time.perf_counter() - started
    print(f"repetition {number + 1}: {seconds:.0f} s, load {load:.1f}", file=sys.stderr, flush=True)
    return {"load": load, "inside": inside, "past": [past]}


def inside_figures(many: Throughput, one: Answer) -> dict[str, float]:
    """What one engine did inside the window in one turn."""
    return {
        "tokens_per_s": REQUESTS * (SHORT + SHORT_ANSWER) / many.seconds,
        "tokens_per_cpu_s": REQUESTS * (SHORT + SHORT_ANSWER) / many.cpu_s,
        "prefill_tokens_per_s": REQUESTS * SHORT / many.first_tokens_s,
        "decode_ms": 1e3 * (many.seconds - many.first_tokens_s) / SHORT_ANSWER,
        "alone_decode_ms": 1e3 * one.step_s,
    }


def past_figures(near: Answer, far: Answer, again: Answer) -> dict[str, float]:
    """What one engine did past the window in one repetition."""
    return {
        "near_decode_ms": 1e3 * statistics.median(near.steps_s + again.steps_s),
        "far_decode_ms": 1e3 * far.step_s,
        "near_first_token_s": min(near.first_token_s, again.first_token_s),
        "far_first_token_s": far.first_token_s,
        "far_answer_s": far.total_s,
        "far_blocks": far.blocks,
        "far_cache_bytes": far.blocks * far.block_bytes,
    }


RATIOS: dict[str, tuple[str, str, Callable[[dict[str, float], dict[str, float]], float]]] = {
    "a": (
        "inside",
        f"(a) tokens per second, {REQUESTS} requests inside the window, {SHORT} + {SHORT_ANSWER} tokens: AHN / base",
        lambda base, ahn: ahn["tokens_per_s"] / base["tokens_per_s"],
    ),
    "b": (
        "past",
        f"(b) decode time per token at {FAR:,} over that at {NEAR:,}: AHN",
        lambda base, ahn: ahn["far_decode_ms"] / ahn["near_decode_ms"],
    ),
    "c": (
        "past",
        f"(c) time to answer a prompt of {FAR:,}, {ANSWER} tokens: base / AHN",
        lambda base, ahn: base["far_answer_s"] / ahn["far_answer_s"],
    ),
    "d": (
        "past",
        f"(d) cache bytes held while decoding at {FAR:,}: base / AHN",
        lambda base, ahn: base["far_cache_bytes"] / ahn["far_cache_bytes"],
    ),
    "a, processor time": (
        "inside",
        "tokens per second of processor time, as (a): AHN / base",
        lambda base, ahn: ahn["tokens_per_cpu_s"] / base["tokens_per_cpu_s"],
    ),
    "inside, prefill": (
        "inside",
        "prefill tokens per second inside the window: AHN / base",
        lambda base, ahn: ahn["prefill_tokens_per_s"] / base["prefill_tokens_per_s"],
    ),
    "inside, decode": (
        "inside",
        f"decode speed inside the window, {REQUESTS} requests: AHN / base",
        lambda base, ahn: base["decode_ms"] / ahn["decode_ms"],
    ),
    "inside, decode alone": (
        "inside",
        "decode speed inside the window, one request: AHN / base",
        lambda base, ahn: base["alone_decode_ms"] / ahn["alone_decode_ms"],
    ),
    "b, base": (
        "past",
        f"decode time per token at {FAR:,} over that at {NEAR:,}: base",
        lambda base, ahn: base["far_decode_ms"] / base["near_decode_ms"],
    ),
    "first token": (
        "past",
        f"time to the first token after {FAR:,}: base / AHN",
        lambda base, ahn: base["far_first_token_s"] / ahn["far_first_token_s"],
    ),
}


def summarise(repetitions: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """For each ratio its median, least and greatest; and whether it meets its aim."""
    summary: dict[str, dict[str, Any]] = {}
    for name, (part, text, ratio) in RATIOS.items():
        values = [ratio(turn["base"], turn["ahn"]) for repetition in repetitions for turn in repetition[part]]
        median = statistics.median(values)
        summary[name] = {"what": text, "median": median, "least": min(values), "greatest": max(values)}
        if name in AIMS:
            sign, bound = AIMS[name]
            summary[name] |= {"aim": f"{sign} {bound}", "met": median >= bound if sign == ">=" else median <= bound}
    return summary


def table(result: dict[str, Any]) -> str:
    """The result for reading."""
    machine, repetitions = result["machine"], result["repetitions"]
    loads = [repetition["load"] for repetition in repetitions]
    compiled = "vLLM's default compilation" if result["compiled"] else "eager"
    lines = [
        "# Serving with an AHN and without, on a CPU",
        "",
        f"    {result['command']}",
        "",
        f"{machine['cpu']}, {machine['cores']} cores, {result['threads']} thread(s) an engine, {result['dtype']}, "
        f"{compiled}; {machine['versions']}. Qwen2.5-0.5B's shape with 4 layers, random weights; GatedDeltaNet, "
        f"W = {WINDOW}, S = {SINKS}, blocks of {BLOCK}. Medians over {len(repetitions)} repetitions, in each of which "
        f"the two engines took turns, {ROUNDS} times inside the window and once past it; the load of the machine, "
        f"shared with other work, was {min(loads):.1f} to {max(loads):.1f}.",
        "",
        "| ratio | median | least to greatest | aim |",
        "|---|---|---|---|",
    ]
    for row in result["summary"].values():
        aim = f"{row['aim']}, {'met' if row['met'] else 'missed'}" if "aim" in row else ""
        lines.append(f"| {row['what']} | {row['median']:.3f} | {row['least']:.3f} to {row['greatest']:.3f} | {aim} |")
    lines += ["", "| median | base | AHN |", "|---|---|---|"]
    for part in ("inside", "past"):
        turns = [turn for repetition in repetitions for turn in repetition[part]]
        for key in turns[0]["base"]:
            values = (statistics.median(turn[name][key] for turn in turns) for name in ("base", "ahn"))
            cells = (f"{value:,.4g}" if value < 1000 else f"{value:,.0f}" for value in values)
            lines.append(f"| {part}: {key} | {' | '.join(cells)} |")
    lines += ["", "Checked before timing:", ""]
    lines += [f"* {name}: {text}" for name, text in result["checks"].items()]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
