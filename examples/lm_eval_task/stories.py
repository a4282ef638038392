"""The data of the task ``ahn_stories``, found beside this file from whatever folder lm-eval is run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from datasets import Dataset


def load(**metadata: Any) -> dict[str, Dataset]:
    """Return the stories, as the split ``test``. lm-eval passes the task's metadata, which changes nothing here."""
    lines = (Path(__file__).parent / "stories.jsonl").read_text(encoding="utf-8").splitlines()
    return {"test": Dataset.from_list([json.loads(line) for line in lines])}
