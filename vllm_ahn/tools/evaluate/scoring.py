"""How an answer is compared with the right one: the rules that ``benchmarks.toml`` names.

A rule takes a prediction, the right answer and its keywords, which only LV-Eval's ``keywords_f1`` rules look at, and
returns 0 to 1. Rules, word lists and thresholds are the benchmarks' own: with others the figures would not compare.
lm-eval has a copy of LongBench's, but it scores 0 by ROUGE-L where ``rouge`` recurses too deep, and needs a package
more.

**ROUGE-L** is that of the package ``rouge``, since the benchmarks' figures were made with it, and it is not the usual
one: it splits a text into sentences at every full stop, compares sets of words and not sequences (a repeated word
counts once), and neither lowers nor stems. ``rouge_score``, which is better maintained, gives other figures and drops
all that is not Latin. Two things in ``rouge`` need care: it fails on a text without words, which scores 0 here, and it
recurses once for every word, for which the recursion limit is raised.

**Chinese words** are those of ``jieba`` with its own dictionary, as in the benchmarks.
"""

from __future__ import annotations

import logging
import re
import string
import sys
from collections import Counter
from collections.abc import Collection, Sequence

from vllm_ahn.tools.evaluate.packages import require

_ENGLISH_PUNCTUATION = str.maketrans("", "", string.punctuation)
_ARTICLES = re.compile(r"\b(a|an|the)\b")
_FULL_WIDTH = "".join(chr(ord(sign) + 0xFEE0) for sign in string.punctuation if sign != ".")
_CHINESE_SIGNS = (
    "。｡｟｠｢｣､、〃》「」『』【】〔〕〖〗〘〙〚〛〜〝〞〟〰〾〿–—‘’‛“”„‟…‧﹏"  # the benchmark's: 《 and · stay
)
_CHINESE_PUNCTUATION = str.maketrans("", "", string.punctuation + _FULL_WIDTH + _CHINESE_SIGNS)

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

KEYWORD_RECALL_EN, KEYWORD_RECALL_ZH = 0.2, 0.4
"""An answer with a smaller share of the keywords scores 0."""


def english_f1(prediction: str, answer: str, keywords: str = "") -> float:
    """Return `f1` over English words."""
    return f1(english_words(prediction), english_words(answer))


def chinese_f1(prediction: str, answer: str, keywords: str = "") -> float:
    """Return `f1` over Chinese words."""
    return f1(chinese_words(prediction), chinese_words(answer))


def first_line_f1(prediction: str, answer: str, keywords: str = "") -> float:
    """Return `english_f1` of the first line that is not empty: after it a model continues the examples."""
    return english_f1(prediction.lstrip("\n").split("\n")[0], answer)


def keywords_f1_en(prediction: str, answer: str, keywords: str) -> float:
    """Return `english_f1`, 0 if the prediction has fewer than `KEYWORD_RECALL_EN` of the keywords."""
    words = english_words(keywords)
    found = not words or keyword_recall(english_words(prediction), words, BLACKLIST_EN) >= KEYWORD_RECALL_EN
    return english_f1(prediction, answer) if found else 0.0


def keywords_f1_zh(prediction: str, answer: str, keywords: str) -> float:
    """Return `chinese_f1`, 0 if the prediction has fewer than `KEYWORD_RECALL_ZH` of the keywords.

    Without keywords, all words of the answer are keywords.
    """
    words = chinese_words(keywords or answer)
    found = not words or keyword_recall(chinese_words(prediction), words, BLACKLIST_ZH) >= KEYWORD_RECALL_ZH
    return chinese_f1(prediction, answer) if found else 0.0


def rouge_l(prediction: str, answer: str, keywords: str = "") -> float:
    """Return ROUGE-L (F measure) over words between white space; 0 if a text has none.

    Raises `AHNError` if the package ``rouge`` is not installed.
    """
    rouge = require("rouge", "scoring by ROUGE-L").Rouge(metrics=["rouge-l"])
    if not all(any(sentence.split() for sentence in text.split(".")) for text in (prediction, answer)):
        return 0.0
    limit = sys.getrecursionlimit()
    sys.setrecursionlimit(limit + len(prediction.split()) + len(answer.split()))
    try:
        return float(rouge.get_scores(prediction, answer)[0]["rouge-l"]["f"])
    finally:
        sys.setrecursionlimit(limit)


def chinese_rouge_l(prediction: str, answer: str, keywords: str = "") -> float:
    """Return `rouge_l` over Chinese words (`segment`)."""
    return rouge_l(" ".join(segment(prediction)), " ".join(segment(answer)))


def rouge_zh(prediction: str, answer: str, keywords: str = "") -> float:
    """Return `rouge_l` over the `chinese_words` outside the blacklist."""
    texts = (
        " ".join(word for word in chinese_words(text) if word not in BLACKLIST_ZH) for text in (prediction, answer)
    )
    return rouge_l(*texts)


def english_words(text: str) -> list[str]:
    """Return the words of `text`: lower case, without punctuation and then without articles."""
    return _ARTICLES.sub(" ", text.lower().translate(_ENGLISH_PUNCTUATION)).split()


def chinese_words(text: str) -> list[str]:
    """Return the words of `text` as `segment` finds them, then in lower case, without punctuation and white space."""
    words = ("".join(word.lower().translate(_CHINESE_PUNCTUATION).split()) for word in segment(text))
    return [word for word in words if word]


def segment(text: str) -> list[str]:
    """Cut `text` into words with jieba, removing nothing. Raises `AHNError` if jieba is not installed."""
    jieba = require("jieba", "scoring Chinese answers")
    jieba.setLogLevel(logging.WARNING)  # it reports on stderr how long its dictionary took
    return list(jieba.cut(text, cut_all=False))


def f1(prediction: Sequence[str], answer: Sequence[str]) -> float:
    """Return the harmonic mean of precision and recall over words, each counted as often as both texts have it."""
    same = sum((Counter(prediction) & Counter(answer)).values())
    if not same:
        return 0.0
    precision, recall = same / len(prediction), same / len(answer)
    return 2 * precision * recall / (precision + recall)


def keyword_recall(prediction: Sequence[str], keywords: Sequence[str], blacklist: Collection[str]) -> float:
    """Return the share of `keywords`, at least one, that is in `prediction`.

    Words of `blacklist` are never found, but do count among the keywords.
    """
    common = Counter(prediction) & Counter(keywords)
    return sum(count for word, count in common.items() if word not in blacklist) / len(keywords)
