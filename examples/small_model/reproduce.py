"""Make the small model from scratch: base, three memories, how much they help and what they recall.

    python examples/small_model/reproduce.py FOLDER [--effort SHARE]        (or: make small-model)

FOLDER, new or empty, becomes what ``examples/small_model`` holds: ``base``, ``gdn``, ``dn`` and ``mamba2``, which
``vllm serve`` takes, with the records of their training, and the figures. A run that was cut short starts over. It
takes 1 3/4 hours on two cores; with an effort of 0.5 one hour, and base and memories have then learnt less.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import pathlib
import shutil
import subprocess
import sys
import time
from typing import Any

from corpus import Corpus, write_corpus
from recipe import MEMORIES, TEXT, distill_command, use_own_commands

HERE = pathlib.Path(__file__).parent


def train_base(folder: pathlib.Path, effort: float) -> None:
    """Train the base, in ``base``."""
    command = [sys.executable, str(HERE / "train_base.py"), str(folder / "base"), "--effort", str(effort)]
    subprocess.run(command, check=True)


def train_memories(folder: pathlib.Path, corpus: Corpus, effort: float) -> None:
    """Train all memories at once, each on a core of its own if there are as many; write ``training.json`` for each."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    started = time.monotonic()
    running = {}
    for name in MEMORIES:
        with (folder / f"{name}.log").open("w") as log:
            running[name] = subprocess.Popen(
                distill_command(name, effort), cwd=folder, env=environment, stdout=log, stderr=subprocess.STDOUT
            )
    print(f"training {', '.join(running)}; progress in {folder}/*.log", flush=True)
    while running:
        time.sleep(1)
        for name, process in list(running.items()):
            if process.poll() is None:
                continue
            del running[name]
            if process.returncode:
                for other in running.values():
                    other.terminate()
                sys.exit(f"{name} failed, see {folder / name}.log")
            seconds = round(time.monotonic() - started)
            write_record(folder / name, process.args, corpus, seconds)
            for left in [*(folder / name).glob("checkpoint-*"), folder / f"{name}.log"]:
                shutil.rmtree(left) if left.is_dir() else left.unlink()
            print(f"{name}: {seconds // 60} min", flush=True)


def write_record(folder: pathlib.Path, command: list[str], corpus: Corpus, seconds: int) -> None:
    """Write ``training.json``: what it takes to make the memory again."""
    record: dict[str, Any] = {
        "command": " ".join(command),
        "data": {"sha256": corpus.sha256},
        "seconds": seconds,
        "versions": {name: importlib.metadata.version(name) for name in ("torch", "transformers", "vllm-ahn")},
    }
    (folder / "training.json").write_text(json.dumps(record, indent=2) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=pathlib.Path)
    parser.add_argument("--effort", type=float, default=1.0, help="share of all training steps to take")
    args = parser.parse_args()
    folder = args.folder.resolve()
    if not args.effort > 0:
        sys.exit(f"--effort is {args.effort}, expected a share of the steps, as 0.5 or 1")
    if folder.exists() and any(folder.iterdir()):
        sys.exit(f"{folder} is not empty, expected a new folder")
    use_own_commands()
    corpus = write_corpus(folder / TEXT)
    train_base(folder, args.effort)
    train_memories(folder, corpus, args.effort)
    shutil.rmtree(folder / TEXT)
    for script in ("held_out.py", "recall.py"):
        subprocess.run([sys.executable, str(HERE / script), str(folder)], check=True)


if __name__ == "__main__":
    main()
