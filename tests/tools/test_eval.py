"""``vllm-ahn eval``: every suite to the report, interruption and resumption, and what a report says."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from filelock import FileLock

from support.evaluating import FLAGS, InProcess, kept_keys, write_all_data
from support.servers import end, environment, program, run
from vllm_ahn.errors import AHNError
from vllm_ahn.tools.cli import main
from vllm_ahn.tools.evaluate import runner
from vllm_ahn.tools.evaluate.answers import Answers
from vllm_ahn.tools.evaluate.methods import pinned
from vllm_ahn.tools.evaluate.plan import Setting
from vllm_ahn.tools.evaluate.suites import SUITES
from vllm_ahn.tools.evaluate.tasks import NIAH_TASKS
from vllm_ahn.tools.tiny import TinyPaths, make_tiny

LONGBENCH = len(SUITES["longbench"].tasks)
LENGTHS = ["--window=64", "--sinks=32", "--max-model-len=1024"]
WAIT_S = 240.0


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> TinyPaths:
    return make_tiny(tmp_path_factory.mktemp("tiny"), max_position_embeddings=512, layers=1)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_all_data(tmp_path_factory.mktemp("data"))


def command(tiny: TinyPaths, data: Path, output: Path, *more: str) -> list[str]:
    """``vllm-ahn eval`` without its suites, of the AHN alone."""
    where = [f"--model={tiny.base}", f"--ahn={tiny.ahn}", "--baselines=", f"--data={data}", f"--output={output}"]
    return ["eval", *more, *where, *FLAGS]


def read(output: Path) -> dict[str, Any]:
    """The report."""
    found: dict[str, Any] = json.loads((output / "report.json").read_text(encoding="utf-8"))
    return found


@pytest.fixture
def in_process(monkeypatch: pytest.MonkeyPatch) -> Iterator[InProcess]:
    with contextlib.closing(InProcess(monkeypatch)) as found:
        yield found


@pytest.mark.slow
def test_every_suite(
    tiny: TinyPaths, data: Path, in_process: InProcess, needles: list[int], tmp_path: Path, capsys: Any
) -> None:
    """All suites in one command; again, nothing is run; with another window, all is asked anew."""
    lengths = ["--window=64", "--sinks=32", "--max-model-len=4096", "--limit=1"]
    asked = command(tiny, data, tmp_path, *SUITES, *lengths)
    assert main(asked) == 0
    assert [row.setting.suite.name for row in in_process.rows] == list(SUITES)
    report = read(tmp_path)
    assert needles == [4096] * len(NIAH_TASKS)
    for suite in report["suites"]:
        (row,) = suite["rows"]
        assert row["status"] == "measured" and "difference" not in row
        assert suite["departures"]
        if suite["kind"] == "lm_eval":
            assert list(row["scores"]) == suite["tasks"] and set(row["samples"].values()) == {1}
            assert row["average"] == pytest.approx(sum(row["scores"].values()) / len(row["scores"]))
    runs = {r["suite"]: (r["asked"], r["kept"]) for r in report["runs"]}
    assert runs == {n: (len(suite.tasks) or 1, 0) for n, suite in SUITES.items()}
    assert len(kept_keys(tmp_path)) == len(set(kept_keys(tmp_path))) == sum(count for count, _ in runs.values())
    (pg19,) = (suite["rows"][0]["perplexity"] for suite in report["suites"] if suite["name"] == "pg19")
    assert pg19["sources"] == ["A book"] and pg19["held"][-1][1] < 500_000 and 96 < pg19["tokens"] < 4093
    assert (tmp_path / "pg19.png").read_bytes().startswith(b"\x89PNG")

    text = (tmp_path / "report.md").read_text(encoding="utf-8")
    assert "Not the paper's setting: window 64 instead of 32,640; sinks 32 instead of 128" in text
    assert "only the first 1 samples of each set" in text and "| difference" not in text and "paper, Qwen" not in text
    for heading in ("LV-Eval 128k", "InfiniteBench En.QA, Zh.QA", "LongBench, six sets", "RULER NIAH 128k", "PG19"):
        assert f"## {heading}\n" in text

    del in_process.rows[:]
    assert main(asked) == 0
    assert not in_process.rows and read(tmp_path) == report

    capsys.readouterr()
    changed = command(tiny, data, tmp_path, "infinitebench", "--window=65", *lengths[1:])
    assert main(changed) == 0
    assert [(r["asked"], r["kept"]) for r in read(tmp_path)["runs"]] == [(2, 0)]
    assert "2 asked, 0 kept" in capsys.readouterr().err

    # More samples are more of the same questions: there are no others, so nothing is asked.
    assert main([*command(tiny, data, tmp_path, "infinitebench", "--window=65", *lengths[1:3])]) == 0
    assert [(r["asked"], r["kept"]) for r in read(tmp_path)["runs"]] == [(0, 2)]
    assert in_process.engines == 3


@pytest.mark.slow
def test_methods_differ_and_a_failure_is_a_row(
    tiny: TinyPaths, data: Path, in_process: InProcess, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    """All methods in one table; the one that cannot start is reported, the rest still run, and the code is 1."""
    from vllm import LLM

    start = LLM.__init__

    def no_room(self: Any, *positional: Any, **arguments: Any) -> None:
        if "rope_parameters" in (arguments.get("hf_overrides") or {}):
            raise MemoryError("no room\nand a long explanation")
        start(self, *positional, **arguments)

    monkeypatch.setattr(LLM, "__init__", no_room)
    assert main([*command(tiny, data, tmp_path, "infinitebench", *LENGTHS), "--baselines=full,yarn,window"]) == 1
    rows = {row["label"]: row for row in read(tmp_path)["suites"][0]["rows"]}
    assert [row["status"] for row in rows.values()] == ["measured", "failed", "measured", "measured"]
    assert rows["full attention, YaRN ×2"]["why"] == "MemoryError: no room"
    text = (tmp_path / "report.md").read_text()
    assert "full attention, YaRN ×2: failed: MemoryError: no room\n" in text
    answers = {path.name: path.read_text() for path in (tmp_path / "samples").iterdir()}
    assert len(set(answers.values())) == len(answers) == 3
    engines = [row.engine for row in in_process.rows]
    assert engines[0]["hf_overrides"] == {"max_position_embeddings": 1024}
    assert engines[1]["hf_overrides"]["rope_parameters"]["factor"] == 2
    for engine in engines:
        del engine["model"]
        engine.pop("hf_overrides", None), engine.pop("additional_config", None)
    assert all(engine == engines[0] for engine in engines)


@pytest.mark.slow
def test_killed_and_resumed(tiny: TinyPaths, data: Path, in_process: InProcess, tmp_path: Path) -> None:
    """Killed in the middle, the worker ends too; resumed, the model is asked only what is missing; the report is that
    of a run without interruption."""
    output, whole = tmp_path / "killed", tmp_path / "whole"
    line = [program("vllm-ahn"), *command(tiny, data, output, "longbench", *LENGTHS)]
    env = environment(tmp_path / "cache")
    with (tmp_path / "log").open("wb") as log:
        process = subprocess.Popen(line, stdout=log, stderr=log, env=env)
        try:
            wait_for(lambda: (output / "answers").exists() and len(kept_keys(output)) > 0, process)
            workers = psutil.Process(process.pid).children(recursive=True)
            assert workers
            process.send_signal(signal.SIGKILL)
            process.wait()
            _, alive = psutil.wait_procs(workers, timeout=30)
            assert not alive
        finally:
            end(process)
    before = kept_keys(output)
    assert 0 < len(before) < LONGBENCH and not (output / "report.json").exists()

    resumed = run(line, env=env, timeout=WAIT_S)
    assert resumed.returncode == 0, resumed.stderr
    assert f"{LONGBENCH - len(before)} asked, {len(before)} kept from before" in resumed.stderr
    assert (
        len(kept_keys(output)) == len(set(kept_keys(output))) == LONGBENCH
        and kept_keys(output)[: len(before)] == before
    )

    assert main(command(tiny, data, whole, "longbench", *LENGTHS)) == 0
    assert read(output)["suites"] == read(whole)["suites"]
    texts = [(folder / "report.md").read_text().partition("## How it was measured")[0] for folder in (output, whole)]
    assert texts[0] == texts[1] and resumed.stdout.startswith(texts[0])
    samples = [next((folder / "samples").iterdir()).read_text() for folder in (output, whole)]
    assert samples[0] == samples[1] and len(samples[0].splitlines()) == LONGBENCH


def wait_for(condition: Any, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + WAIT_S
    while not condition():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)


BAD = {
    "unknown suite": (["lveval"], "suite is 'lveval', expected one of lveval-128k, infinitebench, "),
    "unknown baseline": (["pg19", "--baselines=fall"], "--baselines: 'fall' is unknown, expected some of full, yarn"),
    "nothing to do": (["pg19", "--baselines="], "nothing to evaluate: expected --baselines, --ahn, or both"),
    "no data folder": (["pg19", "--data=nowhere"], "--data: nowhere is no folder, expected one with the data sets"),
    "data without a set": (["longbench", "--data={empty}"], "THUDM/LongBench: no data/dureader.jsonl and no data.zip"),
    "data without the book": (["pg19", "--data={empty}"], "emozilla/pg19-test: no such folder, expected"),
    "too short": (["longbench", "--max-model-len=512"], "--max-model-len is 512, expected at least 515"),
    "too short for RULER": (["ruler-128k", "--max-model-len=4095"], "--max-model-len is 4095, expected at least 4096"),
    "nothing leaves the window": (["pg19", "--max-model-len=9000"], "never leave window and sinks, 32640 + 128, "),
    "no number": (["pg19", "--limit=some"], "--limit is 'some', expected a whole number from 1"),
    "an argument of ours": (["pg19", '--engine-args={"seed": 1, "hf_overrides": {}}'], "hf_overrides is decided by"),
    "no object": (["pg19", "--engine-args=[1]"], "--engine-args: [1], expected a JSON object"),
    "no JSON": (["pg19", "--engine-args={dtype}"], "--engine-args: '{dtype}' is no JSON, expected an object"),
    "twice": (["pg19", "--dtype=half", '--engine-args={"dtype": "auto"}'], "both give dtype, expected one of them"),
    "no model": (["pg19", "--model={empty}"], "no config.json in it, expected"),
    "an AHN as the model": (["pg19", "--model={ahn}"], "has an AHN merged in (_ahn_implementation in its config.json)"),
    "a base as the AHN": (["pg19", "--ahn={base}"], "no _ahn_implementation, so this is no AHN checkpoint"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input(name: str, tiny: TinyPaths, in_process: InProcess, tmp_path: Path, capsys: Any) -> None:
    """One sentence, before anything starts."""
    flags, expected = BAD[name]
    (tmp_path / "empty").mkdir()
    places = {"{empty}": tmp_path / "empty", "{ahn}": tiny.ahn, "{base}": tiny.base}
    for place, path in places.items():
        flags = [flag.replace(place, str(path)) for flag in flags]
    assert main(["eval", f"--model={tiny.base}", f"--output={tmp_path / 'out'}", "--baselines=full", *flags]) == 1
    printed = capsys.readouterr()
    assert printed.err.startswith("error: ") and printed.err.count("\n") == 1 and expected in printed.err
    assert not printed.out and not in_process.rows and not (tmp_path / "out").exists()


def test_answers_are_found_by_all_that_decides_them(tmp_path: Path) -> None:
    path = tmp_path / "new" / "answers.sqlite"
    answers = Answers(path, {"model": "a", "window": 64})
    key = answers.key({"tokens": "1"})
    assert answers.get(key) is None
    answers.put(key, {"text": "ja 😀\u2028"})
    again = Answers(path, {"window": 64, "model": "a"})
    assert again.get(again.key({"tokens": "1"})) == {"text": "ja 😀\u2028"}
    again.put("other", 1)
    assert answers.get("other") == 1
    for changed in (Answers(path, {"model": "a", "window": 65}), Answers(path, {"model": "b", "window": 64})):
        assert changed.get(changed.key({"tokens": "1"})) is None
    assert again.get(again.key({"tokens": "2"})) is None
    other = tmp_path / "other"
    other.write_text("what\n" * 1000)
    with pytest.raises(AHNError, match=r"other: file is not a database, expected answers that an evaluation wrote"):
        Answers(other, {})


def test_other_weights_in_the_same_place_are_another_model(tmp_path: Path) -> None:
    folder = make_tiny(tmp_path).base
    name, files, _ = pinned(str(folder))
    assert (name, files) == pinned(str(folder))[:2]
    weights = next(folder.glob("*.safetensors"))
    os.utime(weights, ns=(0, 0))
    assert pinned(str(folder))[1] not in (files, "")
    (folder / "generation_config.json").write_text("{}")
    assert len({files, pinned(str(folder))[1]}) == 2


def test_only_one_at_a_time(tmp_path: Path) -> None:
    with FileLock(tmp_path / ".lock"), pytest.raises(AHNError, match="another evaluation is at work in"):
        runner.run_plan([], tmp_path)


def test_why_a_worker_was_killed(tmp_path: Path) -> None:
    """A system that runs out of memory kills without a word."""
    log = tmp_path / "log"
    log.write_text("INFO all is well\nValueError: first\ntorch.OutOfMemoryError: CUDA out of memory. Tried\n")
    assert runner.why_ended(-9, log) == "its process was ended by SIGKILL, as the system does when memory runs out"
    assert (
        runner.why_ended(1, log) == "its process ended with code 1: torch.OutOfMemoryError: CUDA out of memory. Tried"
    )


def test_reports_stay_comparable_only_with_the_papers_setting() -> None:
    suite = SUITES["lveval-128k"]
    same = Setting(suite, suite.max_model_len, suite.window, suite.sinks)
    assert same.departures() == [] and same.lm_eval() == ("ahn_lveval_128k", {}, "score")
    for change in ({"window": 100}, {"sinks": 0}, {"limit": 5}, {"max_model_len": 131_072}):
        assert len(dataclasses.replace(same, **change).departures()) == 1
    shorter = dataclasses.replace(same, max_model_len=131_072)
    assert shorter.lm_eval()[1] == {"max_prompt_tokens": 131_072 - 64}
    # Room to spare is no departure: the prompts are the paper's.
    assert dataclasses.replace(same, max_model_len=256_064).departures() == []
