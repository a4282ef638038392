"""The named suites: which tasks, how they are run, how their average is formed, and what the paper reports.

Plain data, standard library only. The paper is arXiv 2510.07318 v2; its figures are in per cent.
"""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Mapping
from typing import Literal

from vllm_ahn.config import DEFAULT_SINKS, DEFAULT_WINDOW
from vllm_ahn.errors import AHNError

MODELS = ("3B", "7B", "14B")
"""The sizes of Qwen2.5-Instruct that the paper reports, as in its tables."""

METHODS = ("full", "window", "Mamba2", "DN", "GDN")
"""The rows of the paper's tables, in their order: full attention (without YaRN), sinks and window without a memory,
and the three memories."""

LVEVAL_SETS = (
    "cmrc_mixup",
    "dureader_mixup",
    "factrecall_en",
    "factrecall_zh",
    "hotpotwikiqa_mixup",
    "lic_mixup",
    "loogle_CR_mixup",
    "loogle_MIR_mixup",
    "loogle_SD_mixup",
    "multifieldqa_en_mixup",
    "multifieldqa_zh_mixup",
)
LVEVAL_LENGTHS = ("16k", "32k", "64k", "128k", "256k")
LONGBENCH_SETS = ("dureader", "hotpotqa", "musique", "narrativeqa", "qmsum", "triviaqa")
NIAH_TASKS = (
    "niah_single_1",
    "niah_single_2",
    "niah_single_3",
    "niah_multikey_1",
    "niah_multikey_2",
    "niah_multikey_3",
    "niah_multiquery",
    "niah_multivalue",
)


@dataclasses.dataclass(frozen=True)
class PaperFigure:
    """One figure that the paper reports."""

    model: str
    """One of `MODELS`."""

    method: str
    """One of `METHODS`."""

    score: float
    """Per cent."""

    task: str | None = None
    """The task it is of; None: the average of the suite."""


@dataclasses.dataclass(frozen=True)
class Suite:
    """A named set of tasks, run and averaged as the paper did."""

    name: str
    """What ``vllm-ahn eval`` calls it."""

    title: str
    """What a table calls it."""

    kind: Literal["lm_eval", "perplexity"]
    """``lm_eval``: `tasks` are tasks of lm-eval. ``perplexity``: one long text, no task of lm-eval."""

    tasks: tuple[str, ...]
    """Names for lm-eval, in the order of a table's columns. Its own tasks aside, they are in
    ``vllm_ahn.tools.evaluate.TASKS``."""

    group: str | None
    """The group of lm-eval that holds exactly `tasks`, and sets what they are run with. Ask lm-eval for it, not
    for `tasks`: RULER's tasks get their length from it."""

    metric: str
    """The key of a task's score in lm-eval's results, without the filter: ``results[task][f"{metric},none"]``,
    0 to 1. For ``perplexity`` the name of what is measured."""

    max_model_len: int
    """Tokens, prompt and answer, that the engine must take; with less lm-eval cuts prompts a second time."""

    max_prompt_tokens: int
    """The longest prompt, tokens: where the paper cut them."""

    max_answer_tokens: int
    """The longest answer of any task, tokens; 0 where nothing is asked."""

    window: int
    """W of the paper's run, tokens, without the sinks."""

    sinks: int
    """S of the paper's run, tokens."""

    paper: tuple[PaperFigure, ...] = ()
    """All the figures that the paper has; a row or task that is not here it does not report."""

    note: str = ""
    """What a reader of the paper's row should know."""

    def average(self, scores: Mapping[str, float]) -> float:
        """The suite's score in per cent: 100 times the plain mean over `tasks`, however many samples each has.

        Args:
            scores: lm-eval's value of `metric`, 0 to 1, for each task.

        Raises:
            AHNError: a task has no score; an average of fewer is another figure.
        """
        missing = [task for task in self.tasks if task not in scores]
        if missing or not self.tasks:
            raise AHNError(f"{self.name}: no score for {', '.join(missing) or 'any task'}, so there is no average")
        return 100 * statistics.fmean(scores[task] for task in self.tasks)

    def paper_score(self, model: str, method: str, task: str | None = None) -> float | None:
        """What the paper reports in per cent, of one task or (None) of the average; None if it does not."""
        found = [f.score for f in self.paper if (f.model, f.method, f.task) == (model, method, task)]
        return found[0] if found else None


def _averages(rows: Mapping[str, Mapping[str, float]]) -> tuple[PaperFigure, ...]:
    return tuple(PaperFigure(model, method, score) for model, row in rows.items() for method, score in row.items())


