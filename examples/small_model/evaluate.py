"""What the memories of the small model are worth: bits per byte on held-out text, by the engine's log-probabilities.

    python examples/small_model/evaluate.py FOLDER [--windows 32 64 128 256] [--context 1024] [--limit 200]

FOLDER holds ``base`` and the memories ``gdn``, ``dn``, ``mamba2``. For every window (no sinks) ``vllm-ahn perplexity``
asks the engine with full attention, the window alone, and each memory. Only positions beyond the window count.
Writes ``evaluation.json`` and ``evaluation.md`` into FOLDER.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import subprocess
import sys
import tempfile
from typing import Any

sys.path.insert(0, str(pathlib.Path(__file__).parent))

from corpus import write_corpus

MEMORIES = ("gdn", "dn", "mamba2")


def measure(folder: pathlib.Path, text: pathlib.Path, window: int, context: int, limit: int) -> dict[str, Any]:
    """Bits per byte beyond the window: ``full``, ``window`` and each memory there is."""
    memories = [name for name in MEMORIES if (folder / name).is_dir()]
    with tempfile.TemporaryDirectory() as work:
        report = pathlib.Path(work) / "report.json"
        command = [
            "vllm-ahn", "perplexity", str(folder / "base"), "--text", str(text), "--window", str(window),
            "--sinks", "0", "--context", str(context), "--limit", str(limit), "--dtype", "float32",
            "--kv-cache-memory-bytes", str(256 << 20), "--json", str(report),
            *[part for name in memories for part in ("--ahn", str(folder / name))],
        ]  # fmt: skip
        subprocess.run(command, check=True)
        (suite,) = json.loads(report.read_text())["suites"]
    rows = [row["perplexity"]["beyond"]["bits_per_byte"] for row in suite["rows"]]
    return dict(zip(("full", "window", *memories), rows, strict=True))


def recovered(bits: dict[str, float], memory: str) -> float:
    """The share of what the window loses that a memory wins back."""
    return (bits["window"] - bits[memory]) / (bits["window"] - bits["full"])


def table(results: dict[str, dict[str, float]]) -> str:
    """A row a window."""
    memories = [name for name in MEMORIES if all(name in bits for bits in results.values())]
    lines = [
        "| window | full attention | window alone | " + " | ".join(f"AHN-{name}" for name in memories) + " |",
        "|---" * (3 + len(memories)) + "|",
    ]
    for window, bits in results.items():
        cells = [f"{bits[name]:.4f} ({recovered(bits, name):.0%})" for name in memories]
        lines.append(f"| {window} | {bits['full']:.4f} | {bits['window']:.4f} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=pathlib.Path)
    parser.add_argument("--windows", type=int, nargs="+", default=[32, 64, 128, 256])
    parser.add_argument("--context", type=int, default=1024)
    parser.add_argument("--limit", type=int, default=200)
    args = parser.parse_args()
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
