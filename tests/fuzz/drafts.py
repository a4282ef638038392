"""Drafts for fuzzed engines: n-grams, or spoilt answers of the reference."""

from typing import Any

from fuzz.case import Drafts
from support.spoilt_drafts import PROPOSER


def speculative_config(drafts: Drafts) -> dict[str, Any]:
    """The engine's argument."""
    own = {"model": PROPOSER} if drafts.method == "custom_class" else {"prompt_lookup_min": 1, "prompt_lookup_max": 3}
    return {"method": drafts.method, "num_speculative_tokens": drafts.num_tokens, **own}
