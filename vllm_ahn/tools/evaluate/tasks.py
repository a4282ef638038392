"""``vllm-ahn tasks``: the evaluation tasks as files for lm-eval's ``--include_path``.

lm-eval finds a task by its name only if the task has a YAML file of its own. So one is written for every set of
``benchmarks.toml``, and one for every group.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vllm_ahn.errors import AHNError
from vllm_ahn.tools.evaluate.benchmarks import SETS

RULER_GROUPS = {f"ahn_ruler_niah_{length // 1024}k": length for length in (4096, 8192, 16384, 32768, 65536, 131072)}
"""Groups of RULER's needles, and their prompts' tokens, with the answer: the lengths that lm-eval has a metric for."""

_NEEDLES = ("single_1", "single_2", "single_3", "multikey_1", "multikey_2", "multikey_3", "multiquery", "multivalue")
NIAH_TASKS = tuple(f"niah_{name}" for name in _NEEDLES)
"""lm-eval's own tasks for RULER's needles."""

_TASK = """\
task: {task}
custom_dataset: !function vllm_ahn.tools.evaluate.benchmarks.load
dataset_kwargs: {{subset: {task}}}
test_split: test
output_type: generate_until
doc_to_text: !function vllm_ahn.tools.evaluate.prompts.doc_to_text
doc_to_target: "{{{{answers[0]}}}}"
process_results: !function vllm_ahn.tools.evaluate.benchmarks.process_results
num_fewshot: 0
fewshot_config: {{samples: []}}
generation_kwargs: {{until: [], do_sample: false, temperature: 0.0, max_gen_toks: {max_answer_tokens}}}
metric_list: [{{metric: score, aggregation: mean, higher_is_better: true}}]
metadata: {{version: 1.0}}
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add nothing: the command has no arguments."""


def run(args: argparse.Namespace) -> int:
    """Print the folder and return 0."""
    print(tasks_folder())
    return 0


def task_files() -> dict[str, str]:
    """Return the text of every task's and group's file by file name."""
    files = {task: _TASK.format(task=task, max_answer_tokens=found.max_answer_tokens) for task, found in SETS.items()}
    groups = {}
    for group in dict.fromkeys(found.group for found in SETS.values()):
        groups[group] = _group(group, "score", [task for task, found in SETS.items() if found.group == group])
    for group, length in RULER_GROUPS.items():
        metadata = {"version": 1.0, "max_seq_lengths": [length]}
        groups[group] = _group(group, str(length), [{"task": task, "metadata": metadata} for task in NIAH_TASKS])
    files |= {group: json.dumps(content, indent=1) for group, content in groups.items()}
    return {f"{name}.yaml": text for name, text in files.items()}


def tasks_folder() -> Path:
    """Write `task_files` where they are missing below the user's cache folder, and return their folder.

    Raises:
        AHNError: the folder cannot be written.
    """
    files = task_files()
    digest = hashlib.sha256(json.dumps(files).encode()).hexdigest()[:12]
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "vllm-ahn" / f"tasks-{digest}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, text in files.items():
            if not (folder / name).exists():
                unfinished = folder / f"{name}.{os.getpid()}"
                unfinished.write_text(text, encoding="utf-8")
                unfinished.replace(folder / name)
    except OSError as error:
        raise AHNError(f"{folder}: {error.strerror}, expected a cache folder (set XDG_CACHE_HOME)") from None
    return folder


def _group(name: str, metric: str, tasks: Sequence[Any]) -> dict[str, Any]:
    aggregate = [{"metric": metric, "weight_by_size": False}]
    return {"group": name, "task": tasks, "aggregate_metric_list": aggregate, "metadata": {"version": 1.0}}
