"""Drafts for fuzzed engines: answers that are known, cut and spoilt at random, so that any number of them is accepted.

vLLM imports the class by `PROPOSER`, in this process, which tells it by `know` what follows.
"""

import random
from collections import Counter
from typing import Any

from fuzz.case import VOCAB, Drafts

PROPOSER = "fuzz.drafts.SpoiltAnswers"

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


def speculative_config(drafts: Drafts) -> dict[str, Any]:
    """The engine's argument."""
    own = {"model": PROPOSER} if drafts.method == "custom_class" else {"prompt_lookup_min": 1, "prompt_lookup_max": 3}
    return {"method": drafts.method, "num_speculative_tokens": drafts.num_tokens, **own}


class SpoiltAnswers:
    """A proposer as vLLM's method ``custom_class`` wants it."""

    def __init__(self, vllm_config: Any) -> None:
        self.num_tokens = vllm_config.speculative_config.num_speculative_tokens
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
                known = text[n : n + self.num_tokens]
                # Beyond the answer's end vLLM has to cut off drafts itself.
                known += [self.rng.randrange(VOCAB) for _ in range(self.num_tokens - len(known))]
                known = known[: self.num_tokens if self.rng.random() < 0.7 else self.rng.randint(0, self.num_tokens)]
                spoilt = self.rng.randint(0, self.num_tokens)  # all are right if there is none there
                known[spoilt : spoilt + 1] = [(token + 1) % VOCAB for token in known[spoilt : spoilt + 1]]
                return known
        return []
