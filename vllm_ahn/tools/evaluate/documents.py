"""Question sets: where a set lies, how its prompts are made, how long answers may be, and how they are scored."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from vllm_ahn.errors import AHNError
from vllm_ahn.tools.evaluate.data import DataFile, read_records
from vllm_ahn.tools.evaluate.prompts import Cut, PromptSettings


@dataclasses.dataclass(frozen=True, kw_only=True)
class QuestionSet:
    """One set of a benchmark."""

    group: str
    """The lm-eval group that the set is in."""

    file: DataFile
    template: str
    """The prompt, with one ``{context}`` and after it one ``{input}``, the question."""

    score: Callable[..., float]
    """Of a prediction and a right answer (for LV-Eval also the keywords), 0 to 1."""

    max_prompt_tokens: int
    max_answer_tokens: int
    cut: Cut = "left"
    chat_template: bool = False
    answers: str = "answers"
    """The field that holds the right answers, a list of texts."""


def load_documents(sets: Mapping[str, QuestionSet], subset: str, metadata: Mapping[str, Any]) -> dict[str, Any]:
    """Load the documents of `subset`, one of `sets`, as the split ``test``; for lm-eval's ``custom_dataset``.

    Args:
        metadata: from lm-eval: ``data_folder`` (`data.data_root`) and what `PromptSettings.from_metadata` reads.

    Raises:
        AHNError: the subset is unknown, or the data set or the metadata is not as expected.
    """
    from datasets import Dataset

    if subset not in sets:
        raise AHNError(f"dataset_kwargs: subset is {subset!r}, expected one of {', '.join(sets)}")
    questions = sets[subset]
    folder = metadata.get("data_folder")
    if folder is not None and not isinstance(folder, str):
        raise AHNError(f"metadata: data_folder is {folder!r}, expected the path of a folder")
    settings = PromptSettings.from_metadata(
        metadata, max_tokens=questions.max_prompt_tokens, cut=questions.cut, chat_template=questions.chat_template
    )
    before, after = questions.template.split("{context}")
    documents = []
    for record in read_records(questions.file, ("input", "context", questions.answers), folder):
        keywords = record.get("answer_keywords") or ""  # in LV-Eval, and there not in every set
        documents.append(
            {
                "subset": subset,
                "before": before,
                "context": record["context"],
                "after": after.replace("{input}", record["input"]),
                "prompt_settings": dataclasses.asdict(settings),
                "answers": record[questions.answers],
                "keywords": keywords if isinstance(keywords, str) else " ".join(keywords),
            }
        )
    return {"test": Dataset.from_list(documents)}


def best_score(questions: QuestionSet, prediction: str, doc: Mapping[str, Any]) -> dict[str, float]:
    """Return ``score``, 0 to 1, against the right answer that fits best; for lm-eval's ``process_results``."""
    return {"score": max(questions.score(prediction, answer) for answer in doc["answers"])}