def _all_methods(*scores: float) -> dict[str, float]:
    return dict(zip(METHODS, scores, strict=True))


def _without_full(*scores: float) -> dict[str, float]:
    return dict(zip(METHODS[1:], scores, strict=True))


_WITHOUT_YARN = (
    "The paper ran full attention without YaRN, at several times the 32,768 tokens the model was trained on."
)

SUITES: dict[str, Suite] = {
    suite.name: suite
    for suite in (
        Suite(
            name="lveval-128k",
            title="LV-Eval 128k",
            kind="lm_eval",
            tasks=tuple(f"ahn_lveval_{name}_128k" for name in LVEVAL_SETS),
            group="ahn_lveval_128k",
            metric="score",
            max_model_len=262_144,
            max_prompt_tokens=256_000,
            max_answer_tokens=64,
            window=DEFAULT_WINDOW,
            sinks=DEFAULT_SINKS,
            paper=_averages(
                {
                    "3B": _all_methods(4.41, 4.59, 5.13, 5.68, 5.88),
                    "7B": _all_methods(3.62, 5.34, 6.21, 6.82, 6.54),
                    "14B": _all_methods(4.99, 5.69, 6.43, 6.50, 6.51),
                }
            ),
            note=_WITHOUT_YARN,
        ),
        Suite(
            name="infinitebench",
            title="InfiniteBench En.QA, Zh.QA",
            kind="lm_eval",
            tasks=("ahn_infinitebench_longbook_qa_eng", "ahn_infinitebench_longbook_qa_chn"),
            group="ahn_infinitebench",
            metric="score",
            max_model_len=131_072,
            max_prompt_tokens=128_000,
            max_answer_tokens=256,
            window=DEFAULT_WINDOW,
            sinks=DEFAULT_SINKS,
            paper=_averages(
                {
                    "3B": _all_methods(9.52, 10.47, 12.44, 13.51, 13.24),
                    "7B": _all_methods(13.50, 13.16, 14.21, 16.48, 16.93),
                    "14B": _all_methods(12.21, 12.54, 15.21, 17.48, 16.52),
                }
            ),
            note=f"ROUGE-L, not the benchmark's own F1. {_WITHOUT_YARN}",
        ),
        Suite(
            name="longbench",
            title="LongBench, six sets",
            kind="lm_eval",
            tasks=tuple(f"ahn_longbench_{name}" for name in LONGBENCH_SETS),
            group="ahn_longbench",
            metric="score",
            max_model_len=32_768,
            max_prompt_tokens=32_000,
            max_answer_tokens=512,
            window=8064,
            sinks=DEFAULT_SINKS,
            paper=_averages(
                {
                    "3B": _without_full(34.31, 34.90, 35.89, 35.55),
                    "7B": _without_full(38.52, 40.56, 41.04, 40.59),
                    "14B": _without_full(40.65, 41.34, 41.83, 41.90),
                }
            ),
        ),
        Suite(
            name="ruler-128k",
            title="RULER NIAH 128k",
            kind="lm_eval",
            tasks=NIAH_TASKS,
            group="ahn_ruler_niah_128k",
            metric="131072",
            # RULER's 131,072 tokens hold the answer. lm-eval adds the first words of it, which may be ten too many: it
            # then cuts as many of the instruction. More than this would take another YaRN factor than 4.
            max_model_len=131_072,
            max_prompt_tokens=131_072 - 128,
            max_answer_tokens=128,
            window=DEFAULT_WINDOW,
            sinks=DEFAULT_SINKS,
            paper=(
                PaperFigure("7B", "full", 98.6, "niah_single_1"),
                PaperFigure("7B", "window", 26.8, "niah_single_1"),
                PaperFigure("7B", "GDN", 26.8, "niah_single_1"),
            ),
            note="Exact recall of what has left the window: a memory of fixed size does no better than the window.",
        ),
        Suite(
            name="pg19",
            title="PG19",
            kind="perplexity",
            tasks=(),
            group=None,
            metric="perplexity",
            max_model_len=65_536,
            max_prompt_tokens=65_534,
            max_answer_tokens=0,
            window=DEFAULT_WINDOW,
            sinks=DEFAULT_SINKS,
            note="The paper shows curves over a book of 57,000 tokens, flat with AHN, and no figures.",
        ),
    )
}
"""The suites by name."""


def find_suite(name: str) -> Suite:
    """The suite `name`; raises `AHNError` that lists the known ones."""
    if name not in SUITES:
        raise AHNError(f"suite is {name!r}, expected one of {', '.join(SUITES)}")
    return SUITES[name]
