"""``vllm-ahn perplexity``: log-probabilities by position against other implementations, sums, and the cache held."""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer, Qwen2ForCausalLM

from support.evaluating import FLAGS, InProcess
from support.evaluation_data import CHINESE, ENGLISH
from vllm_ahn.reference import from_folders
from vllm_ahn.tools.cli import main
from vllm_ahn.tools.evaluate.perplexity import bucketed, even_edges
from vllm_ahn.tools.evaluate.texts import Stretch, cut_text, longest_book, token_bytes
from vllm_ahn.tools.tiny import TinyPaths, make_tiny

WINDOW, SINKS, CONTEXT = 48, 16, 200
TEXT = "".join(f"{number}. {ENGLISH}{CHINESE if number % 3 == 0 else ''}" for number in range(8))
TOLERANCE = 1e-3
"""Of a perplexity of thousands, relative."""


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> TinyPaths:
    return make_tiny(tmp_path_factory.mktemp("tiny"), max_position_embeddings=128)


@pytest.fixture
def in_process(monkeypatch: pytest.MonkeyPatch) -> Iterator[InProcess]:
    with contextlib.closing(InProcess(monkeypatch)) as found:
        yield found


@pytest.mark.slow
def test_against_other_implementations(tiny: TinyPaths, in_process: InProcess, tmp_path: Path) -> None:
    """Four methods in chunks of 32 tokens: full attention, window and AHN as in the reference, YaRN as in
    Transformers; only full attention's cache grows."""
    text, report, plot = tmp_path / "text.txt", tmp_path / "report.json", tmp_path / "plot.png"
    text.write_text(TEXT, encoding="utf-8")
    lengths = [f"--window={WINDOW}", f"--sinks={SINKS}", f"--context={CONTEXT}", f"--text={text}", "--limit=3"]
    methods = [f"--ahn={tiny.ahn}", "--ahn=none", "--baselines=full,yarn"]
    assert main(["perplexity", str(tiny.base), *lengths, *methods, f"--json={report}", f"--plot={plot}", *FLAGS]) == 0
    assert plot.read_bytes().startswith(b"\x89PNG")
    assert {row.engine["max_num_batched_tokens"] for row in in_process.rows} == {32}
    rows = json.loads(report.read_text())["suites"][0]["rows"]
    assert [row["method"] for row in rows] == ["full", "yarn", "window", str(tiny.ahn)]

    stretches = cut_text(AutoTokenizer.from_pretrained(tiny.base), "text", TEXT, CONTEXT)[:3]
    yarn = json.loads((tiny.base / "config.json").read_text())["max_position_embeddings"]
    models = [
        from_folders(tiny.base),
        yarn_by_transformers(tiny.base, factor=2, original=yarn),
        from_folders(tiny.base, "none", WINDOW, SINKS),
        from_folders(tiny.base, tiny.ahn, WINDOW, SINKS),
    ]
    beyond = []
    for row, model in zip(rows, models, strict=True):
        measured = row["perplexity"]
        for name, edges in (("within_window", (1, 65)), ("beyond_window", (65, CONTEXT)), ("all", (1, CONTEXT))):
            assert_rates(measured[name], [expected(model, stretch) for stretch in stretches], stretches, *edges)
        assert sum(bucket["tokens"] for bucket in measured["buckets"]) == measured["all"]["tokens"] == 3 * (CONTEXT - 1)
        beyond.append(measured["beyond_window"]["perplexity"])
    assert len({round(value) for value in beyond}) == 4, "the methods cannot be told from each other"
    block = {"full": 49_152, "yarn": 49_152, "window": 49_152, str(tiny.ahn): 52_224}  # 3 layers, 2 heads, 32 tokens
    for row in rows:
        held = row["perplexity"]["held"]
        assert row["perplexity"]["block_bytes"] == block[row["method"]]
        assert [tokens for tokens, _ in held][:3] == [32, 64, 96] and held[-1][0] > CONTEXT
        most = {"full": 7, "yarn": 7, "window": 5}.get(row["method"], 6)  # a state takes two pages
        assert held[-1][1] <= most * row["perplexity"]["block_bytes"]
        assert (held[-1][1] > held[4][1]) == (row["method"] in ("full", "yarn"))


@torch.no_grad()
def expected(model: Any, stretch: Stretch) -> list[float]:
    tokens = torch.tensor(stretch.tokens)
    logits = model(tokens[None])
    logits = getattr(logits, "logits", logits)[0, :-1]
    return [float(value) for value in logits.log_softmax(-1).gather(1, tokens[1:, None])[:, 0]]


