"""``vllm-ahn eval`` and ``perplexity`` inside the test process, where an engine starts in a second."""

from __future__ import annotations

import contextlib
import gc
import json
import pickle
import sqlite3
from pathlib import Path
from typing import Any

import pytest
import vllm
from lm_eval.models import vllm_causallms
from vllm.distributed import cleanup_dist_env_and_memory

from support.evaluation_data import ENGLISH, write_data
from vllm_ahn.tools.evaluate import runner, worker
from vllm_ahn.tools.evaluate.plan import Row
from vllm_ahn.tools.evaluate.progress import Progress

FLAGS = [
    "--dtype=float32",
    f"--kv-cache-memory-bytes={64 << 20}",
    '--engine-args={"enforce_eager": true, "block_size": 32, "distributed_executor_backend": "uni"}',
]
"""Of the engine, small and quick to start."""


def write_all_data(folder: Path) -> Path:
    """Samples of every suite's data in the hub's layout; returns `folder`."""
    write_data(folder, repeat=6)
    book = folder / "emozilla/pg19-test/A book.txt"
    book.parent.mkdir(parents=True)
    book.write_text("\n".join(f"Chapter {number}. {ENGLISH}" for number in range(16)), encoding="utf-8")
    return folder


class InProcess:
    """In place of worker processes; remembers the rows that were run, and keeps an engine for rows that share one."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.rows: list[Row] = []
        self.engines = 0
        self._arguments, self._llm = "", None
        self._start = vllm.LLM
        monkeypatch.setattr(runner, "_run_worker", self._run)
        monkeypatch.setattr(vllm, "LLM", self._engine)
        monkeypatch.setattr(vllm_causallms, "LLM", self._engine)

    def close(self) -> None:
        """Ends the engine."""
        self._arguments, self._llm = "", None
        gc.collect()
        cleanup_dist_env_and_memory()

    def _engine(self, **arguments: Any) -> Any:
        if self._arguments != (written := json.dumps(arguments, sort_keys=True)):
            self.close()
            self._llm = self._start(**arguments)
            self._arguments = written
            self.engines += 1
        return self._llm

    def _run(self, row: Row, answers: Path, log: Path, progress: Progress) -> dict[str, Any]:
        self.rows.append(row)
        row = pickle.loads(pickle.dumps(row))  # as it comes to the process
        events: list[dict[str, Any]] = []
        try:
            events.append({"result": worker.run(row, answers, lambda **event: events.append(event))})
        except Exception as error:
            events.append({"error": worker.sentence(error)})
        last = runner.follow(events, progress)
        assert last is not None
        return last


def kept_keys(output: Path) -> list[str]:
    """The keys of all answers that are on the disk."""
    keys = []
    for path in sorted((output / "answers").glob("*.sqlite")):
        with contextlib.closing(sqlite3.connect(path)) as database, contextlib.suppress(sqlite3.OperationalError):
            keys += [key for (key,) in database.execute("SELECT key FROM answers ORDER BY rowid")]
    return keys
