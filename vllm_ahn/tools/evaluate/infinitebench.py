"""InfiniteBench (arXiv 2402.13718): questions about whole novels, English and Chinese, scored as the AHN paper did.

The templates are the benchmark's, for models that continue a text. The benchmark itself cuts in the middle and scores
by F1; the paper cuts the start of the book, to 128,000 tokens, and scores by ROUGE-L (`scoring.rouge_l`; Chinese first
cut into words), here against the answer that fits best. Prompts are plain text unless the metadata says
``chat_template``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from vllm_ahn.errors import AHNError
from vllm_ahn.tools.evaluate import scoring
from vllm_ahn.tools.evaluate.data import DataFile
from vllm_ahn.tools.evaluate.documents import QuestionSet, best_score, load_documents

REPOSITORY = "xinrongzhang2022/InfiniteBench"
MAX_PROMPT_TOKENS = 128_000


@dataclasses.dataclass(frozen=True)
class InfiniteBenchSet:
    """One language."""

    template: str
    score: Callable[[str, str], float]
    """Of a prediction and an answer, 0 to 1."""


SETS = {
    "longbook_qa_eng": InfiniteBenchSet(
        "Read the book and answer the question. Be very concise in your answer.\n\n{context}\n\n"
        "Question: {input}\nAnswer:",
        scoring.rouge_l,
    ),
    "longbook_qa_chn": InfiniteBenchSet(
        "阅读以下书籍然后回答问题。\n\n{context}\n\n问题：{input}\n答案：", scoring.chinese_rouge_l
    ),
}


def data_file(subset: str) -> DataFile:
    """Where `subset`, one of `SETS`, lies."""
    return DataFile(REPOSITORY, f"{subset}.jsonl")


def load(subset: str, **metadata: Any) -> dict[str, Any]:
    """The documents of `subset`, one of `SETS`, as the split ``test``; for lm-eval's ``custom_dataset``. Raises
    `AHNError`."""
    if subset not in SETS:
        raise AHNError(f"InfiniteBench: subset is {subset!r}, expected one of {', '.join(SETS)}")
    questions = QuestionSet(
        data_file(subset),
        SETS[subset].template,
        max_prompt_tokens=MAX_PROMPT_TOKENS,
        cut="left",
        answers="answer",
    )
    return load_documents(questions, metadata, lambda record: {"subset": subset})


def process_results(doc: Mapping[str, Any], results: Sequence[str]) -> dict[str, float]:
    """``score``, 0 to 1, of what the model answered; for lm-eval."""
    return {"score": best_score(SETS[doc["subset"]].score, results[0], doc["answers"])}
