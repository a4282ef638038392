"""How much the memories of the small model help: bits per byte on held-out text, by the engine's log-probabilities.

    python examples/small_model/held_out.py FOLDER [--windows 32 64 128 256] [--context 1024] [--limit 100]

FOLDER holds ``base`` and the memories ``gdn``, ``dn``, ``mamba2``. For every window (no sinks) ``vllm-ahn perplexity``
asks the engine with full attention, the window alone, and each memory. Only positions beyond the window count: up to
eight windows, the longest that the paper trains with, up to half of the context, and all of it. Writes
``evaluation.json`` and ``evaluation.md`` into FOLDER.
"""

from __future__ import annotations

import argparse
import json
import math
import pathlib
import subprocess
import tempfile
from collections.abc import Sequence
from typing import Any

from corpus import write_corpus
from recipe import MEMORIES, memories_in, use_own_commands

ENGINE = '{"max_num_batched_tokens": 1024, "enforce_eager": true}'
"""Long steps: time matters more here than an exact curve of the cache."""

RATIO = 8
"""Windows up to which the first figure counts."""

Bits = dict[str, float]
"""Bits per byte: ``full``, ``window`` and each memory there is."""


def measure(folder: pathlib.Path, text: pathlib.Path, window: int, context: int, limit: int) -> dict[str, Bits]:
    """Return the bits beyond the window, by the position up to which they count."""
    memories = memories_in(folder)
    with tempfile.TemporaryDirectory() as work:
        report = pathlib.Path(work) / "report.json"
        command = [
            "vllm-ahn", "perplexity", str(folder / "base"), "--text", str(text), "--window", str(window),
            "--sinks", "0", "--context", str(context), "--limit", str(limit), "--dtype", "float32",
            "--kv-cache-memory-bytes", str(256 << 20), "--engine-args", ENGINE, "--json", str(report),
            *[part for name in memories for part in ("--ahn", str(folder / name))],
        ]  # fmt: skip
        subprocess.run(command, check=True)
        (suite,) = json.loads(report.read_text())["suites"]
    ends = sorted({min(end, context) for end in (RATIO * window, context // 2, context)})
    labels = ("full", "window", *memories)
    return {
        str(end): {
            label: round(bits_between(row["perplexity"]["buckets"], window, end), 5)
            for label, row in zip(labels, suite["rows"], strict=True)
        }
        for end in ends
    }


def bits_between(buckets: Sequence[dict[str, Any]], first: int, last: int) -> float:
    """Return the bits per byte of tokens predicted from more than `first` and at most `last` tokens."""
    chosen = [bucket for bucket in buckets if first < bucket["start"] and bucket["end"] <= last + 1]
    return sum(bucket["nats"] for bucket in chosen) / math.log(2) / sum(bucket["bytes"] for bucket in chosen)


def recovered(bits: Bits, memory: str) -> float:
    """Return the share of the window's loss that a memory recovers."""
    return (bits["window"] - bits[memory]) / (bits["window"] - bits["full"])


def table(results: dict[str, dict[str, Bits]]) -> str:
    """Format the results as Markdown, a row a window and a last position."""
    memories = [name for name in MEMORIES if all(name in bits for ends in results.values() for bits in ends.values())]
    lines = [
        "| window | bytes | full attention | window alone | " + " | ".join(f"AHN-{name}" for name in memories) + " |",
        "|---:|---:" + "|---:" * (2 + len(memories)) + "|",
    ]
    for window, ends in results.items():
        for end, bits in ends.items():
            cells = [f"{bits[name]:.3f} ({recovered(bits, name):.0%})" for name in memories]
            start = int(window) + 1
            lines.append(
                f"| {window} | {start} to {end} | {bits['full']:.3f} | {bits['window']:.3f} | {' | '.join(cells)} |"
            )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=pathlib.Path)
    parser.add_argument("--windows", type=int, nargs="+", default=[32, 64, 128, 256])
    parser.add_argument("--context", type=int, default=1024)
    parser.add_argument("--limit", type=int, default=100)
    args = parser.parse_args()
    use_own_commands()
    with tempfile.TemporaryDirectory() as work:
        corpus = write_corpus(pathlib.Path(work))
        text = pathlib.Path(work) / "held_out.txt"
        results = {str(window): measure(args.folder, text, window, args.context, args.limit) for window in args.windows}
    values = {"context": args.context, "stretches": args.limit, "data_sha256": corpus.sha256, "bits_per_byte": results}
    (args.folder / "evaluation.json").write_text(json.dumps(values, indent=2) + "\n")
    (args.folder / "evaluation.md").write_text(table(results) + "\n")
    print(table(results))


if __name__ == "__main__":
    main()
