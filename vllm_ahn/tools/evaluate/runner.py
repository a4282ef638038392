"""Runs a plan, one worker process after another, and gives back what each of them measured.

In the output folder::

    answers/SUITE.METHOD.jsonl    every answer, as it came (`answers.Answers`)
    results/SUITE.METHOD.json     what a finished job measured; kept while the job stays the same
    samples/SUITE.METHOD.jsonl    every answer of a finished job with its score
    logs/SUITE.METHOD.log         what vLLM and lm-eval print
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from vllm_ahn.errors import AHNError
from vllm_ahn.tools.evaluate.engine import ENVIRONMENT
from vllm_ahn.tools.evaluate.jobs import Job
from vllm_ahn.tools.evaluate.plan import Row
from vllm_ahn.tools.evaluate.progress import Progress, duration

STOP_S = 60.0
"""Seconds that a worker has to end after its last word."""

_ERROR_LINE = re.compile(r"(?:^|\s)((?:[A-Za-z_]+\.)*[A-Za-z_]*(?:Error|Exception)): (.+)")


@dataclasses.dataclass(frozen=True)
class Outcome:
    """A row of the plan after it was run."""

    row: Row
    result: dict[str, Any] | None = None
    """What the worker measured; None if there was nothing to run or it failed."""

    error: str | None = None
    """Why it failed, one sentence."""


def run_plan(rows: Sequence[Row], folder: Path, progress: Progress) -> list[Outcome]:
    """Runs every row, one engine at a time, and returns the outcomes in their order. A row that fails is said, and the
    others go on.

    Raises `AHNError` if another process is at work in `folder`. When this is interrupted, its worker ends too.
    """
    with _only_one(folder):
        return [_run_row(row, folder, progress) for row in rows]


def _run_row(row: Row, folder: Path, progress: Progress) -> Outcome:
    if row.job is None:
        return Outcome(row)
    job = row.job
    progress.job(job.suite, job.label)
    file = folder / "results" / f"{job.name}.json"
    with contextlib.suppress(OSError, ValueError):
        result = json.loads(file.read_text(encoding="utf-8"))
        if result["key"] == job.key:
            progress.end(f"was finished on {result['finished']}")
            return Outcome(row, result)
    result, error = _run_worker(job, folder, progress)
    if result is None:
        log = folder / "logs" / f"{job.name}.log"
        progress.end(f"failed: {error} (see {log})")
        return Outcome(row, error=error)
    samples = result.pop("samples", None)
    if samples is not None:
        lines = "".join(json.dumps(sample, ensure_ascii=False) + "\n" for sample in samples)
        _write(folder / "samples" / f"{job.name}.jsonl", lines)
    _write(file, json.dumps(result, indent=2) + "\n")
    progress.end(f"{result['asked']} asked, {result['kept']} kept from before, in {duration(result['seconds'])}")
    return Outcome(row, result)


def _run_worker(job: Job, folder: Path, progress: Progress) -> tuple[dict[str, Any] | None, str]:
    log = folder / "logs" / f"{job.name}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    # lm-eval's RULER tasks name the data set of their essays, and a folder of that name is read if there is one.
    data = job.questions["metadata"].get("data_folder") if job.kind == "lm_eval" else None
    reading, writing = os.pipe()
    with log.open("wb") as sink, os.fdopen(reading, encoding="utf-8") as events:
        worker = subprocess.Popen(
            [sys.executable, "-P", "-m", "vllm_ahn.tools.evaluate.worker", str(writing)],
            stdin=subprocess.PIPE,
            stdout=sink,
            stderr=subprocess.STDOUT,
            text=True,
            pass_fds=[writing],
            cwd=data,
            env={**os.environ, **ENVIRONMENT, **({"NLTK_DATA": f"{data}/nltk_data"} if data else {})},
            start_new_session=True,  # a group of its own, so that all of it can be ended
        )
        os.close(writing)
        try:
            assert worker.stdin is not None
            order = {"job": dataclasses.asdict(job), "answers": str(folder / "answers" / f"{job.name}.jsonl")}
            with contextlib.suppress(BrokenPipeError):  # it has ended; why is asked below
                worker.stdin.write(json.dumps(order) + "\n")
                worker.stdin.flush()
            result, error = _follow(events, progress)
            with contextlib.suppress(subprocess.TimeoutExpired):  # what it measured stands all the same
                worker.wait(STOP_S)
        finally:
            _end(worker)
            code = worker.wait()
    if result is None and not error:
        error = _why(code, log)
    return result, error


def _follow(events: Any, progress: Progress) -> tuple[dict[str, Any] | None, str]:
    for line in events:
        if not line.endswith("\n"):  # it was killed while it wrote
            break
        event = json.loads(line)
        if "phase" in event:
            progress.phase(event["phase"])
        elif "tasks" in event:
            progress.total(event["tasks"])
        elif "answer" in event:
            progress.answer(event["answer"], event["kept"])
        elif "result" in event:
            return event["result"], ""
        elif "error" in event:
            return None, event["error"]
    return None, ""


def _end(worker: subprocess.Popen[str]) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(worker.pid, signal.SIGKILL)


def _why(code: int, log: Path) -> str:
    """Why a worker ended without a word."""
    if code < 0:
        return f"its process was ended by {signal.Signals(-code).name}" + (
            ", as the system does when memory runs out" if code == -signal.SIGKILL else ""
        )
    found = _ERROR_LINE.findall(log.read_text(encoding="utf-8", errors="replace"))
    said = f": {found[-1][0]}: {found[-1][1].strip()}" if found else ""
    return f"its process ended with code {code}{said}"


def _write(path: Path, text: str) -> None:
    """Writes a file whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f"{path.name}.part")
    unfinished.write_text(text, encoding="utf-8")
    unfinished.replace(path)


@contextlib.contextmanager
def _only_one(folder: Path) -> Iterator[None]:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = (folder / ".lock").open("w")
    except OSError as error:
        raise AHNError(f"--output: {folder} cannot be written ({error.strerror}), expected a folder") from None
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise AHNError(
                f"--output: another evaluation is at work in {folder}, expected a folder of its own"
            ) from None
        yield
