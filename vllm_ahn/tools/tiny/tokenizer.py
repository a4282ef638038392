"""A byte-level BPE tokenizer with a chat template, made offline, of any size from 259 tokens."""

from __future__ import annotations

import collections
import itertools
import json
import pathlib

from vllm_ahn.errors import AHNError

END_OF_TEXT, IM_START, IM_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
SPECIAL_TOKENS = (END_OF_TEXT, IM_START, IM_END)
MIN_VOCAB = 256 + len(SPECIAL_TOKENS)

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

_SAMPLE = """
The hippocampus turns short-term memory into long-term memory. A transformer keeps every key and value it
has seen, so its memory grows with the text; a recurrent network keeps a state of one size, and forgets.
Here a sliding window of attention keeps the recent tokens exactly, and what leaves the window is
absorbed into a state of fixed size. The user asks a question, the assistant answers it, and the rest of
the story is read from the other two of them.
"""


def count_tokens(vocab: int) -> int:
    """Return how many of `vocab` tokens have a text: all, unless there are more than pairs of bytes.

    Raises `AHNError` for a `vocab` that has no room for the bytes and the special tokens.
    """
    if vocab < MIN_VOCAB:
        raise AHNError(f"make-tiny: vocab is {vocab}, expected at least {MIN_VOCAB} tokens")
    return min(vocab, 2**16)


def write_tokenizer(folder: pathlib.Path, vocab: int) -> None:
    """Write ``tokenizer.json`` and ``tokenizer_config.json`` of `count_tokens` tokens into `folder`.

    Tokens 0 to 255 are the bytes, the last three are `SPECIAL_TOKENS` (as in Qwen2.5, ``<|im_end|>`` ends a
    turn), and between them are pairs of bytes, the most frequent in a sample of English first.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = _merges(alphabet, count_tokens(vocab) - MIN_VOCAB)
    tokens = [*alphabet, *(first + second for first, second in merges)]
    tokenizer = Tokenizer(models.BPE(vocab={token: n for n, token in enumerate(tokens)}, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS])
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": None,
        "eos_token": IM_END,
        "pad_token": END_OF_TEXT,
        "additional_special_tokens": [IM_START, IM_END],
        "chat_template": CHAT_TEMPLATE,
        "clean_up_tokenization_spaces": False,
        "model_max_length": 1_000_000,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def unreadable_tokens(vocab: int) -> list[int]:
    """Return the tokens that are no text by themselves: bytes beside visible ASCII, special ones, those beyond."""
    visible = ord("~") - ord("!") + 1  # sorts before all that byte-level BPE writes for other bytes
    return [*range(visible, 256), *range(count_tokens(vocab) - len(SPECIAL_TOKENS), vocab)]


def _merges(alphabet: list[str], count: int) -> list[tuple[str, str]]:
    # "Ġ" is how byte-level BPE writes a space; a word carries the one before it.
    words = [f"Ġ{word}" for word in _SAMPLE.split()]
    seen = collections.Counter(pair for word in words for pair in itertools.pairwise(word))
    ranked = sorted(seen, key=lambda pair: (-seen[pair], pair))
    rest = ((a, b) for a in alphabet for b in alphabet if (a, b) not in seen)
    return list(itertools.islice(itertools.chain(ranked, rest), count))
