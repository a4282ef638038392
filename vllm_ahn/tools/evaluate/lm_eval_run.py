"""A suite of lm-eval's tasks with one method: what a worker does for it."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

from vllm_ahn.errors import AHNError
from vllm_ahn.tools.evaluate import TASKS
from vllm_ahn.tools.evaluate.answers import Answers
from vllm_ahn.tools.evaluate.jobs import Job
from vllm_ahn.tools.evaluate.packages import require

SEED = 0
"""RULER's samples are drawn anew for every run, from Python's own generator."""


def evaluate(
    job: Job,
    answers: Answers,
    announce: Callable[[dict[str, int]], None],
    answered: Callable[[str, bool], None],
) -> dict[str, Any]:
    """Runs the tasks; `announce` and `answered` are `KeepingVLLM`'s.

    Returns:
        ``scores``: for each task ``score`` and ``stderr`` (0 to 1, None if lm-eval has none), and ``samples`` of the
        ``all`` that the set has; ``samples``: every answer with its score.

    Raises:
        AHNError: data or metric are not there.
    """
    require("lm_eval", "eval")
    import lm_eval
    from lm_eval.tasks import TaskManager

    from vllm_ahn.tools.evaluate.language_model import KeepingVLLM

    questions = job.questions
    metadata = {"pretrained": job.engine["model"], **questions["metadata"]}
    if "tokenizer_revision" in job.engine:
        metadata["tokenizer_revision"] = job.engine["tokenizer_revision"]
    tasks = TaskManager(include_path=str(TASKS), include_defaults=questions["lm_eval_tasks"], metadata=metadata)
    random.seed(SEED)
    # Before the engine: what is wrong with the data is said at once.
    group = next(iter(tasks.load([questions["group"]])["groups"].values()))
    engine = {name: value for name, value in job.engine.items() if name != "model"}
    model = KeepingVLLM(answers, announce, answered, pretrained=job.engine["model"], batch_size="auto", **engine)
    results = lm_eval.simple_evaluate(
        model, tasks=[group], task_manager=tasks, limit=questions["limit"], random_seed=SEED, log_samples=True
    )
    assert results is not None  # only ranks other than 0 get none
    metric = questions["metric"]
    scores, samples = {}, []
    for task, logged in results["samples"].items():
        values = results["results"][task]
        if f"{metric},none" not in values:
            raise AHNError(f"{task}: lm-eval reports no {metric}, expected it among {', '.join(values)}")
        stderr = values.get(f"{metric}_stderr,none")
        count = results["n-samples"][task]
        scores[task] = {
            "score": float(values[f"{metric},none"]),
            "stderr": float(stderr) if isinstance(stderr, (int, float)) else None,
            "samples": count["effective"],
            "all": count["original"],
        }
        for sample in logged:
            values = {"task": task, "document": sample["doc_id"], "score": sample[metric]}
            samples.append({**values, "answer": sample["filtered_resps"][0], "expected": sample["target"]})
    return {"scores": scores, "samples": samples}
