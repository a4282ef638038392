"""lm-eval's vLLM model, with answers that are kept as they come."""

from __future__ import annotations

import hashlib
import types
from array import array
from collections import Counter
from collections.abc import Callable
from typing import Any

import msgspec
from lm_eval.models.vllm_causallms import VLLM

from vllm_ahn.tools.evaluate.answers import Answers
from vllm_ahn.tools.evaluate.engine import run_requests

SLICE = 64
"""Requests that are tokenized and in the engine at once. The texts are long: all of a suite's tokens would take
gigabytes."""


class KeepingVLLM(VLLM):
    """Asks the engine only what `answers` lacks, and puts every answer there as soon as it is finished."""

    def __init__(
        self,
        answers: Answers,
        announce: Callable[[dict[str, int]], None],
        progress: Callable[[str, bool], None],
        **arguments: Any,
    ) -> None:
        """
        Args:
            announce: called once with the number of requests of each task.
            progress: called for every answer with the task's name and whether it was kept from before.
            arguments: of `vllm.LLM`, with ``pretrained`` for the model.
        """
        super().__init__(**arguments)
        self._answers = answers
        self._announce = announce
        self._progress = progress
        self._task = ""

    def generate_until(self, requests: list[Any], disable_tqdm: bool = True) -> list[str]:
        """lm-eval's, task by task and in slices."""
        self._announce(dict(Counter(request.task_name for request in requests)))
        texts: list[str] = []
        start = 0
        while start < len(requests):
            self._task = requests[start].task_name
            end = start
            while end < len(requests) and end - start < SLICE and requests[end].task_name == self._task:
                end += 1
            texts += super().generate_until(requests[start:end], disable_tqdm=True)
            start = end
        return texts

    def _model_generate(self, requests: Any, generate: bool = False, sampling_params: Any = None) -> list[Any]:
        # The last step before the engine: what is asked here is what decides the answer, tokens and parameters, with
        # all that lm-eval has done to them.
        if not generate:
            raise NotImplementedError("a suite asks for text, not for the likelihood of one")
        keys = [self._key(tokens, params) for tokens, params in zip(requests, sampling_params, strict=True)]
        asked: dict[str, int] = {}  # equal questions are asked once
        for number, key in enumerate(keys):
            if self._answers.get(key) is None:
                asked.setdefault(key, number)
            else:
                self._progress(self._task, True)
        numbers = list(asked.values())

        def finished(number: int, output: Any) -> None:
            key, answer = keys[numbers[number]], output.outputs[0]
            value = {
                "text": answer.text,
                "task": self._task,
                "prompt_tokens": len(output.prompt_token_ids),
                "tokens": len(answer.token_ids),
                "finish_reason": answer.finish_reason,
            }
            self._answers.put(key, value)
            for _ in range(keys.count(key)):
                self._progress(self._task, False)

        run_requests(self.model, [(requests[number], sampling_params[number]) for number in numbers], finished)
        return [_output(self._answers.get(key)) for key in keys]

    def _key(self, tokens: list[int], params: Any) -> str:
        question = {
            "tokens": hashlib.sha256(array("I", tokens).tobytes()).hexdigest(),
            "parameters": msgspec.json.encode(params, order="deterministic").decode(),
        }
        return self._answers.key(question)


def _output(answer: Any) -> Any:
    """What lm-eval reads of a ``RequestOutput``."""
    return types.SimpleNamespace(outputs=[types.SimpleNamespace(text=answer["text"])])
