"""The documents of a task: a question about a long context, its right answers, and how the prompt is made."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from vllm_ahn.tools.evaluate.data import DataFile, data_folder, read_records
from vllm_ahn.tools.evaluate.prompts import Cut, PromptSettings, split_template


@dataclasses.dataclass(frozen=True)
class QuestionSet:
    """One set of a benchmark, as it is asked."""

    file: DataFile
    template: str
    """Of the prompt, with one ``{context}`` and after it one ``{input}``, the question."""

    max_prompt_tokens: int
    cut: Cut
    chat_template: bool = False
    answers: str = "answers"
    """The field that holds the right answers, a list of texts."""


def load_documents(
    questions: QuestionSet,
    metadata: Mapping[str, Any],
    more: Callable[[Mapping[str, Any]], Mapping[str, Any]],
) -> dict[str, Any]:
    """The documents of a set, as the split ``test`` of what lm-eval's ``custom_dataset`` returns.

    Args:
        metadata: what lm-eval passes: `PromptSettings.from_metadata`, `data_folder`.
        more: the fields of a document, besides the prompt's and ``answers``, from its record.

    Raises:
        AHNError: the data set or something in the metadata is not as expected.
    """
    from datasets import Dataset

    settings = PromptSettings.from_metadata(
        metadata, max_tokens=questions.max_prompt_tokens, cut=questions.cut, chat_template=questions.chat_template
    )
    records = read_records(questions.file, ("input", "context", questions.answers), data_folder(metadata))
    documents = []
    for record in records:
        before, after = split_template(questions.template, record["input"])
        documents.append(
            {
                "before": before,
                "context": record["context"],
                "after": after,
                "prompt_settings": dataclasses.asdict(settings),
                "answers": record[questions.answers],
                **more(record),
            }
        )
    return {"test": Dataset.from_list(documents)}


def best_score(score: Callable[[str, str], float], prediction: str, answers: Sequence[str]) -> float:
    """The score of the answer that fits best."""
    return max(score(prediction, answer) for answer in answers)
