"""Drafts for tests: answers that are known, spoilt at random, so that any number of them is accepted.

An engine takes the class by ``speculative_config={"method": "custom_class", "model": PROPOSER, ...}``. It runs in this
process, so a test tells it by `expect` and asks by `accepted` what became of its drafts.
"""

import random
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

PROPOSER = "support.spoilt_drafts.SpoiltDrafts"
accepted: Counter[int] = Counter()
"""How often how many drafts of a step were accepted."""

_answers: dict[tuple[int, ...], Sequence[int]] = {}


def expect(answers: Iterable[tuple[Sequence[int], Sequence[int]]]) -> None:
    """Say what follows each prompt, and forget what was accepted."""
    accepted.clear()
    _answers.clear()
    _answers.update((tuple(prompt), answer) for prompt, answer in answers)


class SpoiltDrafts:
    """A proposer as vLLM's ``custom_class`` wants it."""

    def __init__(self, vllm_config: Any) -> None:
        self.num_drafts = vllm_config.speculative_config.num_speculative_tokens
        self.rng = random.Random(0)

    def load_model(self, *args: Any, **kwargs: Any) -> None:
        """There is none."""

    def propose(
        self, sampled_token_ids: Any, num_tokens: Any, token_ids: Any, slot_mappings: Any = None
    ) -> list[list[int]]:
        """Drafts for each request whose last token was sampled just now."""
        drafts = []
        for row, sampled in enumerate(sampled_token_ids):
            if len(sampled):
                accepted[len(sampled) - 1] += 1
            drafts.append(self._drafts(token_ids[row, : int(num_tokens[row])].tolist()) if len(sampled) else [])
        return drafts

    def _drafts(self, tokens: list[int]) -> list[int]:
        for prompt, answer in _answers.items():
            done = len(tokens) - len(prompt)
            if done >= 0 and tuple(tokens[: len(prompt)]) == prompt and tokens[len(prompt) :] == list(answer[:done]):
                known = list(answer[done : done + self.num_drafts])
                spoilt = self.rng.randint(0, self.num_drafts)  # all are right if there is none there
                known[spoilt : spoilt + 1] = [(token + 1) % 100 for token in known[spoilt : spoilt + 1]]
                return known
        return []
