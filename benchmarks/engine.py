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
import dataclasses
import math
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

import models
import report
from agreement import compare, largest_difference
from engine_report import judge, paragraphs
from engines import Choice, EngineError, EngineProcess, started
from inputs import prompt
from ladder import Ladder
from models import AHN, FULL, ROWS, SHAPES, WINDOW, Comparison, arguments, write_models
from report import Mismatch
from vllm_ahn.config import NO_MEMORY

ANSWER, LOGPROBS = 8, 20
"""Tokens of an answer that is compared, and how many of the most likely ones at each."""

REAL: dict[str, Any] = {
    "model": "3B",
    "dtype": "bfloat16",
    "rows": (FULL, "full-fp8", WINDOW, AHN),
    "contexts": (131072, 32768),
} | {"window": 32640, "sinks": 128, "max_batch": 64, "sequences": 4, "budget": 8192, "steps": 16, "repetitions": 3}
TINY: dict[str, Any] = (
    REAL
    | {"model": "tiny", "dtype": "float32", "contexts": (384, 128), "window": 96, "sinks": 32, "max_batch": 12}
    | {"sequences": 2, "budget": 64, "steps": 2, "repetitions": 2, "engine": {"block_size": 32}}
)
TOLERANCE = {"bfloat16": 0.5, "float32": 1e-3}
"""Nats. In such models of 36 layers, rounding to bfloat16 moves the log-probabilities of the 20 best tokens by 0.04 in
the mean and by up to 0.2; those of other tokens than the right ones are several off."""


def main() -> None:
    args = parser().parse_args()
    setting = read_setting(args)
    began = time.monotonic()
    try:
        with tempfile.TemporaryDirectory(prefix="vllm-ahn-benchmark-") as folder:
            run = Run(setting, write_models(setting, Path(folder)), getattr(args, "threads", None))
            run.answer_eagerly(args.break_verification)
            contexts = run.measure(began + (args.time_budget or math.inf))
    except Mismatch as error:
        sys.exit(f"not verified: {error}")
    result: dict[str, Any] = {
        **report.head(began),
        "setting": dataclasses.asdict(setting),
        "engines": run.info,
        "verified": run.verified,
        "missing": run.missing,
        "contexts": contexts,
        "aims": judge(setting, contexts),
    }
    title = f"vLLM at long contexts, {setting.model} shape"
    report.write(args.output, result, title, paragraphs(setting, result))


def parser() -> argparse.ArgumentParser:
    """Return the options; those without a default take it from `REAL` or `TINY`."""
    result = models.parser(__doc__, "engine", *(name for name in models.OPTIONS if name != "rounds"))
    result.add_argument("--tiny", action="store_true", help="a tiny model, window and contexts, for a CPU")
    result.add_argument("--alone", action="store_true", help="one engine at a time, for models too large side by side")
    result.add_argument("--time-budget", type=float, metavar="S", help="seconds, the engines' start included")
    result.add_argument("--break-verification", action="store_true", help="other weights for eager engines: must fail")
    return result


def read_setting(args: argparse.Namespace) -> Comparison:
    """Return what the options say; end the program with a sentence where they cannot be met."""
    values = (TINY if args.tiny else REAL) | vars(args)
    unknown = [row for row in values["rows"] if row not in ROWS]
    if unknown:
        sys.exit(f"--rows has {unknown[0]!r}, expected some of {', '.join(ROWS)}")
    if not values["sequences"] and not torch.cuda.is_available():
        sys.exit("--sequences is 0, which takes the whole memory of a GPU, and there is none: expected at least 1")
    powers = tuple(2**n for n in range(int(math.log2(values["max_batch"])) + 1))
    defaults = {"layers": SHAPES[values["model"]]["layers"], "tolerance": TOLERANCE[values["dtype"]]}
    return Comparison.read(
        defaults | (TINY if args.tiny else REAL),
        args,
        batches=tuple(batch for batch in values.get("batches", powers) if batch <= values["max_batch"]),
        alone=args.alone or not values["sequences"],
    )


