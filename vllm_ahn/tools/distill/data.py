"""Reads samples, token sequences, from text files, JSON lines or data sets of the hub."""

from __future__ import annotations

import json
import pathlib
import random
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch.utils.data import Dataset

from vllm_ahn.errors import AHNError
from vllm_ahn.tools.distill import lengths
from vllm_ahn.tools.distill.settings import Settings

JSON_LINES = (".jsonl", ".json")


def read_samples(settings: Settings, tokenizer: Any) -> list[torch.Tensor]:
    """Read every sample that is long enough, each ``[n]`` int64 of at most ``settings.length`` tokens.

    Text files are joined, with an end of text between them, and cut into pieces of that length. A line of JSON or a
    row of a data set is a sample of its own: the chat template is applied to its ``messages``, else its ``text`` is
    taken.

    Raises:
        AHNError: a source cannot be read, or nothing is long enough.
    """
    samples: list[torch.Tensor] = []
    dropped = 0
    for tokens in _sequences(settings.data, settings.length, tokenizer):
        # Cut first: a long text is not too long for the windows that are drawn.
        tokens = tokens[: settings.length]
        if is_long_enough(settings, len(tokens)):
            samples.append(torch.tensor(tokens, dtype=torch.long))
        else:
            dropped += 1
    if not samples:
        what = (
            f"more tokens than --window and --sinks together, {sum(settings.fixed)}"
            if settings.fixed
            else f"more than {min(settings.lossless)} tokens, and less than {settings.max_ratio} times "
            f"{max(settings.lossless)}"
        )
        raise AHNError(f"--data {' '.join(settings.data)}: all {dropped} samples are too short, expected {what}")
    return samples


def is_long_enough(settings: Settings, length: int) -> bool:
    """Return whether a sample of `length` tokens has positions beyond its window."""
    if settings.fixed:
        return length > sum(settings.fixed) + 1
    return bool(lengths.possible(settings.lossless, length, settings.max_ratio))


class Samples(Dataset[dict[str, Any]]):
    """Samples in the order in which a whole run takes them, with their windows and sinks.

    Item ``i`` is the same whenever it is asked for, so that a run that was cut short continues as if it had not been.
    """

    def __init__(self, settings: Settings, samples: Sequence[torch.Tensor]) -> None:
        self.settings = settings
        self.samples = samples
        epochs = -(-len(self) // len(samples))
        order = list(range(len(samples)))
        self.order: list[int] = []
        for epoch in range(epochs):
            random.Random(f"{settings.seed} order {epoch}").shuffle(order)
            self.order.extend(order)

    def __len__(self) -> int:
        return self.settings.steps * self.settings.batch_size

    def __getitem__(self, index: int) -> dict[str, Any]:
        settings, tokens = self.settings, self.samples[self.order[index]]
        group = index // settings.micro_batch
        if settings.fixed:
            window, sinks = settings.fixed
        else:
            rng = random.Random(f"{settings.seed} lengths {group}")
            choices = (settings.lossless, settings.sink_choices, settings.max_ratio)
            window, sinks = lengths.draw(rng, len(tokens), *choices)
        return {"input_ids": tokens, "window": window, "sinks": sinks}


def collate(items: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Stack items to ``input_ids [B, T]``, with the window and sinks they share. Raises `AHNError` if they do not."""
    if len({(len(item["input_ids"]), item["window"], item["sinks"]) for item in items}) > 1:
        raise AHNError("--micro-batch: samples differ in length, expected --micro-batch 1 with such data")
    input_ids = torch.stack([item["input_ids"] for item in items])
    return {"input_ids": input_ids, "window": items[0]["window"], "sinks": items[0]["sinks"]}


def _sequences(sources: Sequence[str], length: int, tokenizer: Any) -> Iterator[list[int]]:
    joined: list[int] = []
    for source in sources:
        path = pathlib.Path(source)
        if path.is_dir():
            raise AHNError(f"--data {source}: a folder, expected files or the name of a data set")
        if path.is_file() and path.suffix in JSON_LINES:
            for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
                if line.strip():
                    yield _encode_row(_parse(line, f"{source}:{number}"), f"{source}:{number}", tokenizer)
        elif path.is_file():
            joined += tokenizer(_read_text(path), add_special_tokens=False, verbose=False)["input_ids"]
            joined.append(_end_of_text(tokenizer))
        else:
            for number, row in enumerate(_load_rows(source)):
                yield _encode_row(row, f"{source}, row {number}", tokenizer)
    for start in range(0, max(len(joined) - length, 0) + 1, length):
        yield joined[start : start + length]


def _read_text(path: pathlib.Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise AHNError(f"--data {path}: not UTF-8 at byte {error.start}, expected text") from None


def _end_of_text(tokenizer: Any) -> int:
    # Qwen ends a turn by its end of sequence, and pads with what ends a text.
    return int(tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id)


def _load_rows(source: str) -> Any:
    import datasets

    try:
        return datasets.load_dataset(source, split="train")
    except Exception as error:  # the network, the hub, a name that is none
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise AHNError(
            f"--data {source}: no such file, and no data set of that name can be loaded ({reason})"
        ) from None


def _parse(line: str, where: str) -> Any:
    try:
        return json.loads(line)
    except ValueError:
        raise AHNError(f"--data {where}: not JSON, expected an object with messages or text") from None


def _encode_row(row: Any, where: str, tokenizer: Any) -> list[int]:
    if isinstance(row, Mapping) and isinstance(row.get("messages"), list):
        return list(tokenizer.apply_chat_template(row["messages"], tokenize=True, return_dict=False))
    if isinstance(row, Mapping) and isinstance(row.get("text"), str):
        return list(tokenizer(row["text"], add_special_tokens=False)["input_ids"])
    raise AHNError(f'--data {where}: expected an object with "messages" (a chat) or "text"')
