"""``vllm-ahn eval`` and ``perplexity`` inside the test process, where an engine starts in a second."""

from __future__ import annotations

import gc
import io
import json
from pathlib import Path
from typing import Any

import pytest
from vllm.distributed import cleanup_dist_env_and_memory

from support.evaluation_data import ENGLISH, write_data
from vllm_ahn.tools.evaluate import runner
from vllm_ahn.tools.evaluate.jobs import Job
from vllm_ahn.tools.evaluate.progress import Progress
from vllm_ahn.tools.evaluate.worker import Worker, sentence

FLAGS = [
    "--dtype=float32",
    f"--kv-cache-memory-bytes={64 << 20}",
    '--engine-args={"enforce_eager": true, "block_size": 32, "distributed_executor_backend": "uni"}',
]
"""Of the engine, small and quick to start."""


def write_all_data(folder: Path) -> Path:
    """Samples of every suite's data in the hub's layout; returns `folder`."""
    write_data(folder)
    book = folder / "emozilla/pg19-test/A book.txt"
    book.parent.mkdir(parents=True)
    book.write_text("\n".join(f"Chapter {number}. {ENGLISH}" for number in range(60)), encoding="utf-8")
    return folder


class InProcess:
    """In place of worker processes; remembers the jobs that were run."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.jobs: list[Job] = []
        monkeypatch.setattr(runner, "_run_worker", self._run)

    def _run(self, job: Job, folder: Path, progress: Progress) -> tuple[dict[str, Any] | None, str]:
        self.jobs.append(job)
        events = io.StringIO()
        job = Job(**json.loads(json.dumps(job.__dict__)))  # as it comes through the pipe
        worker = Worker(job, folder / "answers" / f"{job.name}.jsonl", events)
        try:
            worker.send(result=worker.run())
        except Exception as error:
            worker.send(error=sentence(error))
        finally:
            gc.collect()
            cleanup_dist_env_and_memory()
        return runner._follow(io.StringIO(events.getvalue()), progress)
