"""Small data sets in the layout of the hub's, and what a model answers to them, with the scores worked out by hand."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

ENGLISH = (
    "The grey harbour lies between two hills, and every morning the boats come back before the fog does. "
    "Nobody in the town remembers who built the tower, but its bell has never been late. "
)
CHINESE = "灰色的港口在两座山之间，每天早晨船都在雾之前回来。镇上没有人记得是谁建了那座塔，但是它的钟从来没有晚过。"

LVEVAL_CASES: dict[str, list[tuple[list[str], str, str, float]]] = {
    # answers, keywords, what the model says, and the score of that
    "keywords en": [
        # Of the answer's words harbour, of and venice (no article) two are said: 2 * 1 * (2/3) / (1 + 2/3).
        (["The harbour of Venice"], "Venice", "Harbour, Venice!", 0.8),
        # The words "to" and "of" are in the blacklist, so 1 of 6 keywords is found, fewer than 0.2.
        (["it belongs to Ann"], "ann to of one two three", "ann to of", 0.0),
    ],
    "f1 en": [
        # "of" counts here: 2 of 4 words said, 2 of 2 words right.
        (["of Venice"], "", "the sea of lovely Venice", 2 / 3),
        (["1492"], "", "", 0.0),
    ],
    "keywords zh": [
        # 作者 是 曹雪芹 against 曹雪芹, the keyword: precision 1/3, recall 1.
        (["曹雪芹"], "曹雪芹", "作者是曹雪芹。", 0.5),
        # Without keywords they are the words of the answer, 作者 是 曹雪芹; 是 is in the blacklist: 1/3 < 0.4.
        (["作者是曹雪芹"], "", "作者是", 0.0),
    ],
    "f1 zh": [
        (["作者是曹雪芹"], "", "作者是", 0.8),
        (["北京大学"], "", "苹果", 0.0),
    ],
    "rouge zh": [
        # Without 是: 作者 曹雪芹 against 曹雪芹.
        (["曹雪芹"], "", "作者是曹雪芹。", 2 / 3),
        (["曹雪芹"], "", "是的。", 0.0),
    ],
}
LVEVAL_RULES = {
    "cmrc_mixup": "keywords zh",
    "dureader_mixup": "rouge zh",
    "factrecall_en": "f1 en",
    "factrecall_zh": "f1 zh",
    "hotpotwikiqa_mixup": "keywords en",
    "lic_mixup": "keywords zh",
    "loogle_CR_mixup": "keywords en",
    "loogle_MIR_mixup": "keywords en",
    "loogle_SD_mixup": "keywords en",
    "multifieldqa_en_mixup": "keywords en",
    "multifieldqa_zh_mixup": "keywords zh",
}
INFINITEBENCH_CASES = {
    # The second answer fits better: "grey" of "grey harbour".
    "longbook_qa_eng": [(["Venice", "grey harbour"], "grey", 2 / 3)],
    "longbook_qa_chn": [(["曹雪芹"], "作者是曹雪芹", 0.5)],
}
LONGBENCH_CASES = {
    "dureader": [(["作者是曹雪芹", "苹果"], "曹雪芹", 0.5)],
    "hotpotqa": [(["the tower", "a bell"], "The Bell.", 1.0)],
    "musique": [(["two hills"], "between hills", 0.5)],
    "narrativeqa": [(["Nobody"], "", 0.0)],
    # ROUGE-L sees sentences and capitals: "the boats" of "the boats come back", not "The".
    "qmsum": [(["the boats come back"], "the boats. The", 4 / 7)],
    # The first line alone is the answer.
    "triviaqa": [(["fog"], "\nFog\nQuestion: who?", 1.0)],
}


def write_data(folder: Path, lengths: Sequence[str] = ("128k",), repeat: int = 12) -> None:
    """Writes all data sets into `folder` as the hub has them; every context is one text `repeat` times."""
    for name in LVEVAL_RULES:
        rule = LVEVAL_RULES[name]
        context = (CHINESE if rule.endswith("zh") else ENGLISH) * repeat
        records = []
        for number, (answers, keywords, _, _) in enumerate(LVEVAL_CASES[rule]):
            record = {"input": question(name, number), "context": context, "answers": [*answers, "never scored"]}
            records.append(record | ({"answer_keywords": keywords} if keywords else {}))
        files = {f"{name}/{name}_{length}.jsonl": records for length in lengths}
        _write_zip(folder / "Infinigence/LVEval" / f"{name}.zip", files)
    for name, cases in INFINITEBENCH_CASES.items():
        context = (CHINESE if name.endswith("chn") else ENGLISH) * repeat
        _write_lines(
            folder / "xinrongzhang2022/InfiniteBench" / f"{name}.jsonl",
            [
                {"id": n, "context": context, "input": question(name, n), "answer": answers, "options": []}
                for n, (answers, _, _) in enumerate(cases)
            ],
        )
    files = {}
    for name in LONGBENCH_CASES:
        context = (CHINESE if name == "dureader" else ENGLISH) * repeat
        files[f"data/{name}.jsonl"] = [
            {"input": question(name, n), "context": context, "answers": answers}
            for n, (answers, _, _) in enumerate(LONGBENCH_CASES[name])
        ]
    _write_zip(folder / "THUDM/LongBench/data.zip", files)


def question(name: str, number: int) -> str:
    """The question of a record, which no other set has."""
    return f"What of {name} #{number}?"


def answers_by_question() -> dict[str, str]:
    """What a model answers to every question."""
    found = {}
    for name, rule in LVEVAL_RULES.items():
        for number, (_, _, said, _) in enumerate(LVEVAL_CASES[rule]):
            found[question(name, number)] = said
    for cases in (INFINITEBENCH_CASES, LONGBENCH_CASES):
        for name, rows in cases.items():
            for number, (_, said, _) in enumerate(rows):
                found[question(name, number)] = said
    return found


def expected_scores() -> dict[str, float]:
    """The score of every task, 0 to 1, by hand."""
    lveval = {f"ahn_lveval_{name}_128k": LVEVAL_CASES[rule] for name, rule in LVEVAL_RULES.items()}
    infinitebench = {f"ahn_infinitebench_{name}": rows for name, rows in INFINITEBENCH_CASES.items()}
    longbench = {f"ahn_longbench_{name}": rows for name, rows in LONGBENCH_CASES.items()}
    every: Mapping[str, Sequence[tuple[Any, ...]]] = {**lveval, **infinitebench, **longbench}
    return {task: sum(row[-1] for row in rows) / len(rows) for task, rows in every.items()}


def _write_lines(path: Path, records: Sequence[Mapping[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(_lines(records), encoding="utf-8")


def _write_zip(path: Path, files: Mapping[str, Sequence[Mapping[str, Any]]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(path, "w") as archive:
        for name, records in files.items():
            archive.writestr(name, _lines(records))


def _lines(records: Sequence[Mapping[str, Any]]) -> str:
    return "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