class Run:
    """All rows of one run, each in engines of its own: an eager one to verify by, then the one that is measured.

    ``missing`` are rows that vLLM does not have on this device, and what it says; ``answers`` are the eager engines'.
    """

    def __init__(self, setting: Comparison, folders: dict[str, Path], threads: int | None) -> None:
        self.setting, self.folders, self.threads = setting, folders, threads
        self.info: dict[str, dict[str, Any]] = {}
        self.missing: dict[str, str] = {}
        self.verified: dict[str, str] = {}
        self.inside, self.across, self.past = prompts_to_verify(setting)
        self.prompts = self.inside + self.across + self.past
        self.answers: dict[str, list[list[Choice]]] = {}

    @property
    def groups(self) -> list[list[str]]:
        """The rows whose engines live at the same time."""
        rows = [row for row in self.setting.rows if row not in self.missing]
        return [[row] for row in rows] if self.setting.alone else [rows]

    @contextlib.contextmanager
    def engines(self, rows: list[str], seed: int, *, eager: bool) -> Iterator[dict[str, EngineProcess]]:
        """Yield engines of ``rows``, started together. A row may turn out to be missing."""
        report.say(f"starting {'eager ' if eager else ''}{', '.join(rows)}")
        values = {row: arguments(self.setting, row, self.folders, eager=eager) for row in rows}
        with started(values, self.threads, seed) as engines:
            for row in rows:
                try:
                    engines[row].wait()
                except EngineError as error:
                    if not ROWS[row].may_be_missing:
                        raise
                    self.missing[row] = str(error)
            yield {row: engine for row, engine in engines.items() if row not in self.missing}

    def answer_eagerly(self, break_verification: bool) -> None:
        """Take the answers to verify by, and check that rows agree where they must and differ where they must."""
        for rows in self.groups:
            with self.engines(rows, self.setting.seed + break_verification, eager=True) as engines:
                for row, engine in engines.items():
                    self.answers[row] = engine.choices(self.prompts, ANSWER, LOGPROBS)
        inside, past = len(self.inside), len(self.inside + self.across)
        for row, answers in self.answers.items():
            memory = ROWS[row].memory
            if memory is not None and FULL in self.answers:
                agreement = self.compare(FULL, row, self.answers[FULL][:inside], answers[:inside])
                self.verified[f"{row}, full inside the window"] = agreement
            if memory not in (None, NO_MEMORY) and WINDOW in self.answers and self.past:
                apart = largest_difference(self.answers[WINDOW][past:], answers[past:])
                if not apart > self.setting.tolerance:
                    raise Mismatch(f"past the window {row} differs from window by {apart:.2g}: the memory does nothing")
                self.verified[f"{row}, window past it"] = f"log-probabilities differ by {apart:.2g}"

    def compare(self, one: str, other: str, expected: list[list[Choice]], got: list[list[Choice]]) -> str:
        """Compare answers to the first prompts; return what was found."""
        names = [f"{one} and {other} after {len(tokens)} tokens" for tokens in self.prompts[: len(got)]]
        return str(compare(expected, got, self.setting.tolerance, names))

    def measure(self, deadline: float) -> dict[str, dict[str, Any]]:
        """Verify, then measure; return figures by context and row."""
        contexts = self.setting.contexts
        results: dict[str, dict[str, Any]] = {str(context): {} for context in contexts}
        groups = self.groups
        for number, rows in enumerate(groups):
            until = part(deadline, 1 / (len(groups) - number))
            with self.engines(rows, self.setting.seed, eager=False) as engines:
                for row, engine in engines.items():
                    self.info[row] = engine.info
                    answers = engine.choices(self.prompts, ANSWER, LOGPROBS)
                    self.verified[f"{row}, eager"] = self.compare("eager", row, self.answers[row], answers)
                    report.say(f"{row} and eager: {self.verified[f'{row}, eager']}")
                for index, context in enumerate(contexts):
                    share = context / sum(contexts[index:])
                    results[str(context)] |= self.climb(engines, context, part(until, share))
        return results

    def climb(self, engines: dict[str, EngineProcess], context: int, deadline: float) -> dict[str, Any]:
        """Measure one context."""
        block_size = max(engine.info["block_size"] for engine in engines.values())
        rows = {row: Ladder(self.setting, context, block_size, row, engine) for row, engine in engines.items()}
        ladders = list(rows.values())
        if ladders[0].prompt_tokens < 1:
            sys.exit(f"--contexts {context}: too short, answers alone take {ladders[0].answer_tokens} tokens")
        for ladder in ladders:
            ladder.warm_up()
        self.by_turns(ladders, Ladder.prefill)
        for batch in self.setting.batches:
            for ladder in ladders:
                ladder.grow(batch, deadline)
            self.by_turns([ladder for ladder in ladders if ladder.batch == batch], Ladder.decode)
            report.say(f"{context} tokens: " + ", ".join(f"{row} {ladder.batch}" for row, ladder in rows.items()))
        for number, ladder in enumerate(ladders):
            ladder.fill(part(deadline, 1 / (len(ladders) - number)))
        self.by_turns(ladders, Ladder.decode)
        for ladder in ladders:
            ladder.engine.release()
        report.say(f"{context} tokens, full: " + ", ".join(f"{row} {ladder.batch}" for row, ladder in rows.items()))
        return {row: ladder.result() for row, ladder in rows.items()}

    def by_turns(self, ladders: list[Ladder], measure: Callable[[Ladder, int], None]) -> None:
        """Measure all, over and over, in every other turn backwards."""
        for turn in range(self.setting.repetitions):
            for ladder in ladders[::-1] if turn % 2 else ladders:
                measure(ladder, turn)


def prompts_to_verify(setting: Comparison) -> list[list[list[int]]]:
    """Return prompts whose answers stay inside the window, cross its end, and lie past it, as contexts allow."""
    longest = min(500, setting.capacity, setting.contexts[0]) - ANSWER
    far = setting.capacity * 9 // 8
    lengths = [longest // part for part in (8, 5, 3, 2, 1)], [setting.capacity - ANSWER // 2], [far, far + 7]
    vocab, most = setting.shape["vocab"], setting.contexts[0] - ANSWER
    return [[prompt(length, vocab=vocab) for length in some if length <= most] for some in lengths]


def part(deadline: float, share: float) -> float:
    """Return the end of the next ``share`` of the time until ``deadline``."""
    now = time.monotonic()
    return deadline if math.isinf(deadline) else now + share * (deadline - now)


if __name__ == "__main__":
    main()
