"""InfiniteBench (arXiv 2402.13718): questions about whole novels, English and Chinese, scored as the AHN paper did.

The templates are the benchmark's, for models that continue a text. The benchmark itself cuts in the middle and scores
by F1; the paper cuts the start of the book, to 128,000 tokens, and scores by ROUGE-L (`scoring.rouge_l`; Chinese is
first cut into words), here against the answer that fits best. Prompts are plain text unless the metadata says
``chat_template``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from vllm_ahn.tools.evaluate import scoring
from vllm_ahn.tools.evaluate.data import DataFile
from vllm_ahn.tools.evaluate.documents import QuestionSet, best_score, load_documents

_ENGLISH = (
    "Read the book and answer the question. Be very concise in your answer.\n\n{context}\n\nQuestion: {input}\nAnswer:"
)
_CHINESE = "阅读以下书籍然后回答问题。\n\n{context}\n\n问题：{input}\n答案："

SETS = {
    name: QuestionSet(
        group="ahn_infinitebench",
        file=DataFile("xinrongzhang2022/InfiniteBench", f"{name}.jsonl"),
        template=template,
        score=score,
        max_prompt_tokens=128_000,
        max_answer_tokens=256,
        answers="answer",
    )
    for name, template, score in (
        ("longbook_qa_eng", _ENGLISH, scoring.rouge_l),
        ("longbook_qa_chn", _CHINESE, scoring.chinese_rouge_l),
    )
}


def load(subset: str, **metadata: Any) -> dict[str, Any]:
    """Load the documents of `subset` (`load_documents`)."""
    return load_documents(SETS, subset, metadata)


def process_results(doc: Mapping[str, Any], results: Sequence[str]) -> dict[str, float]:
    """Score the model's answer (`best_score`)."""
    return best_score(SETS[doc["subset"]], results[0], doc)
