"""How answers are scored, against cases worked out by hand."""

from __future__ import annotations

import importlib
import sys

import pytest

from vllm_ahn.errors import AHNError
from vllm_ahn.tools.evaluate import benchmarks, packages, scoring


def test_english_words() -> None:
    assert scoring.english_words("The cat's  theory, of AN (apple)!") == ["cats", "theory", "of", "apple"]
    assert scoring.english_words("a. the, an") == []


def test_chinese_words() -> None:
    assert scoring.segment("《红楼梦》的作者") == ["《", "红楼梦", "》", "的", "作者"]
    assert scoring.chinese_words("“红楼梦”的作者，ABC！ 北京大学。") == ["红楼梦", "的", "作者", "abc", "北京大学"]
    assert scoring.chinese_words("：。！？；") == []


def test_f1_counts_words_as_often_as_both_have_them() -> None:
    assert scoring.f1(["a", "a", "b"], ["a", "c"]) == pytest.approx(2 * (1 / 3) * (1 / 2) / (1 / 3 + 1 / 2))
    assert scoring.f1(["a"], ["a"]) == 1
    assert scoring.f1([], ["a"]) == 0
    assert scoring.f1(["b"], ["a"]) == 0


def test_keyword_recall_does_not_find_the_blacklist() -> None:
    assert scoring.keyword_recall(["of", "venice"], ["of", "venice", "sea", "x"], {"of"}) == 0.25
    assert scoring.keyword_recall(["venice", "venice"], ["venice", "venice"], set()) == 1


@pytest.mark.parametrize(
    ("prediction", "answer", "score"),
    [
        ("a b c d", "a c", 2 * 0.5 * 1 / 1.5),  # the longest common subsequence is a c
        ("c a", "a c", 0.5),  # in the wrong order, only one of them
        ("a a a b", "a b", 1.0),  # sets of words
        ("one two. three", "three. one", 2 * (2 / 3) * 1 / (5 / 3)),  # sentence by sentence, in any order
        ("The cat", "the cat", 0.5),  # capitals count
        ("", "a", 0.0),
        (" . ..", "a", 0.0),
        ("a", "...", 0.0),
    ],
)
def test_rouge_l(prediction: str, answer: str, score: float) -> None:
    assert scoring.rouge_l(prediction, answer) == pytest.approx(score, abs=1e-7)


def test_rouge_l_of_texts_longer_than_python_recurses() -> None:
    limit = sys.getrecursionlimit()
    words = [str(number) for number in range(2 * limit)]
    half = scoring.rouge_l(" ".join(words), " ".join(words[:10]))
    assert half == pytest.approx(2 * (10 / len(words)) / (1 + 10 / len(words)), abs=1e-7)
    assert sys.getrecursionlimit() == limit


def test_chinese_rouge_l() -> None:
    assert scoring.chinese_rouge_l("作者是曹雪芹", "曹雪芹") == pytest.approx(0.5, abs=1e-7)  # 1 of 3 words, 1 of 1
    assert scoring.chinese_rouge_l("", "曹雪芹") == 0


@pytest.mark.parametrize(
    ("said", "score"),
    [
        ("one", 1 / 3),  # 1 of 5 keywords is 0.2, enough: precision 1, recall 1/5
        ("six", 0.0),  # the answer has it, the keywords do not
        ("", 0.0),
    ],
)
def test_english_keywords_at_the_threshold(said: str, score: float) -> None:
    answer = "one two three four six"
    assert scoring.keywords_f1_en(said, answer, "one two three four five") == pytest.approx(score)


def test_english_keywords_below_the_threshold() -> None:
    assert scoring.keywords_f1_en("one", "one", "one 2 3 4 5 6") == 0
    assert scoring.keywords_f1_en("one", "one", "") == 1
    assert scoring.keywords_f1_en("of", "of", "of") == 0, "a blacklisted keyword cannot be found"


def test_chinese_keywords_at_the_threshold() -> None:
    # 苹果 香蕉 are 2 of 5 keywords, 0.4, enough; one of them is not.
    keywords = "苹果 香蕉 北京大学 曹雪芹 红楼梦"
    assert scoring.keywords_f1_zh("苹果 香蕉", "苹果 香蕉", keywords) == 1
    assert scoring.keywords_f1_zh("苹果", "苹果", keywords) == 0
    assert scoring.keywords_f1_zh("的", "的", "") == 0, "without keywords the answer's words are them"


def test_chinese_rouge_without_the_blacklist() -> None:
    assert scoring.rouge_zh("曹雪芹的红楼梦", "红楼梦是曹雪芹", "") == pytest.approx(0.5, abs=1e-7)
    assert scoring.rouge_zh("是的", "是的", "") == 0


def test_lveval_scores_the_first_answer() -> None:
    doc = {"subset": "ahn_lveval_hotpotwikiqa_mixup_16k", "answers": ["tower", "bell"], "keywords": ""}
    assert benchmarks.process_results(doc, ["the bell"]) == {"score": 0}
    assert benchmarks.process_results(doc, ["the tower"]) == {"score": 1}


def test_other_benchmarks_score_the_best_answer() -> None:
    doc = {"subset": "ahn_longbench_hotpotqa", "answers": ["tower", "bell"], "keywords": ""}
    assert benchmarks.process_results(doc, ["the bell"]) == {"score": 1}
    doc = {"subset": "ahn_infinitebench_longbook_qa_eng", "answers": ["tower", "bell"], "keywords": ""}
    assert benchmarks.process_results(doc, ["bell"])["score"] == pytest.approx(1)


def test_a_missing_package_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    def import_module(name: str) -> None:
        raise ModuleNotFoundError(f"No module named {name!r}", name=name)

    monkeypatch.setattr(importlib, "import_module", import_module)
    with pytest.raises(AHNError, match=r"^scoring needs the package jieba, .* pip install 'vllm-ahn\[eval\]'$"):
        packages.require("jieba", "scoring")
