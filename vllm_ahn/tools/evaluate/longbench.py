"""LongBench (arXiv 2308.14508): the six sets that the AHN paper reports, with its truncation.

Templates, answer lengths and scoring rules are the benchmark's own (``asconcisely`` included). The benchmark cuts in
the middle; the paper cuts the start of the context, to 32,000 tokens. All sets but triviaqa, which shows examples to
continue, are asked in the model's chat template. An answer is scored against the right answer that fits best.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from vllm_ahn.tools.evaluate import scoring
from vllm_ahn.tools.evaluate.data import DataFile
from vllm_ahn.tools.evaluate.documents import QuestionSet, best_score, load_documents

_ONLY_ANSWER = (
    "Answer the question based on the given {passages}. Only give me the answer and do not output any other words."
)
_PASSAGES = _ONLY_ANSWER.format(passages="passages")
_CONCISELY = "asconcisely as you can, using a single phrase if possible. Do not provide any explanation."
_MULTI_DOCUMENT = (
    f"{_PASSAGES}\n\nThe following are given passages.\n{{context}}\n\n{_PASSAGES}\n\nQuestion: {{input}}\nAnswer:"
)
_DUREADER = (
    "请基于给定的文章回答下述问题。\n\n文章：{context}\n\n请基于上述文章回答下面的问题。\n\n问题：{input}\n回答："
)
_NARRATIVEQA = (
    "You are given a story, which can be either a novel or a movie script, and a question. "
    f"Answer the question {_CONCISELY}\n\nStory: {{context}}\n\n"
    f"Now, answer the question based on the story {_CONCISELY}\n\nQuestion: {{input}}\n\nAnswer:"
)
_QMSUM = (
    "You are given a meeting transcript and a query containing a question or instruction. "
    "Answer the query in one or more sentences.\n\nTranscript:\n{context}\n\n"
    "Now, answer the query based on the above meeting transcript in one or more sentences.\n\n"
    "Query: {input}\nAnswer:"
)
_TRIVIAQA = f"{_ONLY_ANSWER.format(passages='passage')} The following are some examples.\n\n{{context}}\n\n{{input}}"


def first_line_f1(prediction: str, answer: str) -> float:
    """Score the first line that is not empty by `scoring.english_f1`: after it a model continues the examples."""
    return scoring.english_f1(prediction.lstrip("\n").split("\n")[0], answer)


SETS = {
    name: QuestionSet(
        group="ahn_longbench",
        file=DataFile("THUDM/LongBench", f"data/{name}.jsonl", "data.zip"),
        template=template,
        score=score,
        max_prompt_tokens=32_000,
        max_answer_tokens=max_answer_tokens,
        chat_template=name != "triviaqa",
    )
    for name, max_answer_tokens, template, score in (
        ("dureader", 128, _DUREADER, scoring.chinese_rouge_l),
        ("hotpotqa", 32, _MULTI_DOCUMENT, scoring.english_f1),
        ("musique", 32, _MULTI_DOCUMENT, scoring.english_f1),
        ("narrativeqa", 128, _NARRATIVEQA, scoring.english_f1),
        ("qmsum", 512, _QMSUM, scoring.rouge_l),
        ("triviaqa", 32, _TRIVIAQA, first_line_f1),
    )
}


def load(subset: str, **metadata: Any) -> dict[str, Any]:
    """Load the documents of `subset` (`load_documents`)."""
    return load_documents(SETS, subset, metadata)


def process_results(doc: Mapping[str, Any], results: Sequence[str]) -> dict[str, float]:
    """Score the model's answer (`best_score`)."""
    return best_score(SETS[doc["subset"]], results[0], doc)
