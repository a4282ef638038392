"""How an answer is compared with the right one: words of English and Chinese, F1, recall of keywords, ROUGE-L.

The rules are LongBench's, which LV-Eval shares; which set uses which is in the benchmark's own module. lm-eval has its
own copy of them, but scores 0 by ROUGE-L where ``rouge`` recurses too deep, and needs a package more.

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


def english_f1(prediction: str, answer: str) -> float:
    """Return `f1` over the English words of two texts."""
    return f1(english_words(prediction), english_words(answer))


def chinese_f1(prediction: str, answer: str) -> float:
    """Return `f1` over the Chinese words of two texts."""
    return f1(chinese_words(prediction), chinese_words(answer))


def keyword_recall(prediction: Sequence[str], keywords: Sequence[str], blacklist: Collection[str]) -> float:
    """Return the share of `keywords`, at least one, that is in `prediction`.

    Words of `blacklist` are never found, but do count among the keywords.
    """
    common = Counter(prediction) & Counter(keywords)
    return sum(count for word, count in common.items() if word not in blacklist) / len(keywords)


def rouge_l(prediction: str, answer: str) -> float:
    """Return ROUGE-L (F measure) of two texts of words between white space; 0 if one has none.

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


def chinese_rouge_l(prediction: str, answer: str) -> float:
    """Return `rouge_l` of two texts after cutting them into words with `segment`."""
    return rouge_l(" ".join(segment(prediction)), " ".join(segment(answer)))
