"""Sequences of one length in one engine, more and more of them: time to the first token, then time per token at every
batch, up to the most that fits.

Every sequence is prefilled in full and stays, so that a batch of n costs n prefills in all, and a decode step at
batch n is one over n caches of full length. It decodes while the next one is prefilled, as in a server.
"""

from __future__ import annotations

import math
import statistics
import time
from typing import Any

from engines import Decoding, EngineProcess
from inputs import prompt
from models import Comparison

TIME_BUDGET, MAX_BATCH, VLLM_COUNT = "the time budget", "--max-batch", "vLLM's count"
PREEMPTED = "with one more, one is preempted"


class Ladder:
    """One row at one context.

    If a sequence keeps all its blocks until it ends, as many fit as vLLM counts, and more would be preempted before
    they end. Else vLLM counts with what a sequence holds while its prompt is computed, and more fit than that: they
    are found by trying.
    """

    def __init__(self, setting: Comparison, context: int, block_size: int, row: str, engine: EngineProcess) -> None:
        self.setting, self.engine = setting, engine
        # After as many, every sequence has once taken a block and given one back: then all repeats.
        self.settling_steps = block_size + 2
        steps_of_a_prefill = math.ceil(context / max(1, setting.budget - setting.max_batch)) + 1
        measured = (len(setting.batches) + 2) * setting.repetitions * (setting.steps + 2)
        settling = 0 if context <= setting.capacity else 2 * self.settling_steps
        # What the first sequence may have to generate until all have come and every batch is measured.
        self.answer_tokens = setting.max_batch * steps_of_a_prefill + measured + settling
        self.prompt_tokens = context - self.answer_tokens
        self.count: float = engine.count(context)
        # vLLM's count takes in the one block that vLLM keeps for itself.
        num_blocks = engine.info["num_blocks"]
        self.whole = (num_blocks - 1) // round(num_blocks / self.count) if setting.keeps_all(row, context) else None
        self.batch = 0
        self.why_no_more = ""
        self.first_token_s: list[float] = []
        self.steps_s: dict[int, list[float]] = {}
        self.last: Decoding | None = None

    def prompt(self, number: int) -> list[int]:
        """Return the prompt of one sequence; all engines get the same ones."""
        return prompt(self.prompt_tokens, number, self.setting.shape["vocab"])

    def warm_up(self) -> None:
        """Answer one prompt that is not measured: kernels are compiled and tuned for these shapes."""
        self.engine.generate([self.prompt(0)], 2)

    def prefill(self, number: int) -> None:
        """Measure the time to the first token of a sequence alone."""
        self.first_token_s.append(self.engine.generate([self.prompt(number)], 1).first_token_s)

    def grow(self, target: int, deadline: float) -> None:
        """Take in sequences until there are ``target``, or no more fit, or ``deadline`` (`time.monotonic`) is near."""
        limit = self.setting.max_batch if self.whole is None else self.whole
        target = min(target, self.setting.max_batch, limit)
        while not self.why_no_more and self.batch < target:
            if time.monotonic() + statistics.median(self.first_token_s) > deadline:
                self.why_no_more = TIME_BUDGET
                return
            held = self.engine.hold(self.prompt(self.batch), self.answer_tokens)
            self.batch += not held.refused
            self.why_no_more = held.refused
        if not self.why_no_more and self.batch == self.whole:
            self.why_no_more = VLLM_COUNT
        elif not self.why_no_more and self.batch == self.setting.max_batch:
            self.why_no_more = MAX_BATCH

    def fill(self, deadline: float) -> None:
        """Take in all that fit, and make sure that they go on without preemption."""
        self.grow(self.setting.max_batch, deadline)
        if self.whole is None:
            self._decode(self.settling_steps)

    def decode(self, number: int) -> None:
        """Measure decode steps at the present batch."""
        decoding = self._decode(self.setting.steps)
        if decoding is not None:
            self.steps_s.setdefault(self.batch, []).append(statistics.median(decoding.steps_s))
            self.last = decoding

    def _decode(self, steps: int) -> Decoding | None:
        """Run decode steps without preemption, with fewer sequences if need be; return None if none is left."""
        while self.batch:
            decoding: Decoding = self.engine.decode(steps)
            if not decoding.preemptions:
                return decoding
            self.engine.drop()
            self.batch -= 1
            self.why_no_more = PREEMPTED
        return None

    def result(self) -> dict[str, Any]:
        """Return all figures; times are in seconds. It is ``full`` if there were as many sequences as fit."""
        block_bytes, num_blocks, last = self.engine.info["block_bytes"], self.engine.info["num_blocks"], self.last
        return {
            "prompt_tokens": self.prompt_tokens,
            "num_blocks": num_blocks,
            "block_bytes": block_bytes,
            "cache_bytes": num_blocks * block_bytes,
            "vllm_count": self.count,
            "sequences": self.batch,
            "full": self.why_no_more not in ("", TIME_BUDGET, MAX_BATCH),
            "why_no_more": self.why_no_more,
            "preemptions": last.preemptions if last else None,
            "held_blocks": last.blocks if last else None,
            "bytes_per_sequence": last.blocks * block_bytes / self.batch if last else None,
            "first_token_s": statistics.median(self.first_token_s),
            "first_token_all_s": self.first_token_s,
            "decode": [
                {
                    "batch": batch,
                    "token_s": statistics.median(steps),
                    "least_s": min(steps),
                    "greatest_s": max(steps),
                    "tokens_per_s": batch / statistics.median(steps),
                }
                for batch, steps in sorted(self.steps_s.items())
            ],
        }
