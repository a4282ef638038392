"""LV-Eval (arXiv 2402.05136): questions about long mixed texts, in five lengths, English and Chinese.

Templates, word lists, thresholds and which rule scores which set are the benchmark's own: with others the figures would
not compare. As in the paper, an answer is scored against the first right one, and the prompt of a 128k set is cut
in the middle to 256,000 tokens (a set's length counts English words or Chinese characters); the other lengths are cut
to twice their nominal length. Prompts are plain text unless the metadata says ``chat_template``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from vllm_ahn.tools.evaluate import scoring
from vllm_ahn.tools.evaluate.data import DataFile
from vllm_ahn.tools.evaluate.documents import QuestionSet, load_documents

LENGTHS = ("16k", "32k", "64k", "128k", "256k")

_BLACKLIST_EN = """
about and are as at be because being but by does for from had has have he her his in is it of on or she that their they
this to was were what when which who with
"""
_BLACKLIST_ZH = """
的 和 是 等 在 年 可以 为 与 ‰ 了 或 一种 月 c 至 日 有 进行 于 不 中 × 根据 小 由 亩 也 要 指 法 会 元 主要 以及
通过 首先 对 然后 号 以 所 后 丁 包括 无 将 用 能 形 方面 因素 位于 而 从 到 一定 用于 但 使用 让 具有 并 亿元 万元
上 类 基于 才 来 地 片 其他 个 或者 变得 时 给 你 使 条 受 已经 带 度
"""
BLACKLIST_EN, BLACKLIST_ZH = frozenset(_BLACKLIST_EN.split()), frozenset(_BLACKLIST_ZH.split())
"""Words that do not show that an answer is right."""

KEYWORD_RECALL_EN = 0.2
KEYWORD_RECALL_ZH = 0.4
"""An answer with a smaller share of the keywords scores 0."""

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
    """Return F1 over words, 0 if the prediction has fewer than `KEYWORD_RECALL_EN` of the keywords."""
    words, wanted = scoring.english_words(prediction), scoring.english_words(keywords)
    found = not wanted or scoring.keyword_recall(words, wanted, BLACKLIST_EN) >= KEYWORD_RECALL_EN
    return scoring.f1(words, scoring.english_words(answer)) if found else 0.0


def keywords_f1_zh(prediction: str, answer: str, keywords: str) -> float:
    """Return F1 over words, 0 if the prediction has fewer than `KEYWORD_RECALL_ZH` of the keywords.

    Without keywords, all words of the answer are keywords.
    """
    words, wanted = scoring.chinese_words(prediction), scoring.chinese_words(keywords or answer)
    found = not wanted or scoring.keyword_recall(words, wanted, BLACKLIST_ZH) >= KEYWORD_RECALL_ZH
    return scoring.f1(words, scoring.chinese_words(answer)) if found else 0.0


def rouge_zh(prediction: str, answer: str, keywords: str) -> float:
    """Return ROUGE-L over the words outside the blacklist, whatever the keywords."""
    texts = (
        " ".join(word for word in scoring.chinese_words(text) if word not in BLACKLIST_ZH)
        for text in (prediction, answer)
    )
    return scoring.rouge_l(*texts)


_RULES: dict[str, tuple[str, Callable[[str, str, str], float]]] = {
    "cmrc_mixup": (_ARTICLE_ZH, keywords_f1_zh),
    "dureader_mixup": (_ARTICLE_ZH, rouge_zh),
    "factrecall_en": (_FACTS_EN, lambda prediction, answer, keywords: scoring.english_f1(prediction, answer)),
    "factrecall_zh": (_FACTS_ZH, lambda prediction, answer, keywords: scoring.chinese_f1(prediction, answer)),
    "hotpotwikiqa_mixup": (_PASSAGES_EN, keywords_f1_en),
    "lic_mixup": (_LIC_ZH, keywords_f1_zh),
    "loogle_CR_mixup": (_PASSAGE_EN, keywords_f1_en),
    "loogle_MIR_mixup": (_PASSAGE_EN, keywords_f1_en),
    "loogle_SD_mixup": (_PASSAGE_EN, keywords_f1_en),
    "multifieldqa_en_mixup": (_PASSAGE_EN, keywords_f1_en),
    "multifieldqa_zh_mixup": (_FIELDS_ZH, keywords_f1_zh),
}

SETS = {
    f"{name}_{length}": QuestionSet(
        group=f"ahn_lveval_{length}",
        file=DataFile("Infinigence/LVEval", f"{name}/{name}_{length}.jsonl", f"{name}.zip"),
        template=template,
        score=score,
        max_prompt_tokens=2000 * int(length.removesuffix("k")),
        max_answer_tokens=16 if name.startswith("factrecall") else 64,
        cut="middle",
    )
    for length in LENGTHS
    for name, (template, score) in _RULES.items()
}


def load(subset: str, **metadata: Any) -> dict[str, Any]:
    """Load the documents of `subset` (`load_documents`)."""
    return load_documents(SETS, subset, metadata)


def process_results(doc: Mapping[str, Any], results: Sequence[str]) -> dict[str, float]:
    """Return ``score``, 0 to 1, of the model's answer against the first right one; for lm-eval."""
    return {"score": SETS[doc["subset"]].score(results[0], doc["answers"][0], doc["keywords"])}
