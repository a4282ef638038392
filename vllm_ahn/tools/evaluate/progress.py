"""Progress on standard error: a tqdm bar for every row."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

from tqdm import tqdm


class Progress:
    """The progress of all rows of a plan."""

    def __init__(self, rows: int) -> None:
        """Start with none of `rows` done."""
        self._rows = rows
        self._number = 0
        self._title = ""
        self._bar: Any = None
        self.asked = 0
        """Answers of the current row that the model gave."""

        self.kept = 0
        """Answers of the current row that were kept from an earlier run."""

    def start(self, title: str) -> None:
        """Begin the next row."""
        self._number += 1
        self._title = f"[{self._number}/{self._rows}] {title}"
        self.asked = self.kept = 0

    def total(self, tasks: Mapping[str, int]) -> None:
        """Set how many answers there will be of each task."""
        # Averaged over all that was asked, so that what was kept does not count; no line a second into a file.
        seconds = 0.1 if sys.stderr.isatty() else 30.0
        self._bar = tqdm(
            total=sum(tasks.values()),
            desc=self._title,
            smoothing=0,
            mininterval=seconds,
            miniters=1,
            dynamic_ncols=True,
        )

    def answer(self, task: str, kept: bool) -> None:
        """Count one answer."""
        self.kept += kept
        self.asked += not kept
        self._bar.initial = self.kept
        self._bar.set_postfix_str(task, refresh=False)
        self._bar.update()

    def end(self, text: str) -> None:
        """End the row with a line that stays."""
        self.close()
        print(f"{self._title}: {text}", file=sys.stderr, flush=True)

    def close(self) -> None:
        """Leave the terminal with the cursor at the start of a line."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None