def yarn_by_transformers(base: Path, factor: int, original: int) -> Any:
    rope = {"rope_type": "yarn", "factor": float(factor), "original_max_position_embeddings": original}
    return Qwen2ForCausalLM.from_pretrained(
        base,
        dtype=torch.float32,
        max_position_embeddings=factor * original,
        rope_parameters={**rope, "rope_theta": 10000.0},
    ).eval()


def assert_rates(
    measured: dict[str, Any], logprobs: list[list[float]], stretches: list[Stretch], start: int, end: int
) -> None:
    nats = -sum(sum(values[start - 1 : end - 1]) for values in logprobs)
    tokens = len(stretches) * (end - start)
    size = sum(sum(stretch.sizes[start:end]) for stretch in stretches)
    assert measured["tokens"] == tokens and measured["bytes"] == size
    assert measured["perplexity"] == pytest.approx(math.exp(nats / tokens), rel=TOLERANCE)
    assert measured["bits_per_byte"] == pytest.approx(nats / math.log(2) / size, rel=TOLERANCE)


def test_buckets() -> None:
    assert even_edges(10, 3) == [1, 4, 7, 10] and even_edges(4, 32) == [1, 2, 3, 4] and even_edges(9, 3) == [1, 4, 7, 9]
    logprobs, sizes = [-math.log(2), -math.log(8), -math.log(4)], [9, 1, 3, 2]
    first, second = bucketed([(logprobs, sizes), (logprobs[:1], sizes[:2])], [1, 2, 4])
    assert (first["tokens"], first["bytes"], first["perplexity"]) == (2, 2, pytest.approx(2))
    assert (second["start"], second["end"], second["tokens"], second["bytes"]) == (2, 4, 2, 5)
    assert second["perplexity"] == pytest.approx(math.sqrt(32)) and second["bits_per_byte"] == pytest.approx(1)
    [inner, none] = bucketed([(logprobs, sizes)], [2, 3, 3])
    assert inner["tokens"] == 1 and (none["tokens"], none["perplexity"], none["bits_per_byte"]) == (0, None, None)


def test_bytes_of_tokens(tiny: TinyPaths) -> None:
    """Characters that are several tokens count once, whatever the tokenizer does."""
    assert token_bytes("a塔b", [1, 2, 2, 2, 3]) == [1, 3, 0, 0, 1]
    tokenizer = AutoTokenizer.from_pretrained(tiny.base)
    stretches = cut_text(tokenizer, "text", TEXT, 100)
    assert [len(stretch.tokens) for stretch in stretches[:-1]] == [100] * (len(stretches) - 1)
    assert sum(sum(stretch.sizes) for stretch in stretches) == len(TEXT.encode())
    assert tokenizer.decode([token for stretch in stretches for token in stretch.tokens]) == TEXT


def test_the_first_book_that_is_long_enough(tiny: TinyPaths) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny.base)
    books = [("short", "the end"), ("long", TEXT), ("longer", TEXT * 2)]
    assert longest_book(tokenizer, books, 500).source == "long"
    assert len(longest_book(tokenizer, books, 500).tokens) == 500
    assert longest_book(tokenizer, books[:1], 500).source == "short"
    with pytest.raises(ValueError, match="pg19: no text in the data"):
        longest_book(tokenizer, [], 500)


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--text=nowhere.txt"], "--text: {cwd}/nowhere.txt cannot be read (No such file or directory), expected"),
        (["--text={empty}", "--window=64"], "empty.txt holds no text, expected some"),
        (["--context=1"], "--context is '1', expected a whole number from 2"),
        (["--context=100"], "never leave window and sinks, 32640 + 128, expected a smaller --window"),
        (["--plot=plot.jpg"], "--plot: plot.jpg ends with '.jpg', expected .png, .svg, .pdf"),
    ],
)
def test_bad_input(flags: list[str], said: str, tiny: TinyPaths, tmp_path: Path, capsys: Any) -> None:
    text, empty = tmp_path / "text.txt", tmp_path / "empty.txt"
    text.write_text(TEXT)
    empty.write_text("")
    flags = [flag.format(empty=empty) for flag in flags]
    assert main(["perplexity", str(tiny.base), f"--text={text}", *flags]) == 1
    printed = capsys.readouterr().err
    assert printed.startswith("error: ") and printed.count("\n") == 1 and said.format(cwd=Path.cwd()) in printed
