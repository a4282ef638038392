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
        self._rows, self._number, self._title = rows, 0, ""
        self._bar: Any = None
        self.asked, self.kept = 0, 0
        """Answers of the current row: from the model, and kept from an earlier run."""

    def start(self, title: str) -> None:
        """Begin the next row."""
        self._number += 1
        self._title = f"[{self._number}/{self._rows}] {title}"
        self.asked, self.kept = 0, 0

    def total(self, tasks: Mapping[str, int]) -> None:
        """Set how many answers there will be of each task."""
        self._bar = tqdm(
            total=sum(tasks.values()),
            desc=self._title,
            smoothing=0,  # the time left is by all that was asked
            mininterval=0.1 if sys.stderr.isatty() else 30.0,  # seconds: a file needs fewer lines
            miniters=1,
            dynamic_ncols=True,
        )

    def answer(self, task: str, kept: bool) -> None:
        """Count one answer."""
        self.kept += kept
        self.asked += not kept
        self._bar.initial = self.kept  # what was kept took no time
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
