"""The trained model in ``examples/small_model``: its memories help, by the engine's own log-probabilities."""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer
from vllm import SamplingParams

import corpus
import held_out
import recall
import recipe
import train_base
from support.engines import engine
from support.paths import EXAMPLES
from vllm_ahn.tools.cli import distill

FOLDER = EXAMPLES / "small_model"
MEMORIES = tuple(recipe.MEMORIES)
WINDOW, CONTEXT, STRETCHES = 32, 512, 16


@pytest.fixture(scope="module")
def texts() -> Any:
    return corpus.read_corpus()


@pytest.fixture(scope="module")
def stretches(texts: Any) -> list[list[int]]:
    """Beginnings of files that neither base nor memories have learnt from."""
    tokenizer = AutoTokenizer.from_pretrained(FOLDER / "base")
    tokens = [tokenizer(text)["input_ids"][:CONTEXT] for text in texts.held_out[:STRETCHES]]
    return [row for row in tokens if len(row) == CONTEXT]


def bits_beyond_window(stretches: list[list[int]], ahn: str | None) -> float:
    """Bits per byte of what the engine says of tokens that the window has been left for."""
    setting = None if ahn is None else {"checkpoint": ahn, "window": WINDOW, "sinks": 0}
    params = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0, detokenize=False)
    with engine(FOLDER / "base", setting) as llm:
        outputs = llm.generate([{"prompt_token_ids": row} for row in stretches], params, use_tqdm=False)
    logprobs = [
        entry[token].logprob
        for row, output in zip(stretches, outputs, strict=True)
        for token, entry in list(zip(row, output.prompt_logprobs, strict=True))[WINDOW + 1 :]
    ]
    return -sum(logprobs) / len(logprobs) / math.log(2)


@pytest.mark.slow
def test_every_memory_helps(stretches: list[list[int]]) -> None:
    full = bits_beyond_window(stretches, None)
    window = bits_beyond_window(stretches, "none")
    for name in MEMORIES:
        assert full < bits_beyond_window(stretches, str(FOLDER / name)) < window, name


def test_the_records_are_of_these_files() -> None:
    """What is in the folder was made by the recipe, from one text, and is small."""
    training = json.loads((FOLDER / "base" / "training.json").read_text())
    parser = argparse.ArgumentParser()
    distill.add_arguments(parser)
    for name in MEMORIES:
        record = json.loads((FOLDER / name / "training.json").read_text())
        recorded, command = record["command"].split(), recipe.distill_command(name)
        assert recorded[:2] == command[:2] == ["vllm-ahn", "distill"]
        assert parser.parse_args(recorded[2:]) == parser.parse_args(command[2:])
        assert record["data"]["sha256"] == training["data"]["sha256"]
    evaluation = json.loads((FOLDER / "evaluation.json").read_text())
    assert evaluation["data_sha256"] == training["data"]["sha256"]
    for window, ends in evaluation["bits_per_byte"].items():
        for end, bits in ends.items():
            assert all(bits["full"] <= bits[name] <= bits["window"] for name in MEMORIES), (window, end, bits)
    for window, share in (("32", 0.6), ("64", 0.5)):
        bits = evaluation["bits_per_byte"][window][str(held_out.RATIO * int(window))]
        assert held_out.recovered(bits, "gdn") > share
    folders = [FOLDER / name for name in ("base", *MEMORIES)]
    assert sum(path.stat().st_size for folder in folders for path in folder.rglob("*")) < 12e6


def test_the_text_is_not_what_is_held_out(texts: Any) -> None:
    assert len(texts.held_out) > 20
    assert not set(texts.train) & set(texts.held_out)


@pytest.mark.slow
def test_training_begins(texts: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Some small steps of the base: the loss falls, and what is written has the shape of what is there."""
    few = corpus.Corpus(texts.train[:20], texts.held_out[:3], texts.sha256)
    monkeypatch.setattr(train_base, "read_corpus", lambda: few)
    monkeypatch.setattr(train_base, "TOKENS_PER_STEP", 1024)
    monkeypatch.setattr(train_base, "STAGES", ((0.5, 128), (0.5, 256)))
    record = train_base.train(tmp_path, 12)
    assert record["held_out_bits_per_byte"]["512"] < 7
    written, kept = (json.loads((folder / "config.json").read_text()) for folder in (tmp_path, FOLDER / "base"))
    assert written == kept


def test_recall_asks_for_what_the_table_says() -> None:
    rng = recall.random.Random(0)
    for lines in (1, 5):
        question = recall.Question.draw(rng, lines)
        *table, asked = question.text.splitlines()[1:]
        assert len(table) == lines + 1
        assert f"{asked} = None" == table[1]
        assert asked.endswith(question.value) and len(question.value) == 6
        assert all(len(line) + 1 == recall.line_bytes() for line in table)


def test_the_share_that_is_recovered() -> None:
    bits: dict[str, Any] = {"full": 1.0, "window": 2.0, "gdn": 1.25}
    assert held_out.recovered(bits, "gdn") == 0.75
