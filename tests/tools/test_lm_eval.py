"""The task in ``examples/lm_eval_task`` by lm-eval, once by its real command, against the reference."""

from __future__ import annotations

import gc
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from lm_eval import simple_evaluate
from lm_eval.models.vllm_causallms import VLLM
from lm_eval.tasks import TaskManager
from tokenizers import Tokenizer
from vllm.distributed import cleanup_dist_env_and_memory

from support.paths import EXAMPLES
from support.servers import environment, program, run
from vllm_ahn.reference import ReferenceModel, from_folders
from vllm_ahn.tools.tiny import TinyPaths, make_tiny

TASK = "ahn_stories"
TASKS = EXAMPLES / "lm_eval_task"
STORIES = len((TASKS / "stories.jsonl").read_text(encoding="utf-8").splitlines())
WINDOW, SINKS = 32, 4
ENGINE = {"dtype": "float32", "kv_cache_memory_bytes": 128 << 20, "enforce_eager": True}
TOLERANCE = 2e-3
"""Of a sum of some ten logprobs, float32."""


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> TinyPaths:
    return make_tiny(tmp_path_factory.mktemp("tiny"), memory="GatedDeltaNet")


def evaluate(tiny: TinyPaths, ahn: Any, folder: Path) -> tuple[str, list[dict[str, Any]]]:
    """Runs the task; returns what the command printed and its samples."""
    model = {**ENGINE, "pretrained": str(tiny.base), "additional_config": {"ahn": ahn}}
    command = [program("lm_eval"), "--model", "vllm", "--model_args", json.dumps(model)]
    command += ["--include_path", str(TASKS), "--tasks", TASK]
    command += ["--output_path", str(folder), "--log_samples"]
    result = run(command, env=environment(folder / "cache"), timeout=300)
    assert result.returncode == 0, result.stderr[-4000:]
    (file,) = folder.rglob(f"samples_{TASK}_*.jsonl")
    return result.stdout + result.stderr, [json.loads(line) for line in file.read_text().splitlines()]


def table_value(printed: str, metric: str) -> float:
    """A value in the table that lm-eval prints."""
    match = re.search(rf"\|\s*{metric}\s*\|[^|]*\|\s*([0-9.]+)\s*\|", printed)
    assert match is not None, printed[-2000:]
    return float(match[1])


def loglikelihoods(samples: list[dict[str, Any]]) -> torch.Tensor:
    """``[stories, answers]``, as lm-eval got them from the engine."""
    return torch.tensor([[float(response[0][0]) for response in sample["resps"]] for sample in samples])


@torch.no_grad()
def expected(model: ReferenceModel, base: Path, samples: list[dict[str, Any]]) -> torch.Tensor:
    """``[stories, answers]`` of a reference model."""
    tokenizer = Tokenizer.from_file(str(base / "tokenizer.json"))
    rows = []
    for sample in samples:
        row = []
        for argument in sample["arguments"].values():
            context, continuation = argument["arg_0"], argument["arg_1"]
            tokens = torch.tensor(tokenizer.encode(context + continuation).ids)
            start = len(tokenizer.encode(context).ids)
            logprobs = model(tokens[None])[0, :-1].log_softmax(-1)
            row.append(float(logprobs.gather(1, tokens[1:, None])[start - 1 :].sum()))
        rows.append(row)
    return torch.tensor(rows)


@pytest.mark.slow
def test_task_with_a_small_window(tiny: TinyPaths, tmp_path: Path) -> None:
    """Stories are longer than the window: lm-eval's figures are those of the memory."""
    assert tiny.ahn is not None
    ahn = {"checkpoint": str(tiny.ahn), "window": WINDOW, "sinks": SINKS}
    printed, samples = evaluate(tiny, ahn, tmp_path)
    assert len(samples) == STORIES
    values = loglikelihoods(samples)
    reference = expected(from_folders(tiny.base, tiny.ahn, WINDOW, SINKS), tiny.base, samples)
    assert (values - reference).abs().max() <= TOLERANCE
    base = expected(from_folders(tiny.base), tiny.base, samples)
    assert (values - base).abs().min() > TOLERANCE and (values - base).abs().mean() > 100 * TOLERANCE, (
        "the base alone says the same"
    )
    targets = torch.tensor([int(sample["target"]) for sample in samples])
    accuracy = float((reference.argmax(1) == targets).float().mean())
    assert table_value(printed, "acc") == pytest.approx(accuracy, abs=1e-4)


def test_task_with_a_checkpoint_and_nothing_else(tiny: TinyPaths) -> None:
    """``{"ahn": CKPT}``: the default window, in which every story fits."""
    lm = VLLM(pretrained=str(tiny.base), **{**ENGINE, "additional_config": {"ahn": str(tiny.ahn)}})
    try:
        served = lm.model.llm_engine.vllm_config.additional_config["ahn"]
        assert (served["window"], served["sinks"]) == (32640, 128)
        tasks = TaskManager(include_path=str(TASKS), include_defaults=False)
        results = simple_evaluate(lm, tasks=[TASK], task_manager=tasks, bootstrap_iters=0)
        assert results is not None
    finally:
        del lm
        gc.collect()
        cleanup_dist_env_and_memory()
    samples = [
        sample | {"arguments": {n: {"arg_0": context, "arg_1": answer} for n, (context, answer) in enumerate(pairs)}}
        for sample in results["samples"][TASK]
        if (pairs := sample["arguments"])
    ]
    base = expected(from_folders(tiny.base), tiny.base, samples)
    assert (loglikelihoods(samples) - base).abs().max() <= TOLERANCE
    assert 0 <= results["results"][TASK]["acc_norm,none"] <= 1
