"""A suite of lm-eval's tasks with one method: what a worker does for it. Imports lm-eval."""

from __future__ import annotations

import itertools
import random
import types
from collections import Counter
from collections.abc import Callable
from typing import Any

import lm_eval
from lm_eval.models.vllm_causallms import VLLM
from lm_eval.tasks import TaskManager

from vllm_ahn.errors import AHNError
from vllm_ahn.tools.evaluate.answers import Answers, ask
from vllm_ahn.tools.evaluate.plan import Row
from vllm_ahn.tools.evaluate.tasks import RULER_GROUPS, tasks_folder

SEED = 0
"""RULER's samples are drawn anew for every run, from Python's own generator."""

SLICE = 64
"""Requests that are tokenized at once. The texts are long: all of a suite's tokens would take gigabytes."""


class KeepingVLLM(VLLM):
    """lm-eval's vLLM model, with answers that are kept as they come."""

    def __init__(self, answers: Answers, send: Callable[..., None], **arguments: Any) -> None:
        """Start the engine.

        Args:
            send: takes the worker's events.
            arguments: of `vllm.LLM`, with ``pretrained`` for the model.
        """
        super().__init__(**arguments)
        self._answers = answers
        self._send = send
        self._task = ""

    def generate_until(self, requests: list[Any], disable_tqdm: bool = True) -> list[str]:
        """Generate as lm-eval does, task by task and in slices."""
        self._send(tasks=dict(Counter(request.task_name for request in requests)))
        texts: list[str] = []
        for self._task, grouped in itertools.groupby(requests, lambda request: request.task_name):
            of_task = list(grouped)
            for start in range(0, len(of_task), SLICE):
                texts += super().generate_until(of_task[start : start + SLICE], disable_tqdm=True)
        return texts

    def _model_generate(self, requests: Any, generate: bool = False, sampling_params: Any = None) -> list[Any]:
        # The last step before the engine: tokens and parameters are final here.
        if not generate:
            raise NotImplementedError("a suite asks for text, not for the likelihood of one")
        texts = ask(
            self.model,
            list(zip(requests, sampling_params, strict=True)),
            self._answers,
            read=lambda output: output.outputs[0].text,
            answered=lambda kept: self._send(answer=self._task, kept=kept),
        )
        # What lm-eval reads of a RequestOutput.
        return [types.SimpleNamespace(outputs=[types.SimpleNamespace(text=text)]) for text in texts]


def evaluate(row: Row, answers: Answers, send: Callable[..., None]) -> dict[str, Any]:
    """Run the row's tasks.

    Args:
        send: takes the worker's events.

    Returns:
        ``scores``: for each task ``score`` and ``stderr`` (0 to 1, None if lm-eval has none), and ``samples`` out of
        the ``all`` that the set has; ``average``, the group's score; ``samples``: every answer with its score.

    Raises:
        AHNError: data or metric are missing.
    """
    group, metadata, metric = row.setting.lm_eval()
    engine = dict(row.engine)
    metadata |= {"pretrained": engine["model"], "tokenizer_revision": engine.get("tokenizer_revision")}
    tasks = TaskManager(
        include_path=str(tasks_folder()),
        include_defaults=group in RULER_GROUPS,  # lm-eval's own tasks, which take seconds to find
        metadata=metadata,
    )
    random.seed(SEED)
    # Before the engine, so that an error in the data shows at once.
    [loaded] = tasks.load([group])["groups"].values()
    model = KeepingVLLM(answers, send, pretrained=engine.pop("model"), batch_size="auto", **engine)
    results = lm_eval.simple_evaluate(
        model, tasks=[loaded], task_manager=tasks, limit=row.setting.limit, random_seed=SEED, log_samples=True
    )
    assert results is not None  # only ranks other than 0 get none
    scores, samples = {}, []
    for task, logged in results["samples"].items():
        values, count = results["results"][task], results["n-samples"][task]
        if f"{metric},none" not in values:
            raise AHNError(f"{task}: lm-eval reports no {metric}, expected it among {', '.join(values)}")
        stderr = values.get(f"{metric}_stderr,none")
        scores[task] = {
            "score": float(values[f"{metric},none"]),
            "stderr": float(stderr) if isinstance(stderr, (int, float)) else None,
            "samples": count["effective"],
            "all": count["original"],
        }
        for sample in logged:
            found = {"task": task, "document": sample["doc_id"], "score": sample[metric]}
            samples.append({**found, "answer": sample["filtered_resps"][0], "expected": sample["target"]})
    return {"scores": scores, "average": results["results"][loaded.name][f"{metric},none"], "samples": samples}
