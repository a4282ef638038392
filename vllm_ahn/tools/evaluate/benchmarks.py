"""The question sets of ``benchmarks.toml``: their documents and scores, for lm-eval's tasks."""

from __future__ import annotations

import dataclasses
import tomllib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from vllm_ahn.errors import AHNError
from vllm_ahn.tools.evaluate import scoring
from vllm_ahn.tools.evaluate.data import DataFile, read_records
from vllm_ahn.tools.evaluate.prompts import Cut, PromptSettings


@dataclasses.dataclass(frozen=True, kw_only=True)
class QuestionSet:
    """One set of a benchmark: a task of lm-eval."""

    task: str
    group: str
    """The lm-eval group of the benchmark's sets, of one length each."""

    file: DataFile
    template: str
    """The prompt, with one ``{context}`` and after it one ``{input}``, the question."""

    rule: Callable[[str, str, str], float]
    """Scores a prediction, given a right answer and its keywords, 0 to 1."""

    max_prompt_tokens: int
    max_answer_tokens: int
    cut: Cut = "left"
    chat_template: bool = False
    answers: str = "answers"
    """The field that holds the right answers, a list of texts."""

    first_answer: bool = False
    """The first right answer counts; otherwise the one that fits best."""


def _read_sets() -> Iterator[QuestionSet]:
    tables = tomllib.loads(Path(__file__).with_name("benchmarks.toml").read_text(encoding="utf-8"))
    templates = tables.pop("templates")
    for benchmark, common in tables.items():
        repository, path, archive = (common.pop(name, "") for name in ("repository", "path", "archive"))
        lengths = common.pop("lengths", {"": common.pop("max_prompt_tokens", 0)})
        sets = common.pop("sets")
        for length, max_prompt_tokens in lengths.items():
            for name, own in sets.items():
                suffix = f"_{length}" if length else ""
                names = {"set": name, "name": f"{name}{suffix}"}
                values = {**common, **own, "max_prompt_tokens": max_prompt_tokens}
                values["template"] = templates[values["template"]]
                values["rule"] = getattr(scoring, values["rule"])
                yield QuestionSet(
                    task=f"ahn_{benchmark}_{name}{suffix}",
                    group=f"ahn_{benchmark}{suffix}",
                    file=DataFile(repository, path.format(**names), archive.format(**names) or None),
                    **values,
                )


SETS = {questions.task: questions for questions in _read_sets()}
"""All sets by the names of their tasks."""


def load(subset: str, **metadata: Any) -> dict[str, Any]:
    """Load the documents of `subset`, one of `SETS`, as the split ``test``; for lm-eval's ``custom_dataset``.

    Args:
        metadata: from lm-eval: ``data_folder`` (`data.data_root`) and what `PromptSettings.from_metadata` reads.

    Raises:
        AHNError: the subset is unknown, or the data set or the metadata is not as expected.
    """
    from datasets import Dataset

    if subset not in SETS:
        raise AHNError(f"dataset_kwargs: subset is {subset!r}, expected one of {', '.join(SETS)}")
    questions = SETS[subset]
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


def process_results(doc: Mapping[str, Any], results: Sequence[str]) -> dict[str, float]:
    """Return ``score``, 0 to 1, of what the model answered; for lm-eval."""
    questions = SETS[doc["subset"]]
    answers = doc["answers"][:1] if questions.first_answer else doc["answers"]
    return {"score": max(questions.rule(results[0], answer, doc["keywords"]) for answer in answers)}
