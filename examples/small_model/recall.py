"""What the small model's memories recall word for word: values whose keys are asked for again, later.

    python examples/small_model/recall.py FOLDER [--window 64] [--lines 1 2 4 ...] [--questions 100]

A prompt is a class of made-up names, ``key_value = None`` a line, and then one of the keys once more. It counts how
often a byte of the key's value is the model's first choice, and its bits by the engine's log-probabilities, over the
number of lines between: within the window, and far beyond it. FOLDER holds ``base`` and the memories ``gdn``,
``dn``, ``mamba2``. Writes ``recall.json`` and ``recall.svg`` into it.
"""

from __future__ import annotations

import argparse
import json
import math
import pathlib
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from recipe import memories_in

SEED = 7
SYLLABLES = [consonant + vowel for consonant in "bdfgklmnprstvz" for vowel in "aeiou"]
LINE = "    {key}_{value} = None\n"
CACHE_BYTES = 256 << 20


@dataclass(frozen=True)
class Question:
    """A prompt whose last bytes are the value asked for."""

    text: str
    value: str

    @classmethod
    def draw(cls, rng: random.Random, lines: int) -> Question:
        """Draw a table with `lines` lines from the start of the one asked for to the question."""
        names = [name(rng) for _ in range(2 * (lines + 1))]
        rows = list(zip(names[::2], names[1::2], strict=True))
        key, value = rows[1]
        table = "".join(LINE.format(key=key, value=value) for key, value in rows)
        asked, _, _ = LINE.format(key=key, value="\0").partition("\0")
        return cls(f"class Table:\n{table}{asked}{value}", value)


def name(rng: random.Random) -> str:
    """Draw six letters."""
    return "".join(rng.choices(SYLLABLES, k=3))


def ask(base: pathlib.Path, ahn: str | None, window: int, questions: Sequence[Question]) -> list[list[Any]]:
    """Return the engine's log-probability and rank of each byte of each question's value."""
    import vllm

    import vllm_ahn

    arguments: dict[str, Any] = {
        "dtype": "float32", "enforce_eager": True, "enable_prefix_caching": False,
        "kv_cache_memory_bytes": CACHE_BYTES,
    }  # fmt: skip
    if ahn is None:
        llm = vllm.LLM(str(base), **arguments)
    else:
        llm = vllm_ahn.LLM(str(base), ahn=ahn, ahn_window=window, ahn_sinks=0, **arguments)
    params = vllm.SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0, detokenize=False)
    outputs = llm.generate([question.text for question in questions], params)
    llm.llm_engine.engine_core.shutdown()
    answers = []
    for output, question in zip(outputs, questions, strict=True):
        entries = zip(output.prompt_token_ids, output.prompt_logprobs, strict=True)
        answers.append([entry[token] for token, entry in list(entries)[-len(question.value) :]])
    return answers


def measure(folder: pathlib.Path, window: int, lines: Sequence[int], count: int) -> list[dict[str, Any]]:
    """Return a row a method: label, and for each number of lines the share of bytes recalled and their bits."""
    rng = random.Random(SEED)
    questions = {n: [Question.draw(rng, n) for _ in range(count)] for n in lines}
    asked = [question for n in lines for question in questions[n]]
    methods: list[tuple[str, str | None]] = [("full attention", None), ("window alone", "none")]
    methods += [(f"AHN-{name}", str(folder / name)) for name in memories_in(folder)]
    rows = []
    for label, ahn in methods:
        answers = iter(ask(folder / "base", ahn, window, asked))
        recalled, bits = [], []
        for n in lines:
            values = [next(answers) for _ in questions[n]]
            right = [entry.rank == 1 for value in values for entry in value]
            recalled.append(round(sum(right) / len(right), 4))
            logprobs = [entry.logprob for value in values for entry in value]
            bits.append(round(-sum(logprobs) / len(logprobs) / math.log(2), 4))
        rows.append({"label": label, "recalled": recalled, "bits_per_byte": bits})
    return rows


def line_bytes() -> int:
    """Return the bytes of a line, each of which is a token."""
    rng = random.Random(SEED)
    return len(LINE.format(key=name(rng), value=name(rng)))


def plot(rows: Sequence[dict[str, Any]], distances: Sequence[int], window: int, path: pathlib.Path) -> None:
    """Draw both figures over the distance in bytes."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    from vllm_ahn.tools.evaluate.plot import COLOURS

    figure, axes = pyplot.subplots(1, 2, figsize=(11, 4), layout="constrained")
    for axis, key, title in zip(
        axes,
        ("recalled", "bits_per_byte"),
        ("bytes of the value recalled, share", "bits per byte of the value"),
        strict=True,
    ):
        for row, colour in zip(rows, COLOURS, strict=False):
            axis.plot(distances, row[key], color=colour, marker="o", markersize=3, label=row["label"])
        axis.axvline(window, color="#999999", linewidth=0.8, linestyle=(0, (4, 3)))
        axis.set_xscale("log", base=2)
        axis.set_xlabel("bytes from the value to the question; dashed: the window")
        axis.set_title(title, loc="left", fontsize=10)
        axis.set_ylim(bottom=0)
        axis.spines[["top", "right"]].set_visible(False)
        axis.xaxis.set_major_formatter(matplotlib.ticker.FuncFormatter(lambda value, _: f"{value:,.0f}"))
    axes[0].legend(frameon=False, fontsize=8.5)
    figure.savefig(path)
    pyplot.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=pathlib.Path)
    parser.add_argument("--window", type=int, default=64)
    parser.add_argument("--lines", type=int, nargs="+", default=[1, 2, 3, 4, 6, 8, 12, 16, 24, 32])
    parser.add_argument("--questions", type=int, default=100)
    args = parser.parse_args()
    rows = measure(args.folder, args.window, args.lines, args.questions)
    distances = [n * line_bytes() for n in args.lines]
    values = {"seed": SEED, "window": args.window, "questions": args.questions, "distances": distances, "rows": rows}
    (args.folder / "recall.json").write_text(json.dumps(values, indent=2) + "\n")
    plot(rows, distances, args.window, args.folder / "recall.svg")
    for row in rows:
        print(f"{row['label']:16}", "  ".join(f"{share:4.0%}" for share in row["recalled"]))


if __name__ == "__main__":
    main()
