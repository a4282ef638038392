"""What the model has answered, kept on disk as it comes, so that no question is asked twice."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any, TextIO

from vllm_ahn.errors import AHNError


class Answers:
    """JSON lines, one an answer, only ever appended to. One process at a time may use a file.

    An answer is found by a hash over the question and all that decides the answer: where any of it changes the
    question is a new one, and the old answer stays for those who change it back.
    """

    def __init__(self, path: Path, identity: Any) -> None:
        """
        Args:
            path: made if it does not exist. A last line that was being written when a process was killed is cut off.
            identity: JSON values: everything but the question that decides an answer.

        Raises:
            AHNError: something else is in the file.
        """
        self._identity = _hash(identity)
        self._values: dict[str, Any] = {}
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file: TextIO = path.open("a+", encoding="utf-8", newline="\n")
        self._file.seek(0)
        whole = 0
        for number, line in enumerate(self._file, 1):
            if not line.endswith("\n"):
                break
            try:
                entry = json.loads(line)
                self._values[entry["key"]] = entry["value"]
            except (ValueError, KeyError, TypeError):
                raise AHNError(f"{path}, line {number}: no kept answer, expected a file that eval wrote") from None
            whole += len(line.encode())
        self._file.truncate(whole)

    def key(self, question: Any) -> str:
        """The key of the answer to `question`, JSON values."""
        return _hash([self._identity, question])

    def get(self, key: str) -> Any | None:
        """The kept answer, or None."""
        return self._values.get(key)

    def put(self, key: str, value: Any) -> None:
        """Keeps an answer, JSON values. When this returns it is on the disk."""
        self._values[key] = value
        self._file.write(json.dumps({"key": key, "value": value}) + "\n")
        self._file.flush()
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Closes the file."""
        self._file.close()


def _hash(values: Any) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True, ensure_ascii=False).encode()).hexdigest()
