"""vLLM with full attention, with a window alone and with an AHN, side by side at long contexts: speed, and what fits.

    python benchmarks/engine.py [--model 3B|7B] [--rows full,full-fp8,window,ahn-gdn] [--contexts 131072,32768] ...

Models of Qwen2.5-3B's or 7B's shape with random weights, made on the spot. Each row is an engine in a process of its
own, with caches of equal size; the engines take turns, so that what the device does otherwise falls on all of them.
For each context: time to the first token of a sequence alone; then sequences that stay, more and more of them, with the
time per token at every batch, up to the most that fits (see `ladder`). vLLM counts how many sequences fit, and that
many, or more where a window gives blocks back, have to run without preemption.

Before anything is timed, each engine's answers are compared with those of one that is eager (see `agreement`), inside
the window, across its end and past it; inside the window rows must agree with full attention, and past it a memory must
make a difference. A mismatch ends the program with a sentence and exit code 1. Aims that are missed do not.

Prompts are computed in full, so a run costs about as many prefills as sequences fit into all the caches together.
``--sequences`` sets the size of a cache by the sequences of the longest context that full attention may hold in it;
ratios between rows hardly depend on it. ``--sequences 0`` takes what vLLM takes, the whole device, for one engine after
the other. ``--layers`` makes models shallower: a sequence takes the cache of that many layers, and the report adds what
it would take with all of them. ``--time-budget`` (seconds) stops taking in sequences when time is short; rows that are
not full by then say so, and no aim is judged by them.

On one H200 this is planned to end within 8 minutes:

    python benchmarks/engine.py --model 3B --layers 9 --sequences 4 --repetitions 2 --time-budget 420

``--tiny`` is the same on a CPU with a model of two layers: what it shows is that the benchmark works. How to install
all on a GPU machine without a network is in ``benchmarks/README.md``.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import report
import torch
from agreement import Mismatch, compare, largest_difference
from engine_process import EngineError, EngineProcess
from engine_report import judge, markdown
from engine_rows import DEFAULT_ROWS, ROWS, SHAPES, Setting, arguments, write_models
from ladder import Ladder, Rungs
from prompts import prompt
from stepped_engine import Choice

from vllm_ahn.config import NO_MEMORY

ANSWER, LOGPROBS = 8, 20
"""Tokens of an answer that is compared, and how many of the most likely ones at each."""

REAL: dict[str, Any] = {
    "model": "3B",
    "dtype": "bfloat16",
    "contexts": (131072, 32768),
    "window": 32640,
    "sinks": 128,
    "max_batch": 64,
    "sequences": 4,
    "budget": 8192,
    "steps": 16,
    "repetitions": 3,
}
TINY: dict[str, Any] = {
    "model": "tiny",
    "dtype": "float32",
    "contexts": (384, 128),
    "window": 96,
    "sinks": 32,
    "max_batch": 12,
    "sequences": 2,
    "budget": 64,
    "steps": 2,
    "repetitions": 2,
    "engine": {"block_size": 32},
}
TOLERANCE = {"bfloat16": 0.5, "float32": 1e-3}
"""Nats. In such models of 36 layers, rounding to bfloat16 moves the log-probabilities of the 20 best tokens by 0.04 in
the mean and by up to 0.2; those of other tokens than the right ones are several off."""


def main() -> None:
    args = parser().parse_args()
    setting = read_setting(args)
    started = time.monotonic()
    deadline = started + (args.time_budget or math.inf)
    try:
        with tempfile.TemporaryDirectory(prefix="vllm-ahn-benchmark-") as folder:
            run = Run(setting, write_models(setting, Path(folder)), args.threads)
            run.answer_eagerly(args.break_verification)
            contexts = run.measure(deadline)
    except Mismatch as error:
        sys.exit(f"not verified: {error}")
    result: dict[str, Any] = {
        **report.head(setting, started),
        "engines": run.info,
        "verified": run.verified,
        "missing": run.missing,
        "contexts": contexts,
    }
    result["aims"] = judge(setting, contexts)
    report.write(args.output, result, markdown(setting, result))


def parser() -> argparse.ArgumentParser:
    """The options; those without a default take it from `REAL` or `TINY`."""

    result = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    shape = result.add_mutually_exclusive_group()
    shape.add_argument("--model", choices=[name for name in SHAPES if name != "tiny"], help="default: 3B")
    shape.add_argument("--tiny", action="store_true", help="a tiny model, window and contexts, for a CPU")
    result.add_argument("--layers", type=int, help="of the model; default: all")
    result.add_argument("--dtype", choices=list(TOLERANCE))
    result.add_argument("--rows", default=",".join(DEFAULT_ROWS), help=f"of {', '.join(ROWS)}; default: %(default)s")
    result.add_argument("--contexts", type=report.numbers, help="tokens, with commas")
    result.add_argument("--window", type=int)
    result.add_argument("--sinks", type=int)
    result.add_argument(
        "--batches", type=report.numbers, help="to measure at, besides the most that fits; default: 1,2,4,..."
    )
    result.add_argument("--max-batch", type=int, help="sequences at a time, at most")
    result.add_argument("--sequences", type=int, help="size of a cache; 0: all memory that vLLM takes")
    result.add_argument("--alone", action="store_true", help="one engine at a time, for models too large side by side")
    result.add_argument("--budget", type=int, help="tokens a step (max_num_batched_tokens)")
    result.add_argument("--steps", type=int, help="decode steps of a measurement")
    result.add_argument("--repetitions", type=int)
    result.add_argument("--time-budget", type=float, metavar="S", help="seconds, the engines' start included")
    result.add_argument("--tolerance", type=float, help="of log-probabilities against eager, nats")
    result.add_argument("--seed", type=int, default=0, help="of the weights")
    result.add_argument("--threads", type=int, help="of OpenMP, for each engine")
    result.add_argument(
        "--engine-args", type=json.loads, default={}, metavar="JSON", help="vllm.LLM's, for all engines"
    )
    result.add_argument(
        "--break-verification", action="store_true", help="give the eager engines other weights: must fail"
    )
    result.add_argument("--output", type=Path, default=report.FOLDER / "engine", help="without .json and .md")
    return result


def read_setting(args: argparse.Namespace) -> Setting:
    """What the options say; ends the program with a sentence where they cannot be met."""
    values = TINY if args.tiny else REAL
    values = values | {name: value for name, value in vars(args).items() if name in REAL and value is not None}
    unknown = [row for row in args.rows.split(",") if row not in ROWS]
    if unknown:
        sys.exit(f"--rows has {unknown[0]!r}, expected some of {', '.join(ROWS)}")
    if not values["sequences"] and not torch.cuda.is_available():
        sys.exit("--sequences is 0, which takes the whole memory of a GPU, and there is none: expected at least 1")
    powers = tuple(2**n for n in range(int(math.log2(values["max_batch"])) + 1))
    return Setting(
        **values
        | {
            "layers": args.layers or SHAPES[values["model"]]["layers"],
            "rows": tuple(args.rows.split(",")),
            "contexts": tuple(sorted(values["contexts"], reverse=True)),
            "batches": args.batches or powers,
            "alone": args.alone or not values["sequences"],
            "tolerance": TOLERANCE[values["dtype"]] if args.tolerance is None else args.tolerance,
            "seed": args.seed,
            "engine": values.get("engine", {}) | args.engine_args,
        }
    )


class Run:
    """All rows of one run, each in engines of its own: an eager one to verify by, then the one that is measured."""

    def __init__(self, setting: Setting, folders: dict[str, Path], threads: int | None) -> None:
        self.setting = setting
        self.folders = folders
        self.threads = threads
        self.info: dict[str, dict[str, Any]] = {}
        self.missing: dict[str, str] = {}
        """Rows that vLLM does not have on this device, and what it says."""
        self.verified: dict[str, str] = {}
        self.inside, self.across, self.past = prompts_to_verify(setting)
        self.answers: dict[str, list[list[Choice]]] = {}
        """Of the eager engines, to `prompts`."""

    @property
    def prompts(self) -> list[list[int]]:
        """All that answers are compared for."""
        return self.inside + self.across + self.past

    @property
    def groups(self) -> list[list[str]]:
        """The rows whose engines live at the same time."""
        rows = [row for row in self.setting.rows if row not in self.missing]
        return [[row] for row in rows] if self.setting.alone else [rows]

    @contextlib.contextmanager
    def engines(self, rows: list[str], seed: int, *, eager: bool) -> Iterator[dict[str, EngineProcess]]:
        """Engines of ``rows``, started together. A row may turn out to be missing."""
        report.say(f"starting {'eager ' if eager else ''}{', '.join(rows)}")
        engines = {}
        try:
            for row in rows:
                values = arguments(self.setting, row, self.folders, eager=eager)
                engines[row] = EngineProcess(values, self.threads, seed=seed, wait=False)
            for row in rows:
                try:
                    engines[row].wait()
                except EngineError as error:
                    if not ROWS[row].may_be_missing:
                        raise
                    self.missing[row] = str(error)
            yield {row: engine for row, engine in engines.items() if row not in self.missing}
        finally:
            for engine in engines.values():
                engine.close()

    def answer_eagerly(self, break_verification: bool) -> None:
        """Takes the answers to verify by, and checks that rows agree where they must and differ where they must."""
        seed = self.setting.seed + break_verification
        for rows in self.groups:
            with self.engines(rows, seed, eager=True) as engines:
                for row, engine in engines.items():
                    self.answers[row] = engine.choices(self.prompts, ANSWER, LOGPROBS)
        tolerance, inside, past = self.setting.tolerance, len(self.inside), len(self.inside + self.across)
        for row, answers in self.answers.items():
            memory = ROWS[row].memory
            if memory is not None and "full" in self.answers:
                agreement = compare(
                    self.answers["full"][:inside], answers[:inside], tolerance, names("full", row, self.inside)
                )
                self.verified[f"{row}, full inside the window"] = agreement.describe()
            if memory not in (None, NO_MEMORY) and "window" in self.answers and self.past:
                apart = largest_difference(self.answers["window"][past:], answers[past:])
                if not apart > tolerance:
                    raise Mismatch(f"past the window {row} differs from window by {apart:.2g}: the memory does nothing")
                self.verified[f"{row}, window past it"] = f"log-probabilities differ by {apart:.2g}"

    def measure(self, deadline: float) -> dict[str, dict[str, Any]]:
        """Verifies, then measures; returns figures by context and row."""
        results: dict[str, dict[str, Any]] = {str(context): {} for context in self.setting.contexts}
        groups = self.groups
        for number, rows in enumerate(groups):
            until = part(deadline, 1 / (len(groups) - number))
            with self.engines(rows, self.setting.seed, eager=False) as engines:
                for row, engine in engines.items():
                    self.info[row] = engine.info
                    self.verify(row, engine)
                for index, context in enumerate(self.setting.contexts):
                    share = context / sum(self.setting.contexts[index:])
                    results[str(context)] |= self.climb(engines, context, part(until, share))
        return results

    def verify(self, row: str, engine: EngineProcess) -> None:
        """Compares the engine's answers with those of the eager one."""
        answers = engine.choices(self.prompts, ANSWER, LOGPROBS)
        agreement = compare(self.answers[row], answers, self.setting.tolerance, names("eager", row, self.prompts))
        self.verified[f"{row}, eager"] = agreement.describe()
        report.say(f"{row} and eager: {agreement.describe()}")

    def climb(self, engines: dict[str, EngineProcess], context: int, deadline: float) -> dict[str, Any]:
        """One context: the rows take turns, the first one alternating."""
        setting = self.setting
        rungs = Rungs(
            context,
            context <= setting.capacity,
            tuple(batch for batch in setting.batches if batch <= setting.max_batch),
            setting.max_batch,
            setting.steps,
            setting.repetitions,
            setting.budget,
            max(engine.info["block_size"] for engine in engines.values()),
            setting.shape["vocab"],
        )
        if rungs.prompt_tokens < 1:
            sys.exit(f"--contexts {context}: too short, answers alone take {rungs.answer_tokens} tokens")
        ladders = {
            row: Ladder(engine, rungs, keeps_all=setting.keeps_all(row, context)) for row, engine in engines.items()
        }
        for ladder in ladders.values():
            ladder.warm_up()
        for turn in range(setting.repetitions):
            for ladder in in_turn(list(ladders.values()), turn):
                ladder.prefill(turn)
        for batch in rungs.batches:
            for ladder in ladders.values():
                ladder.grow(batch, deadline)
            self.decode([ladder for ladder in ladders.values() if ladder.batch == batch])
            report.say(f"{context} tokens: " + ", ".join(f"{row} {ladder.batch}" for row, ladder in ladders.items()))
        for number, ladder in enumerate(ladders.values()):
            ladder.fill(part(deadline, 1 / (len(ladders) - number)))
        self.decode(list(ladders.values()))
        for ladder in ladders.values():
            ladder.engine.release()
        report.say(f"{context} tokens, full: " + ", ".join(f"{row} {ladder.batch}" for row, ladder in ladders.items()))
        return {row: ladder.result() for row, ladder in ladders.items()}

    def decode(self, ladders: list[Ladder]) -> None:
        """Measures decode steps, by turns."""
        for turn in range(self.setting.repetitions):
            for ladder in in_turn(ladders, turn):
                ladder.decode()


