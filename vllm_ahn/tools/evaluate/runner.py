"""Runs a plan, one worker process after another.

In the output folder::

    answers/SUITE.METHOD.sqlite   every answer, as it came (`answers.Answers`)
    results/SUITE.METHOD.json     what a finished row measured; kept while the row stays the same
    samples/SUITE.METHOD.jsonl    every answer of a finished row with its score
    logs/SUITE.METHOD.log         what vLLM and lm-eval print
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import multiprocessing
import os
import re
import signal
from collections.abc import Iterable, Iterator, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from tqdm import tqdm

from vllm_ahn.errors import AHNError
from vllm_ahn.tools.evaluate import worker
from vllm_ahn.tools.evaluate.plan import Row
from vllm_ahn.tools.evaluate.progress import Progress

STOP_S = 60.0
"""Seconds that a worker has to end after its last event."""

_ERROR_LINE = re.compile(r"(?:^|\s)((?:[A-Za-z_]+\.)*[A-Za-z_]*(?:Error|Exception)): (.+)")


@dataclasses.dataclass(frozen=True)
class Outcome:
    """A row of the plan after it was run."""

    row: Row
    result: dict[str, Any] | None = None
    """What the worker measured; None if the row was not run or failed."""

    error: str = ""
    """Why it failed, one sentence."""


def run_plan(rows: Sequence[Row], folder: Path) -> list[Outcome]:
    """Run every row, one engine at a time, and return the outcomes in their order.

    A failing row is reported; the rest still run. On an interruption the worker ends too. Raises `AHNError` if
    another process is at work in `folder`.
    """
    progress = Progress(sum(not row.not_run for row in rows))
    lock = FileLock(folder / ".lock", timeout=0)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except Timeout:
        raise AHNError(f"--output: another evaluation is at work in {folder}, expected a folder of its own") from None
    except OSError as error:
        raise AHNError(f"--output: {folder} cannot be written ({error.strerror}), expected a folder") from None
    with lock, contextlib.closing(progress):
        return [_run_row(row, folder, progress) for row in rows]


def _run_row(row: Row, folder: Path, progress: Progress) -> Outcome:
    if row.not_run:
        return Outcome(row)
    progress.start(f"{row.setting.suite.name}, {row.method.label}")
    file = folder / "results" / f"{row.name}.json"
    with contextlib.suppress(OSError, ValueError):
        result = json.loads(file.read_text(encoding="utf-8"))
        if result["key"] == row.key:
            progress.end(f"was finished on {result['finished']}")
            return Outcome(row, result)
    log = folder / "logs" / f"{row.name}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    event = _run_worker(row, folder / "answers" / f"{row.name}.sqlite", log, progress)
    if "error" in event:
        progress.end(f"failed: {event['error']} (see {log})")
        return Outcome(row, error=event["error"])
    result = {**event["result"], "key": row.key, "asked": progress.asked, "kept": progress.kept}
    samples = result.pop("samples", [])
    lines = "".join(json.dumps(sample, ensure_ascii=False) + "\n" for sample in samples)
    _write(folder / "samples" / f"{row.name}.jsonl", lines)
    _write(file, json.dumps(result, indent=2) + "\n")
    took = tqdm.format_interval(result["seconds"])
    progress.end(f"{progress.asked} asked, {progress.kept} kept from before, in {took}")
    return Outcome(row, result)


def _run_worker(row: Row, answers: Path, log: Path, progress: Progress) -> dict[str, Any]:
    """Run `row` in a process of its own and return its last event."""
    spawn = multiprocessing.get_context("spawn")
    receiver, sender = spawn.Pipe(duplex=False)
    process = spawn.Process(target=worker.main, args=(row, answers, log, sender))
    process.start()
    assert process.pid is not None
    sender.close()
    try:
        event = follow(_events(receiver), progress)
        process.join(STOP_S)  # what it measured stands, even if it does not end
    finally:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
        process.kill()  # if it had no group of its own yet
        process.join()
    return event or {"error": why_ended(process.exitcode or 0, log)}


def _events(receiver: Connection) -> Iterator[dict[str, Any]]:
    with contextlib.suppress(EOFError):
        while True:
            yield receiver.recv()


def follow(events: Iterable[dict[str, Any]], progress: Progress) -> dict[str, Any] | None:
    """Show a worker's events; return the last one, None if the worker ended without it."""
    for event in events:
        if "tasks" in event:
            progress.total(event["tasks"])
        elif "answer" in event:
            progress.answer(event["answer"], event["kept"])
        else:
            return event
    return None


def why_ended(code: int, log: Path) -> str:
    """Return why a worker ended without a last event."""
    if code < 0:
        hint = ", as the system does when memory runs out" if code == -signal.SIGKILL else ""
        return f"its process was ended by {signal.Signals(-code).name}{hint}"
    found = _ERROR_LINE.findall(log.read_text(encoding="utf-8", errors="replace"))
    last = f": {found[-1][0]}: {found[-1][1].strip()}" if found else ""
    return f"its process ended with code {code}{last}"


def _write(path: Path, text: str) -> None:
    """Write a file whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f"{path.name}.part")
    unfinished.write_text(text, encoding="utf-8")
    unfinished.replace(path)
