"""``python -m vllm_ahn.tools.evaluate.worker``: runs one job with one engine in a process of its own.

The job comes as a line on standard input, which then stays open: when it closes, whoever asked is gone and the worker
ends with all its processes. Events go out as JSON lines through the file descriptor that is its argument::

    {"phase": "starting"}
    {"tasks": {"niah_single_1": 3, ...}}                        how many answers there will be
    {"answer": "niah_single_1", "kept": false}                  one is there; kept: from an earlier run
    {"result": {...}}  or  {"error": "one sentence"}            the last one
"""

from __future__ import annotations

import datetime
import json
import os
import signal
import sys
import threading
import time
import traceback
from pathlib import Path
from typing import Any, TextIO

from vllm_ahn.errors import AHNError
from vllm_ahn.tools.evaluate.answers import Answers
from vllm_ahn.tools.evaluate.jobs import Job, versions

LONGEST_ERROR = 400


class Worker:
    """A job that is being run."""

    def __init__(self, job: Job, answers: Path, events: TextIO) -> None:
        self.job = job
        self._path = answers
        self._events = events
        self._started = time.time()
        self.asked = 0
        self.kept = 0

    def run(self) -> dict[str, Any]:
        """What the report needs: ``scores`` or ``perplexity``, and what it was measured with."""
        self.send(phase="starting")
        from vllm.platforms import current_platform

        device = _device_name(current_platform)
        answers = Answers(self._path, {**self.job.identity, "device": device})
        measured = self._lm_eval(answers) if self.job.kind == "lm_eval" else self._perplexity(answers)
        answers.close()
        return {
            **measured,
            "key": self.job.key,
            "asked": self.asked,
            "kept": self.kept,
            "device": device,
            "versions": versions(),
            "finished": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "seconds": round(time.time() - self._started, 1),
        }

    def answered(self, task: str, kept: bool) -> None:
        """Counts an answer and says so."""
        self.kept += kept
        self.asked += not kept
        self.send(answer=task, kept=kept)

    def announce(self, tasks: dict[str, int]) -> None:
        """Says how many answers there will be of each task."""
        self.send(tasks=tasks)

    def send(self, **event: Any) -> None:
        """Sends an event."""
        self._events.write(json.dumps(event) + "\n")
        self._events.flush()

    def _lm_eval(self, answers: Answers) -> dict[str, Any]:
        from vllm_ahn.tools.evaluate.lm_eval_run import evaluate

        return evaluate(self.job, answers, self.announce, self.answered)

    def _perplexity(self, answers: Answers) -> dict[str, Any]:
        from vllm import LLM

        from vllm_ahn.tools.evaluate import perplexity, texts

        llm = LLM(**self.job.engine)
        questions = self.job.questions
        stretches = texts.read(llm.get_tokenizer(), questions)
        self.announce({"text": len(stretches)})
        measured = perplexity.measure(
            llm,
            stretches,
            answers,
            capacity=self.job.capacity,
            context=questions["context"],
            progress=lambda number, kept: self.answered("text", kept),
        )
        return {"perplexity": measured}


def main() -> int:
    """Runs the job on standard input; 0, or 1 after an event that says why not."""
    events = os.fdopen(int(sys.argv[1]), "w", encoding="utf-8")
    order = json.loads(sys.stdin.readline())
    threading.Thread(target=_end_with_asker, daemon=True).start()
    worker = Worker(Job(**order["job"]), Path(order["answers"]), events)
    try:
        result = worker.run()
    except Exception as error:
        traceback.print_exc()
        worker.send(error=sentence(error))
        return 1
    worker.send(result=result)
    return 0


def sentence(error: BaseException) -> str:
    """The one line of an error that says most."""
    text = str(error).strip().splitlines()
    first = " ".join(text[0].split()) if text else ""
    if len(first) > LONGEST_ERROR:
        first = f"{first[:LONGEST_ERROR]} ..."
    return first if isinstance(error, AHNError) else f"{type(error).__name__}: {first}".rstrip(": ")


def _device_name(platform: Any) -> str:
    if platform.is_cpu():
        from vllm_ahn.tools.evaluate.machine import cpu_name

        return cpu_name()
    return str(platform.get_device_name())


def _end_with_asker() -> None:
    sys.stdin.read()
    if os.getpgrp() == os.getpid():  # as `runner` starts it: the engine's processes are in this group, nobody else's
        os.killpg(os.getpid(), signal.SIGKILL)
    os._exit(1)


if __name__ == "__main__":
    sys.exit(main())
