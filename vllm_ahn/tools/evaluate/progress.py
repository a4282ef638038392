"""What a person sees while an evaluation runs: one line, on a terminal in place, elsewhere now and then."""

from __future__ import annotations

import shutil
import sys
import time
from collections.abc import Mapping
from typing import TextIO

EVERY_S = 30.0
"""Seconds between two lines where the output is no terminal; a new phase or task is said at once."""


class Progress:
    """The progress of all jobs, on standard error."""

    def __init__(self, jobs: int, out: TextIO | None = None) -> None:
        """`jobs` is how many there are in all."""
        self._out = sys.stderr if out is None else out
        self._jobs = jobs
        self._number = 0
        self._title = ""
        self._tasks: dict[str, int] = {}
        self._done: dict[str, int] = {}
        self._asked = 0
        self._started = 0.0
        self._said = 0.0
        self._about = ""
        self._open_line = False

    def job(self, suite: str, label: str) -> None:
        """A job begins."""
        self._number += 1
        self._title = f"[{self._number}/{self._jobs}] {suite}, {label}"
        self._tasks, self._done, self._asked = {}, {}, 0

    def phase(self, text: str) -> None:
        """Something that is not counted begins."""
        self._say(text, about=text)

    def total(self, tasks: Mapping[str, int]) -> None:
        """How many answers there will be of each task. The clock for the rest of the job starts."""
        self._tasks = dict(tasks)
        self._started = time.monotonic()

    def answer(self, task: str, kept: bool) -> None:
        """One answer more."""
        self._done[task] = self._done.get(task, 0) + 1
        self._asked += not kept
        text = f"{task}, {self._done[task]} of {self._tasks.get(task, 0)}"
        if len(self._tasks) > 1:
            text += f" ({sum(self._done.values())} of {sum(self._tasks.values())} in all)"
        self._say(f"{text}{self._rest()}", about=task, last=self._done == self._tasks)

    def end(self, text: str) -> None:
        """The job is over: said on a line that stays."""
        self._write(f"{self._title}: {text}", stays=True)

    def _rest(self) -> str:
        left = sum(self._tasks.values()) - sum(self._done.values())
        if not self._asked or not left:
            return ""
        # What was kept took no time and says nothing about the rest, which may have longer prompts.
        seconds = (time.monotonic() - self._started) / self._asked * left
        return f", about {duration(seconds)} left"

    def _say(self, text: str, about: str, last: bool = False) -> None:
        now = time.monotonic()
        if self._out.isatty():
            self._write(f"{self._title}: {text}", stays=False)
        elif about != self._about or last or now - self._said >= EVERY_S:
            self._write(f"{self._title}: {text}", stays=True)
            self._said = now
        self._about = about

    def _write(self, line: str, stays: bool) -> None:
        if self._out.isatty():
            line = line[: shutil.get_terminal_size().columns - 1]
            self._out.write(f"\r\x1b[K{line}" + ("\n" if stays else ""))
            self._open_line = not stays
        else:
            self._out.write(f"{line}\n")
        self._out.flush()

    def close(self) -> None:
        """Leaves the terminal with the cursor at the start of a line."""
        if self._open_line:
            self._out.write("\n")
            self._out.flush()
            self._open_line = False


def duration(seconds: float) -> str:
    """``"45 s"``, ``"12 min"``, ``"3 h 20 min"``."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60} min"
