"""All evaluation tasks through the real lm-eval: scores of known answers, and what vLLM is asked."""

from __future__ import annotations

import gc
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lm_eval.tasks
import pytest
from lm_eval import simple_evaluate
from lm_eval.api.model import LM
from lm_eval.tasks import TaskManager

from support.evaluation_data import (
    INFINITEBENCH_CASES,
    LONGBENCH_CASES,
    LVEVAL_RULES,
    answers_by_question,
    expected_scores,
    write_data,
)
from vllm_ahn.errors import AHNError
from vllm_ahn.tools.cli import main
from vllm_ahn.tools.evaluate.prompts import load_tokenizer
from vllm_ahn.tools.evaluate.suites import METHODS, MODELS, SUITES, Suite, find_suite
from vllm_ahn.tools.evaluate.tasks import NIAH_TASKS, tasks_folder
from vllm_ahn.tools.tiny import TinyPaths, make_tiny

LENGTHS = ("16k", "32k", "64k", "128k", "256k")
LIMIT = 700
"""Tokens of a prompt in the runs here: without the limit they have more than a thousand."""

OWN = [suite for suite in SUITES.values() if suite.name in ("lveval-128k", "infinitebench", "longbench")]
NEW_TOKENS = {"factrecall": 16, "lveval": 64, "infinitebench": 256, "dureader": 128, "narrativeqa": 128, "qmsum": 512}
"""The first that is part of a task's name; 32 for the others."""


