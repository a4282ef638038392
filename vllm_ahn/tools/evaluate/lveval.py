"""LV-Eval (arXiv 2402.05136): questions about long mixed texts, in five lengths, English and Chinese.

Templates, word lists, thresholds and which rule scores which set are the benchmark's own definition: with other ones
figures would not compare. As the paper did, the first answer of a question is scored, the prompt of a 128k set is cut
in the middle to 256,000 tokens (a set's length counts English words or Chinese characters), and to twice their nominal
length that of the others. Prompts are plain text unless the metadata says ``chat_template``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from vllm_ahn.errors import AHNError
from vllm_ahn.tools.evaluate import scoring
from vllm_ahn.tools.evaluate.data import DataFile
from vllm_ahn.tools.evaluate.documents import QuestionSet, load_documents
from vllm_ahn.tools.evaluate.suites import LVEVAL_LENGTHS

REPOSITORY = "Infinigence/LVEval"
MAX_PROMPT_TOKENS = {length: 2000 * int(length.removesuffix("k")) for length in LVEVAL_LENGTHS}
"""The longest prompt of each length, tokens."""

_BLACKLIST_EN = """
about and are as at be because being but by does for from had has have he her his in is it of on or she that their they
this to was were what when which who with
"""
_BLACKLIST_ZH = """
的 和 是 等 在 年 可以 为 与 ‰ 了 或 一种 月 c 至 日 有 进行 于 不 中 × 根据 小 由 亩 也 要 指 法 会 元 主要 以及
通过 首先 对 然后 号 以 所 后 丁 包括 无 将 用 能 形 方面 因素 位于 而 从 到 一定 用于 但 使用 让 具有 并 亿元 万元
上 类 基于 才 来 地 片 其他 个 或者 变得 时 给 你 使 条 受 已经 带 度
"""
BLACKLIST_EN = frozenset(_BLACKLIST_EN.split())
BLACKLIST_ZH = frozenset(_BLACKLIST_ZH.split())
"""Words that say nothing about an answer being right."""

KEYWORD_RECALL_EN = 0.2
KEYWORD_RECALL_ZH = 0.4
"""An answer that has a smaller share of the keywords scores 0."""

_ONE_PASSAGE_EN = (
    "Please answer the following question based on the {given} passages. Questions and answers are only relevant to "
    "one passage. Only give me the answer and do not output any other explanation and evidence."
)
_SOME_PASSAGES_EN = (
    "Questions and answers are only relevant to some passages. Only give me the answer and do not output any other "
    "explanation and evidence."
)
_ONE_ARTICLE_ZH = "问题和答案只与其中一篇文章有关。"
_ONLY_ANSWER_ZH = "只需要直接给出问题的答案，不要输出其他任何解释和证据。"


def _english(instruction: str, reminder: str) -> str:
    return f"{instruction}\n\nArticle: {{context}}\n\n{reminder}\n\nQuestion: {{input}}\nAnswer:"


def _chinese(instruction: str, reminder: str) -> str:
    return f"{instruction}\n\n文章：{{context}}\n\n{reminder}\n\n问题：{{input}}\n回答："


_FACTS_EN = _english(
    "Please answer the following questions based on the given article.",
    "Please answer the following questions based on the above article.",
)
_PASSAGE_EN = _english(_ONE_PASSAGE_EN.format(given="given"), _ONE_PASSAGE_EN.format(given="above"))
_PASSAGES_EN = _english(
    f"Answer the question based on the given passages. {_SOME_PASSAGES_EN}",
    f"Please answer the following question based on the above passages. {_SOME_PASSAGES_EN}",
)
_FACTS_ZH = _chinese("请基于给定的文章回答下述问题。", "现在请基于上述文章回答下面的问题。")
_ARTICLE_ZH = _chinese(
    f"请根据下面给定的文章回答问题，{_ONE_ARTICLE_ZH}", f"现在请基于上述文章回答下面的问题，{_ONE_ARTICLE_ZH}"
)
_LIC_ZH = _chinese(
    f"请根据下面给定的文章回答问题，{_ONE_ARTICLE_ZH}", f"请现在基于上述文章回答下面的问题，{_ONE_ARTICLE_ZH}"
)
_FIELDS_ZH = _chinese(
    f"请阅读以下文章并用中文回答问题，{_ONE_ARTICLE_ZH}{_ONLY_ANSWER_ZH}",
    f"请基于上面的文章回答下面的问题，{_ONE_ARTICLE_ZH}{_ONLY_ANSWER_ZH}",
)


def keywords_f1_en(prediction: str, answer: str, keywords: str) -> float:
    """F1 over words; 0 if fewer than `KEYWORD_RECALL_EN` of the keywords are in the prediction."""
    words = scoring.english_words(prediction)
    if not _has_keywords(words, scoring.english_words(keywords), BLACKLIST_EN, KEYWORD_RECALL_EN):
        return 0.0
    return scoring.f1(words, scoring.english_words(answer))


def keywords_f1_zh(prediction: str, answer: str, keywords: str) -> float:
    """F1 over words; 0 if fewer than `KEYWORD_RECALL_ZH` of the keywords are in the prediction. Without keywords
    they are all the words of the answer."""
    words = scoring.chinese_words(prediction)
    if not _has_keywords(words, scoring.chinese_words(keywords or answer), BLACKLIST_ZH, KEYWORD_RECALL_ZH):
        return 0.0
    return scoring.f1(words, scoring.chinese_words(answer))


def f1_en(prediction: str, answer: str, keywords: str) -> float:
    """F1 over words; the keywords are not looked at."""
    return scoring.f1(scoring.english_words(prediction), scoring.english_words(answer))


def f1_zh(prediction: str, answer: str, keywords: str) -> float:
    """F1 over words; the keywords are not looked at."""
    return scoring.f1(scoring.chinese_words(prediction), scoring.chinese_words(answer))


def rouge_zh(prediction: str, answer: str, keywords: str) -> float:
    """ROUGE-L over the words that are not in the blacklist; the keywords are not looked at."""
    texts = (
        " ".join(word for word in scoring.chinese_words(text) if word not in BLACKLIST_ZH)
        for text in (prediction, answer)
    )
    return scoring.rouge_l(*texts)


def _has_keywords(words: Sequence[str], keywords: Sequence[str], blacklist: frozenset[str], least: float) -> bool:
    return not keywords or scoring.keyword_recall(words, keywords, blacklist) >= least


@dataclasses.dataclass(frozen=True)
class LVEvalSet:
    """What is common to all lengths of a set."""

    template: str
    score: Callable[[str, str, str], float]
    """Of a prediction, the right answer and its keywords (none: empty), 0 to 1."""


SETS = {
    "cmrc_mixup": LVEvalSet(_ARTICLE_ZH, keywords_f1_zh),
    "dureader_mixup": LVEvalSet(_ARTICLE_ZH, rouge_zh),
    "factrecall_en": LVEvalSet(_FACTS_EN, f1_en),
    "factrecall_zh": LVEvalSet(_FACTS_ZH, f1_zh),
    "hotpotwikiqa_mixup": LVEvalSet(_PASSAGES_EN, keywords_f1_en),
    "lic_mixup": LVEvalSet(_LIC_ZH, keywords_f1_zh),
    "loogle_CR_mixup": LVEvalSet(_PASSAGE_EN, keywords_f1_en),
    "loogle_MIR_mixup": LVEvalSet(_PASSAGE_EN, keywords_f1_en),
    "loogle_SD_mixup": LVEvalSet(_PASSAGE_EN, keywords_f1_en),
    "multifieldqa_en_mixup": LVEvalSet(_PASSAGE_EN, keywords_f1_en),
    "multifieldqa_zh_mixup": LVEvalSet(_FIELDS_ZH, keywords_f1_zh),
}


def split_subset(subset: str) -> tuple[str, str]:
    """``"cmrc_mixup_128k"`` -> ``("cmrc_mixup", "128k")``; raises `AHNError` for what is no set and length."""
    name, _, length = subset.rpartition("_")
    if name not in SETS or length not in LVEVAL_LENGTHS:
        raise AHNError(
            f"LV-Eval: subset is {subset!r}, expected one of {', '.join(SETS)}, then _ and one of "
            f"{', '.join(LVEVAL_LENGTHS)}"
        )
    return name, length


def data_file(subset: str) -> DataFile:
    """Where `subset` lies; raises `AHNError` for an unknown one."""
    name, _ = split_subset(subset)
    return DataFile(REPOSITORY, f"{name}/{subset}.jsonl", f"{name}.zip")


def load(subset: str, **metadata: Any) -> dict[str, Any]:
    """The documents of `subset`, such as ``cmrc_mixup_128k``, as the split ``test``; for lm-eval's
    ``custom_dataset``. Raises `AHNError`."""
    name, length = split_subset(subset)
    questions = QuestionSet(
        data_file(subset),
        SETS[name].template,
        max_prompt_tokens=MAX_PROMPT_TOKENS[length],
        cut="middle",
    )
    return load_documents(questions, metadata, lambda record: {"subset": subset, "keywords": _keywords(record)})


def process_results(doc: Mapping[str, Any], results: Sequence[str]) -> dict[str, float]:
    """``score``, 0 to 1, of what the model answered; for lm-eval."""
    name, _ = split_subset(doc["subset"])
    return {"score": SETS[name].score(results[0], doc["answers"][0], doc["keywords"])}


def _keywords(record: Mapping[str, Any]) -> str:
    # Sets without keywords lack the field or have nothing in it.
    keywords = record.get("answer_keywords") or ""
    return keywords if isinstance(keywords, str) else " ".join(keywords)
