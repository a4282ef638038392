"""Drafts for tests: answers that are known, cut and spoilt at random, so that any number of them is accepted.

An engine takes the class by ``speculative_config={"method": "custom_class", "model": PROPOSER, ...}``. It runs in this
process, which tells it by `know` what follows, and asks by `accepted` what became of its drafts.
"""

import random
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

PROPOSER = "support.spoilt_drafts.SpoiltDrafts"

accepted: Counter[int] = Counter()
"""How often how many drafts of a request's step were accepted."""

_texts: list[list[int]] = []


def know(text: list[int]) -> None:
    """Remember a prompt with its answer."""
    _texts.append(text)


def forget() -> None:
    """Forget all answers, and what was accepted."""
    _texts.clear()
    accepted.clear()


def expect(answers: Iterable[tuple[Sequence[int], Sequence[int]]]) -> None:
    """Know what follows each prompt, and nothing else."""
    forget()
    for prompt, answer in answers:
        know([*prompt, *answer])


class SpoiltDrafts:
    """A proposer as vLLM's ``custom_class`` wants it."""

    def __init__(self, vllm_config: Any) -> None:
        self.num_drafts = vllm_config.speculative_config.num_speculative_tokens
        self.vocab = vllm_config.model_config.get_vocab_size()
        self.rng = random.Random(vllm_config.model_config.seed)

    def load_model(self, *args: Any, **kwargs: Any) -> None:
        """There is none."""

    def propose(
        self, sampled_token_ids: Any, num_tokens: Any, token_ids: Any, slot_mappings: Any = None
    ) -> list[list[int]]:
        """Drafts for each request that sampled a token just now, and none for the others."""
        drafts: list[list[int]] = []
        for row, sampled in enumerate(sampled_token_ids):
            if not len(sampled):
                drafts.append([])
                continue
            accepted[len(sampled) - 1] += 1
            drafts.append(self._after(token_ids[row, : int(num_tokens[row])].tolist()))
        return drafts

    def _after(self, tokens: list[int]) -> list[int]:
        n = len(tokens)
        for text in _texts:
            if len(text) > n and text[:n] == tokens:
                known = text[n : n + self.num_drafts]
                # Beyond the answer's end vLLM has to cut off drafts itself.
                known += [self.rng.randrange(self.vocab) for _ in range(self.num_drafts - len(known))]
                rare = [count for count in range(self.num_drafts + 1) if not accepted[count]]
                if not rare and self.rng.random() < 0.3:
                    known = known[: self.rng.randint(0, self.num_drafts)]
                # All are right if there is none at this place.
                spoilt = self.rng.choice(rare or range(self.num_drafts + 1))
                known[spoilt : spoilt + 1] = [(token + 1) % self.vocab for token in known[spoilt : spoilt + 1]]
                return known
        return []
