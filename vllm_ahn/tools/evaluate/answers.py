"""The model's answers: asked of the engine once, and kept on disk as they come.

lm-eval's own cache is keyed by the prompt's text alone and written a batch at a time, at 128k tokens hours apart.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import sqlite3
from array import array
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import msgspec

from vllm_ahn.errors import AHNError

_numbers = itertools.count()


class Answers:
    """An SQLite file of answers, for one process at a time.

    An answer is found by a hash of the question and of everything else that decides it. If any of that changes, the
    question is a new one, and the old answer stays for whoever changes it back.
    """

    def __init__(self, path: Path, identity: Any) -> None:
        """Open `path`, or make it. Raises `AHNError` if it is something else.

        Args:
            identity: JSON values: all that decides an answer besides the question.
        """
        self._identity = identity
        path.parent.mkdir(parents=True, exist_ok=True)
        self._database = sqlite3.connect(path, isolation_level=None)  # every statement is a transaction
        try:
            self._database.execute("CREATE TABLE IF NOT EXISTS answers (key TEXT PRIMARY KEY, value TEXT NOT NULL)")
        except sqlite3.DatabaseError as error:
            raise AHNError(f"{path}: {error}, expected answers that an evaluation wrote") from None

    def key(self, question: Any) -> str:
        """Return the key of the answer to `question`, JSON values."""
        values = json.dumps([self._identity, question], sort_keys=True, ensure_ascii=False)
        return hashlib.sha256(values.encode()).hexdigest()

    def get(self, key: str) -> Any | None:
        """Return the kept answer, or None."""
        row = self._database.execute("SELECT value FROM answers WHERE key = ?", (key,)).fetchone()
        return None if row is None else json.loads(row[0])

    def put(self, key: str, value: Any) -> None:
        """Keep an answer, JSON values: it is on the disk when this returns."""
        self._database.execute("INSERT OR REPLACE INTO answers VALUES (?, ?)", (key, json.dumps(value)))


def ask(
    llm: Any,
    questions: Sequence[tuple[Sequence[int], Any]],
    answers: Answers,
    read: Callable[[Any], Any],
    answered: Callable[[bool], None],
    after_step: Callable[[], None] = lambda: None,
) -> list[Any]:
    """Return the answers to `questions`, those that `answers` lacks from the engine, all at once.

    Args:
        llm: a `vllm.LLM` that runs nothing else meanwhile.
        questions: the tokens of each prompt and its `vllm.SamplingParams`, which together decide the answer.
        read: turns a finished ``RequestOutput`` into the JSON values to keep.
        answered: called for every question with whether its answer was kept from before.
        after_step: called after every step of the engine.
    """
    from vllm.sampling_params import RequestOutputKind

    keys = [_key(answers, tokens, params) for tokens, params in questions]
    pending: dict[str, str] = {}  # request -> key
    for key, (tokens, params) in zip(keys, questions, strict=True):
        if answers.get(key) is not None:
            answered(True)
        elif key not in pending.values():  # equal questions are asked once
            request = f"ahn-eval-{next(_numbers)}"
            params = params.clone()
            params.output_kind = RequestOutputKind.FINAL_ONLY
            llm.llm_engine.add_request(request, {"prompt_token_ids": list(tokens)}, params)
            pending[request] = key
    while llm.llm_engine.has_unfinished_requests():
        outputs = llm.llm_engine.step()
        after_step()
        for output in outputs:
            if output.finished:
                key = pending.pop(output.request_id)
                answers.put(key, read(output))
                for _ in range(keys.count(key)):
                    answered(False)
    return [answers.get(key) for key in keys]


def _key(answers: Answers, tokens: Sequence[int], params: Any) -> str:
    return answers.key(
        {
            "tokens": hashlib.sha256(array("I", tokens).tobytes()).hexdigest(),
            "parameters": msgspec.json.encode(params, order="deterministic").decode(),
        }
    )