def prompts_to_verify(setting: Setting) -> list[list[list[int]]]:
    """Prompts whose answers stay inside the window, cross its end, and lie past it, as the longest context allows."""
    longest = min(500, setting.capacity, setting.contexts[0]) - ANSWER
    far = setting.capacity * 9 // 8
    lengths = [longest // part for part in (8, 5, 3, 2, 1)], [setting.capacity - ANSWER // 2], [far, far + 7]
    vocab = setting.shape["vocab"]
    return [
        [prompt(length, vocab=vocab) for length in some if length + ANSWER <= setting.contexts[0]] for some in lengths
    ]


def names(one: str, other: str, prompts: list[list[int]]) -> list[str]:
    """What answers to these prompts are called when ``one`` and ``other`` differ."""
    return [f"{one} and {other} after {len(tokens)} tokens" for tokens in prompts]


def in_turn(ladders: list[Ladder], turn: int) -> list[Ladder]:
    """The ladders in order, in every other turn backwards."""
    return ladders[::-1] if turn % 2 else ladders


def part(deadline: float, share: float) -> float:
    """The end of the next ``share`` of the time until ``deadline``."""
    now = time.monotonic()
    return deadline if math.isinf(deadline) else now + share * (deadline - now)


if __name__ == "__main__":
    main()
