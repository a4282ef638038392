"""LongBench (arXiv 2308.14508): the six sets that the AHN paper reports, with its truncation.

Templates and rules of scoring are the benchmark's own definition (``asconcisely`` included). The benchmark cuts in the
middle; the paper cuts the start of the context, to 32,000 tokens. All but triviaqa, which shows examples to continue,
are asked in the model's chat template. An answer is scored against the right answer that fits best.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from vllm_ahn.errors import AHNError
from vllm_ahn.tools.evaluate import scoring
from vllm_ahn.tools.evaluate.data import DataFile
from vllm_ahn.tools.evaluate.documents import QuestionSet, best_score, load_documents

REPOSITORY = "THUDM/LongBench"
ARCHIVE = "data.zip"
MAX_PROMPT_TOKENS = 32_000

_ONLY_ANSWER = (
    "Answer the question based on the given {passages}. Only give me the answer and do not output any other words."
)
_PASSAGES = _ONLY_ANSWER.format(passages="passages")
_CONCISELY = "asconcisely as you can, using a single phrase if possible. Do not provide any explanation."
_MULTI_DOCUMENT = (
    f"{_PASSAGES}\n\nThe following are given passages.\n{{context}}\n\n{_PASSAGES}\n\nQuestion: {{input}}\nAnswer:"
)


def question_f1(prediction: str, answer: str) -> float:
    """F1 over English words."""
    return scoring.f1(scoring.english_words(prediction), scoring.english_words(answer))


def first_line_f1(prediction: str, answer: str) -> float:
    """`question_f1` of the first line that is not empty: after it a model goes on with the next example."""
    return question_f1(prediction.lstrip("\n").split("\n")[0], answer)


@dataclasses.dataclass(frozen=True)
class LongBenchSet:
    """One of the sets."""

    template: str
    score: Callable[[str, str], float]
    """Of a prediction and an answer, 0 to 1."""

    chat_template: bool = True


SETS = {
    "dureader": LongBenchSet(
        "请基于给定的文章回答下述问题。\n\n文章：{context}\n\n请基于上述文章回答下面的问题。\n\n问题：{input}\n回答：",
        scoring.chinese_rouge_l,
    ),
    "hotpotqa": LongBenchSet(_MULTI_DOCUMENT, question_f1),
    "musique": LongBenchSet(_MULTI_DOCUMENT, question_f1),
    "narrativeqa": LongBenchSet(
        "You are given a story, which can be either a novel or a movie script, and a question. "
        f"Answer the question {_CONCISELY}\n\nStory: {{context}}\n\n"
        f"Now, answer the question based on the story {_CONCISELY}\n\nQuestion: {{input}}\n\nAnswer:",
        question_f1,
    ),
    "qmsum": LongBenchSet(
        "You are given a meeting transcript and a query containing a question or instruction. "
        "Answer the query in one or more sentences.\n\nTranscript:\n{context}\n\n"
        "Now, answer the query based on the above meeting transcript in one or more sentences.\n\n"
        "Query: {input}\nAnswer:",
        scoring.rouge_l,
    ),
    "triviaqa": LongBenchSet(
        f"{_ONLY_ANSWER.format(passages='passage')} The following are some examples.\n\n{{context}}\n\n{{input}}",
        first_line_f1,
        chat_template=False,
    ),
}


def data_file(subset: str) -> DataFile:
    """Where `subset`, one of `SETS`, lies."""
    return DataFile(REPOSITORY, f"data/{subset}.jsonl", ARCHIVE)


def load(subset: str, **metadata: Any) -> dict[str, Any]:
    """The documents of `subset`, one of `SETS`, as the split ``test``; for lm-eval's ``custom_dataset``. Raises
    `AHNError`."""
    if subset not in SETS:
        raise AHNError(f"LongBench: subset is {subset!r}, expected one of {', '.join(SETS)}")
    questions = QuestionSet(
        data_file(subset),
        SETS[subset].template,
        max_prompt_tokens=MAX_PROMPT_TOKENS,
        cut="left",
        chat_template=SETS[subset].chat_template,
    )
    return load_documents(questions, metadata, lambda record: {"subset": subset})


def process_results(doc: Mapping[str, Any], results: Sequence[str]) -> dict[str, float]:
    """``score``, 0 to 1, of what the model answered; for lm-eval."""
    return {"score": best_score(SETS[doc["subset"]].score, results[0], doc["answers"])}
