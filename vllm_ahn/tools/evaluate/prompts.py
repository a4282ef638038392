"""Prompts that fit: the context is cut, by the model's own tokens, until the prompt is no longer than allowed.

lm-eval gives tasks no tokenizer, but it passes the model's arguments to a task's ``custom_dataset`` function. So a
document carries what its prompt needs (`PromptSettings`), and `doc_to_text` makes the prompt when lm-eval asks for it:
with ``--limit 10``, ten prompts are tokenized instead of the whole set.

lm-eval applies a chat template to all tasks of a run or to none, and does not know the limit. Here each task applies it
itself, and it counts towards the limit: run lm-eval without ``--apply_chat_template``.
"""

from __future__ import annotations

import bisect
import dataclasses
import functools
from collections.abc import Mapping
from typing import Any, Literal

from vllm_ahn.errors import AHNError, first_line

Cut = Literal["middle", "left"]
"""Where a context loses tokens: ``middle``, so that the prompt keeps as many of its first as of its last tokens, or
``left``, at the start of the context."""


@dataclasses.dataclass(frozen=True)
class PromptSettings:
    """How the prompts of one set are made for one model."""

    tokenizer: str
    """Folder or hub repository."""

    max_tokens: int
    """The longest prompt, with the chat template and the tokenizer's special tokens."""

    cut: Cut
    chat_template: bool
    """Whether the prompt is a user's turn; otherwise the model continues plain text."""

    revision: str | None = None
    """Of the tokenizer's repository."""

    trust_remote_code: bool = False

    @classmethod
    def from_metadata(
        cls, metadata: Mapping[str, Any], *, max_tokens: int, cut: Cut, chat_template: bool
    ) -> PromptSettings:
        """Return a set's settings as lm-eval's metadata changes them.

        Args:
            metadata: the model's arguments, ``pretrained`` and if given ``tokenizer``, ``tokenizer_revision`` and
                ``trust_remote_code``; and from ``--metadata`` the user's ``max_prompt_tokens`` and ``chat_template``.
            max_tokens, cut, chat_template: the set's own.

        Raises:
            AHNError: no tokenizer is named, or a value is of the wrong kind.
        """
        tokenizer = metadata.get("tokenizer") or metadata.get("pretrained")
        if not isinstance(tokenizer, str):
            raise AHNError(
                "metadata: neither tokenizer nor pretrained is there, expected the name of the model whose tokens are "
                "counted (lm-eval passes its model_args; a TaskManager of your own wants metadata={'pretrained': ...})"
            )
        limit = metadata.get("max_prompt_tokens", max_tokens)
        if isinstance(limit, bool) or not isinstance(limit, int) or limit < 1:
            raise AHNError(f"metadata: max_prompt_tokens is {limit!r}, expected a number of tokens, at least 1")
        chat = metadata.get("chat_template", chat_template)
        if not isinstance(chat, bool):
            raise AHNError(f"metadata: chat_template is {chat!r}, expected true or false")
        revision = metadata.get("tokenizer_revision")
        return cls(tokenizer, limit, cut, chat, revision, bool(metadata.get("trust_remote_code", False)))


def doc_to_text(doc: Mapping[str, Any]) -> str:
    """Make the prompt of a document (`fit`); for lm-eval. Raises `AHNError`."""
    return fit(doc["before"], doc["context"], doc["after"], PromptSettings(**doc["prompt_settings"]))


def fit(before: str, context: str, after: str, settings: PromptSettings) -> str:
    """Return ``before + context + after``, in the chat template if so set, cut to at most ``settings.max_tokens``.

    Only the context loses tokens, and only whole characters. The text around a cut may be tokenized differently; if
    that makes the prompt too long, more is cut. So it may be a few tokens shorter than the limit.

    Raises:
        AHNError: the prompt is too long without any context, or there is no chat template.
    """
    tokenizer = load_tokenizer(settings.tokenizer, settings.revision, settings.trust_remote_code)
    prompt = before + context + after
    text = _render(tokenizer, prompt, settings)
    drop = _count(tokenizer, text) - settings.max_tokens
    if drop <= 0:
        return text
    offsets = tokenizer(prompt, add_special_tokens=False, return_offsets_mapping=True, verbose=False).offset_mapping
    # The tokens of the context, without those that reach out of it.
    first = bisect.bisect_left(offsets, len(before), key=lambda span: span[0])
    last = bisect.bisect_right(offsets, len(before) + len(context), key=lambda span: span[1])
    while drop <= last - first:
        start = first if settings.cut == "left" else min(max((len(offsets) - drop) // 2, first), last - drop)
        left, right = _characters(offsets, start, start + drop, len(prompt))
        # With its first token the context loses all of its start, also what is in one token with the text before.
        left = len(before) if start == first else left
        text = _render(tokenizer, prompt[:left] + prompt[right:], settings)
        excess = _count(tokenizer, text) - settings.max_tokens
        if excess <= 0:
            return text
        drop += excess
    raise AHNError(
        f"max_prompt_tokens is {settings.max_tokens}, expected more: instruction and question alone are longer"
    )


@functools.lru_cache(maxsize=4)
def load_tokenizer(name: str, revision: str | None = None, trust_remote_code: bool = False) -> Any:
    """Load a model's "fast" tokenizer. Raises `AHNError` if there is none."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(name, revision=revision, trust_remote_code=trust_remote_code)
    except (OSError, ValueError) as error:
        raise AHNError(
            f"{name}: its tokenizer, which counts the tokens of prompts, cannot be loaded ({first_line(error)})"
        ) from error
    if not tokenizer.is_fast:
        raise AHNError(f"{name}: its tokenizer does not say where its tokens lie in a text, expected a fast tokenizer")
    return tokenizer


def _render(tokenizer: Any, prompt: str, settings: PromptSettings) -> str:
    if not settings.chat_template:
        return prompt
    if not tokenizer.chat_template:
        raise AHNError(
            f"{settings.tokenizer}: no chat template, which this task's prompts are made with "
            "(without one: --metadata '{\"chat_template\": false}')"
        )
    # Models that think before they answer (Qwen3) would not get to the answer in so few tokens.
    turns = [{"role": "user", "content": prompt}]
    return str(tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True, enable_thinking=False))


def _count(tokenizer: Any, text: str) -> int:
    # As lm-eval's vLLM model encodes a prompt.
    return len(tokenizer(text, verbose=False).input_ids)


def _characters(offsets: list[tuple[int, int]], start: int, stop: int, length: int) -> tuple[int, int]:
    # The characters of tokens [start, stop). One may be several tokens, all with its place: it goes as a whole.
    left = min(offsets[start - 1][1], offsets[start][0]) if start else 0
    right = max(offsets[stop - 1][1], offsets[stop][0]) if stop < len(offsets) else length
    return left, right
