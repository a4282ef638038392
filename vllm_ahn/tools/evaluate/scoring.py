"""How an answer is compared with the right one: words of English and Chinese, F1, recall of key words, ROUGE-L.

The rules are those of LongBench, which LV-Eval shares; what a benchmark makes of them is in its own module.

**ROUGE-L** is that of the package ``rouge``, since the benchmarks' figures were made with it, and it is not the usual
one: it splits a text into sentences at every full stop, compares sets of words and not sequences (a repeated word
counts once), and does not lower or stem anything. ``rouge_score``, which is better kept, gives other figures and drops
all that is not Latin. Two things in ``rouge`` need care: it fails on a text without words, which is a score of 0 here,
and it recurses once for every word, which is given the depth that it takes.

**Chinese words** are those of ``jieba`` with its own dictionary, as in the benchmarks.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import re
import string
import sys
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from typing import Any

from vllm_ahn.tools.evaluate.packages import require

_ENGLISH_PUNCTUATION = str.maketrans("", "", string.punctuation)
_ARTICLES = re.compile(r"\b(a|an|the)\b")

_FULL_WIDTH = "".join(chr(ord(sign) + 0xFEE0) for sign in string.punctuation if sign != ".")
_CHINESE_SIGNS = (
    "。｡｟｠｢｣､、〃》「」『』【】〔〕〖〗〘〙〚〛〜〝〞〟〰〾〿–—‘’‛“”„‟…‧﹏"  # the benchmark's: 《 and · stay
)
_CHINESE_PUNCTUATION = str.maketrans("", "", string.punctuation + _FULL_WIDTH + _CHINESE_SIGNS)


def english_words(text: str) -> list[str]:
    """The words of `text`: lower case, without punctuation and then without articles."""
    return _ARTICLES.sub(" ", text.lower().translate(_ENGLISH_PUNCTUATION)).split()


def chinese_words(text: str) -> list[str]:
    """The words of `text` as `segment` finds them, then in lower case and without punctuation and white space."""
    words = ("".join(word.lower().translate(_CHINESE_PUNCTUATION).split()) for word in segment(text))
    return [word for word in words if word]


def segment(text: str) -> list[str]:
    """`text` cut into words by jieba, with nothing removed. Raises `AHNError` if jieba is not installed."""
    return list(_jieba().cut(text, cut_all=False))


def f1(prediction: Sequence[str], answer: Sequence[str]) -> float:
    """The harmonic mean of precision and recall over words, each as often as it occurs in both; 0 if none does."""
    same = sum((Counter(prediction) & Counter(answer)).values())
    if not same:
        return 0.0
    precision, recall = same / len(prediction), same / len(answer)
    return 2 * precision * recall / (precision + recall)


def keyword_recall(prediction: Sequence[str], keywords: Sequence[str], blacklist: Collection[str]) -> float:
    """The share of `keywords`, at least one, that is in `prediction`.

    Words of `blacklist` are never found, but they do count among the keywords.
    """
    common = Counter(prediction) & Counter(keywords)
    return sum(count for word, count in common.items() if word not in blacklist) / len(keywords)


def rouge_l(prediction: str, answer: str) -> float:
    """ROUGE-L, the F measure, of two texts of words between white space; 0 if one has none.

    Raises `AHNError` if the package ``rouge`` is not installed.
    """
    rouge = _rouge()
    if not all(any(sentence.split() for sentence in text.split(".")) for text in (prediction, answer)):
        return 0.0
    with _recursion(len(prediction.split()) + len(answer.split())):
        return float(rouge.get_scores(prediction, answer)[0]["rouge-l"]["f"])


def chinese_rouge_l(prediction: str, answer: str) -> float:
    """`rouge_l` of two texts that are first cut into words with `segment`."""
    return rouge_l(" ".join(segment(prediction)), " ".join(segment(answer)))


@functools.cache
def _jieba() -> Any:
    jieba = require("jieba", "scoring Chinese answers")
    jieba.setLogLevel(logging.WARNING)  # it reports on stderr how long its dictionary took
    return jieba


@functools.cache
def _rouge() -> Any:
    return require("rouge", "scoring by ROUGE-L").Rouge(metrics=["rouge-l"])


@contextlib.contextmanager
def _recursion(depth: int) -> Iterator[None]:
    limit = sys.getrecursionlimit()
    sys.setrecursionlimit(limit + depth)
    try:
        yield
    finally:
        sys.setrecursionlimit(limit)
