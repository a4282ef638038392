"""The task in ``examples/lm_eval_task`` by the real ``lm_eval`` command, against the reference."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer

from support.paths import EXAMPLES
from support.servers import environment, program, run
from vllm_ahn.reference import ReferenceModel, from_folders
from vllm_ahn.tools.tiny import TinyPaths, make_tiny

TASK = "ahn_stories"
TASKS = EXAMPLES / "lm_eval_task"
STORIES = len((TASKS / "stories.jsonl").read_text(encoding="utf-8").splitlines())
WINDOW, SINKS = 32, 4
TOLERANCE = 2e-3
"""Of a sum of some ten logprobs, float32."""


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> TinyPaths:
    return make_tiny(tmp_path_factory.mktemp("tiny"), memory="GatedDeltaNet")


def evaluate(tiny: TinyPaths, ahn: Any, folder: Path) -> tuple[str, list[dict[str, Any]]]:
    """Runs the task; returns what the command printed and its samples."""
    model = {
        "pretrained": str(tiny.base),
        "additional_config": {"ahn": ahn},
        "dtype": "float32",
        "kv_cache_memory_bytes": 128 << 20,
        "enforce_eager": True,
    }
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


def test_task_with_a_checkpoint_and_nothing_else(tiny: TinyPaths, tmp_path: Path) -> None:
    """``{"ahn": CKPT}``: the default window, in which every story fits."""
    printed, samples = evaluate(tiny, str(tiny.ahn), tmp_path)
    assert f"AHN: GatedDeltaNet from {tiny.ahn}, window 32640, sinks 128" in printed
    base = expected(from_folders(tiny.base), tiny.base, samples)
    assert (loglikelihoods(samples) - base).abs().max() <= TOLERANCE
    assert 0 <= table_value(printed, "acc_norm") <= 1