class KnownAnswers(LM):
    """A model that looks its answers up."""

    def generate_until(self, requests: list[Any]) -> list[str]:
        answers = answers_by_question()
        return [next(said for question, said in answers.items() if question in request.args[0]) for request in requests]

    def loglikelihood(self, requests: list[Any]) -> list[Any]:
        raise NotImplementedError

    def loglikelihood_rolling(self, requests: list[Any]) -> list[Any]:
        raise NotImplementedError


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> TinyPaths:
    return make_tiny(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    write_data(folder, LENGTHS)
    return folder


def manager(tiny: TinyPaths, data: Path, **metadata: Any) -> TaskManager:
    return TaskManager(
        include_path=str(tasks_folder()),
        include_defaults=False,
        metadata={"pretrained": str(tiny.base), "data_folder": str(data)} | metadata,
    )


def new_tokens(task: str) -> int:
    return next((count for part, count in NEW_TOKENS.items() if part in task), 32)


def test_every_task_is_found_by_name(tiny: TinyPaths, data: Path) -> None:
    tasks = manager(tiny, data)
    expected = {f"ahn_lveval_{name}_{length}" for name in LVEVAL_RULES for length in LENGTHS}
    expected |= {f"ahn_infinitebench_{name}" for name in INFINITEBENCH_CASES}
    expected |= {f"ahn_longbench_{name}" for name in LONGBENCH_CASES}
    assert set(tasks.all_subtasks) == expected
    groups = {f"ahn_lveval_{length}" for length in LENGTHS} | {suite.group for suite in SUITES.values()} - {""}
    groups |= {f"ahn_ruler_niah_{length}" for length in ("4k", "8k", "16k", "32k", "64k", "128k")}
    assert set(tasks.all_groups) == groups
    # lm-eval has tasks called longbench_hotpotqa and infinitebench itself.
    assert all(name.startswith("ahn_") for name in tasks.all_tasks)


@pytest.mark.parametrize("length", LENGTHS)
def test_every_length_of_lveval(tiny: TinyPaths, data: Path, length: str) -> None:
    loaded = manager(tiny, data).load([f"ahn_lveval_{length}"])
    assert list(loaded["tasks"]) == [f"ahn_lveval_{name}_{length}" for name in LVEVAL_RULES]
    for task in loaded["tasks"].values():
        for doc in task.test_docs():
            assert doc["prompt_settings"]["max_tokens"] == 2000 * int(length[:-1])
            assert doc["subset"] in task.task_name and doc["subset"].endswith(length)


def test_scores_of_known_answers(tiny: TinyPaths, data: Path) -> None:
    groups = [suite.group for suite in OWN]
    results = simple_evaluate(KnownAnswers(), tasks=groups, task_manager=manager(tiny, data), bootstrap_iters=0)
    assert results is not None
    expected = expected_scores()
    for suite in OWN:
        found = {task: results["results"][task]["score,none"] for task in suite.tasks}
        assert found == pytest.approx({task: expected[task] for task in suite.tasks}, abs=1e-7)
        average = 100 * sum(expected[task] for task in suite.tasks) / len(suite.tasks)
        assert average > 10
        assert 100 * results["results"][suite.group]["score,none"] == pytest.approx(average, abs=1e-5)


@pytest.fixture
def model(tiny: TinyPaths) -> Iterator[tuple[Any, dict[tuple[int, ...], Any]]]:
    """lm-eval's vLLM model, and what it asks the engine: the sampling parameters of every prompt, tokens."""
    from lm_eval.models.vllm_causallms import VLLM
    from vllm.distributed import cleanup_dist_env_and_memory

    arguments: dict[str, Any] = {
        "additional_config": {"ahn": {"checkpoint": str(tiny.ahn), "window": 128, "sinks": 16}},
        "dtype": "float32",
        "max_model_len": 2048,
        "block_size": 32,
        "kv_cache_memory_bytes": 64 << 20,
        "enforce_eager": True,
        "distributed_executor_backend": "uni",
    }
    lm = VLLM(pretrained=str(tiny.base), **arguments)
    asked: dict[tuple[int, ...], Any] = {}
    original = lm._model_generate

    def spy(requests: list[list[int]], generate: bool, sampling_params: list[Any]) -> Any:
        asked.update({tuple(tokens): params for tokens, params in zip(requests, sampling_params, strict=True)})
        return original(requests=requests, generate=generate, sampling_params=sampling_params)

    lm._model_generate = spy
    yield lm, asked
    lm.model.llm_engine.engine_core.shutdown()
    del lm
    gc.collect()
    cleanup_dist_env_and_memory()


@pytest.mark.slow
def test_every_task_through_vllm(
    tiny: TinyPaths, data: Path, needles: list[int], model: tuple[Any, dict[tuple[int, ...], Any]]
) -> None:
    """One engine for all suites: prompts have the length that the limit says, and answers theirs."""
    lm, asked = model
    suites = [*OWN, SUITES["ruler-128k"]]
    tasks = TaskManager(
        include_path=[str(tasks_folder()), str(Path(lm_eval.tasks.__file__).parent / "ruler")],
        include_defaults=False,
        metadata={"pretrained": str(tiny.base), "data_folder": str(data), "max_prompt_tokens": LIMIT},
    )
    groups = [suite.group for suite in suites]
    results = simple_evaluate(lm, tasks=groups, task_manager=tasks, bootstrap_iters=0)
    assert results is not None
    assert needles == [131072] * len(NIAH_TASKS)
    tokenizer = load_tokenizer(str(tiny.base))
    for suite in suites:
        metric = "score" if suite in OWN else "131072"
        for task in suite.tasks:
            samples = results["samples"][task]
            scores = [sample[metric] for sample in samples]
            assert results["results"][task][f"{metric},none"] == pytest.approx(statistics.fmean(scores))
            for sample in samples:
                prompt = sample["arguments"][0][0]
                params = asked[tuple(tokenizer(prompt).input_ids)]
                assert params.temperature == 0
                assert params.stop == [tokenizer.eos_token]
                if suite in OWN:
                    assert params.max_tokens == new_tokens(task)
                    check_prompt(task, prompt, sample["doc"], tokenizer)
    assert len(asked) == sum(len(results["samples"][task]) for suite in suites for task in suite.tasks)


def check_prompt(task: str, prompt: str, doc: dict[str, Any], tokenizer: Any) -> None:
    """`prompt` is that of `doc`, cut to `LIMIT` where the paper cuts."""
    chat = "longbench" in task and "triviaqa" not in task and "infinitebench" not in task
    assert prompt.startswith("<|im_start|>user\n") == chat
    # Chinese characters are three tokens and go as a whole.
    assert LIMIT - 4 <= len(tokenizer(prompt).input_ids) <= LIMIT
    prompt = prompt.removeprefix("<|im_start|>user\n").removesuffix("<|im_end|>\n<|im_start|>assistant\n")
    assert prompt.startswith(doc["before"]) and prompt.endswith(doc["after"])
    kept = prompt[len(doc["before"]) : len(prompt) - len(doc["after"])]
    if "lveval" not in task:
        assert kept and doc["context"].endswith(kept)
        return
    whole = tokenizer(doc["before"] + doc["context"] + doc["after"]).input_ids
    found = tokenizer(prompt).input_ids
    half = LIMIT // 2 - 3
    assert found[:half] == whole[:half] and found[-half:] == whole[-half:]


def test_the_paper_s_figures() -> None:
    lveval, longbench, ruler = (SUITES[name].paper for name in ("lveval-128k", "longbench", "ruler-128k"))
    assert [lveval["7B", method, None] for method in METHODS] == [3.62, 5.34, 6.21, 6.82, 6.54]
    assert [longbench.get(("14B", method, None)) for method in METHODS] == [None, 40.65, 41.34, 41.83, 41.90]
    assert ruler["7B", "GDN", "niah_single_1"] == 26.8
    assert ("7B", "GDN", None) not in ruler
    for suite in SUITES.values():
        for model, method, task in suite.paper:
            assert model in MODELS and method in METHODS
            assert task is None or task in suite.tasks


@pytest.mark.parametrize("suite", SUITES.values(), ids=list(SUITES))
def test_a_suite_s_prompts_fit_its_engine(suite: Suite, data: Path, tiny: TinyPaths) -> None:
    if suite not in OWN:
        assert suite.max_model_len >= suite.window + suite.sinks
        return
    for task in manager(tiny, data).load([suite.group])["tasks"].values():
        limit = task.test_docs()[0]["prompt_settings"]["max_tokens"]
        assert limit + task.config.generation_kwargs["max_gen_toks"] <= suite.max_model_len


def test_unknown_suites() -> None:
    with pytest.raises(AHNError, match="suite is 'lveval', expected one of lveval-128k, infinitebench"):
        find_suite("lveval")


def test_the_command_prints_the_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Files that are missing are written, those of another version stay apart, and an unwritable folder is said."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert main(["tasks"]) == 0
    folder = Path(capsys.readouterr().out.strip())
    assert folder.is_relative_to(tmp_path) and len(list(folder.iterdir())) == (55 + 2 + 6) + (5 + 2 + 6)
    file = folder / "ahn_lveval_cmrc_mixup_128k.yaml"
    text = file.read_text()
    file.unlink()
    assert tasks_folder() == folder and file.read_text() == text
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert main(["tasks"]) == 1
    assert "Not a directory, expected a cache folder (set XDG_CACHE_HOME)\n" in capsys.readouterr().err
