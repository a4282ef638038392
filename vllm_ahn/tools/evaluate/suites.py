"""The named suites: what they ask, how they are run, and what the paper (arXiv 2510.07318 v2) reports for them."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

from vllm_ahn.config import DEFAULT_SINKS, DEFAULT_WINDOW
from vllm_ahn.errors import AHNError
from vllm_ahn.tools.evaluate.benchmarks import SETS
from vllm_ahn.tools.evaluate.data import DataFile
from vllm_ahn.tools.evaluate.tasks import NIAH_TASKS

MODELS = ("3B", "7B", "14B")
"""The sizes of Qwen2.5-Instruct that the paper reports."""

METHODS = ("full", "window", "Mamba2", "DN", "GDN")
"""The rows of the paper's tables: full attention (without YaRN), sinks and window alone, and the three memories."""

Figures = Mapping[tuple[str, str, str | None], float]
"""Per cent, by model (`MODELS`), method (`METHODS`) and task; the task None is the average."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Suite:
    """A named set of tasks, run as in the paper."""

    name: str
    """What ``vllm-ahn eval`` calls it."""

    title: str
    """What a table calls it."""

    kind: Literal["lm_eval", "perplexity"]
    """Tasks of lm-eval, or one long text."""

    tasks: tuple[str, ...] = ()
    """lm-eval's tasks, in the order of a table's columns."""

    group: str = ""
    """The lm-eval group of exactly `tasks`. It sets RULER's length and makes the average: their plain mean."""

    files: tuple[DataFile, ...] = ()
    """What a local data folder must hold."""

    max_model_len: int
    """Tokens, prompt and answer, that the engine must take; with fewer, lm-eval would cut the prompts again."""

    max_prompt_tokens: int
    max_answer_tokens: int = 0
    window: int = DEFAULT_WINDOW
    sinks: int = DEFAULT_SINKS
    paper: Figures = dataclasses.field(default_factory=dict, hash=False)
    """All the figures that the paper has."""

    note: str = ""
    """What a reader of the paper's row should know."""


def _benchmark(name: str, group: str, **more: Any) -> Suite:
    sets = [questions for questions in SETS.values() if questions.group == group]
    return Suite(
        name=name,
        kind="lm_eval",
        tasks=tuple(questions.task for questions in sets),
        group=group,
        files=tuple(questions.file for questions in sets),
        max_prompt_tokens=max(questions.max_prompt_tokens for questions in sets),
        max_answer_tokens=max(questions.max_answer_tokens for questions in sets),
        **more,
    )


def _averages(*rows: tuple[float, ...]) -> Figures:
    """Name the figures of a table: a row for each of `MODELS`. Rows of four figures lack full attention."""
    return {
        (model, method, None): score
        for model, scores in zip(MODELS, rows, strict=True)
        for method, score in zip(METHODS[-len(scores) :], scores, strict=True)
    }


_WITHOUT_YARN = (
    "The paper ran full attention without YaRN, at several times the 32,768 tokens the model was trained on."
)

_SUITES = (
    _benchmark(
        "lveval-128k",
        "ahn_lveval_128k",
        title="LV-Eval 128k",
        max_model_len=262_144,
        paper=_averages((4.41, 4.59, 5.13, 5.68, 5.88), (3.62, 5.34, 6.21, 6.82, 6.54), (4.99, 5.69, 6.43, 6.50, 6.51)),
        note=_WITHOUT_YARN,
    ),
    _benchmark(
        "infinitebench",
        "ahn_infinitebench",
        title="InfiniteBench En.QA, Zh.QA",
        max_model_len=131_072,
        paper=_averages(
            (9.52, 10.47, 12.44, 13.51, 13.24), (13.50, 13.16, 14.21, 16.48, 16.93), (12.21, 12.54, 15.21, 17.48, 16.52)
        ),
        note=f"ROUGE-L, not the benchmark's own F1. {_WITHOUT_YARN}",
    ),
    _benchmark(
        "longbench",
        "ahn_longbench",
        title="LongBench, six sets",
        max_model_len=32_768,
        window=8064,
        paper=_averages((34.31, 34.90, 35.89, 35.55), (38.52, 40.56, 41.04, 40.59), (40.65, 41.34, 41.83, 41.90)),
    ),
    Suite(
        name="ruler-128k",
        title="RULER NIAH 128k",
        kind="lm_eval",
        tasks=NIAH_TASKS,
        group="ahn_ruler_niah_128k",
        # RULER's 131,072 tokens include the answer. lm-eval adds the answer's first words to the prompt, up to ten
        # tokens too many, and then cuts as many of the instruction. More would need another YaRN factor than 4.
        max_model_len=131_072,
        max_prompt_tokens=131_072 - 128,
        max_answer_tokens=128,
        paper={
            ("7B", name, "niah_single_1"): score for name, score in (("full", 98.6), ("window", 26.8), ("GDN", 26.8))
        },
        note="Exact recall of what has left the window: a memory of fixed size does no better than the window.",
    ),
    Suite(
        name="pg19",
        title="PG19",
        kind="perplexity",
        max_model_len=65_536,
        max_prompt_tokens=65_534,
        note="The paper shows curves over a book of 57,000 tokens, flat with AHN, and no figures.",
    ),
)
SUITES = {suite.name: suite for suite in _SUITES}


def find_suite(name: str) -> Suite:
    """Return the suite `name`. Raises `AHNError` that lists the known ones."""
    if name not in SUITES:
        raise AHNError(f"suite is {name!r}, expected one of {', '.join(SUITES)}")
    return SUITES[name]
