"""Make the small model from nothing: base, three memories, what they are worth and what they recall.

    python examples/small_model/reproduce.py FOLDER [--effort SHARE]        (or: make small-model)

FOLDER, new or empty, becomes what ``examples/small_model`` holds: ``base``, ``gdn``, ``dn`` and ``mamba2``, which
``vllm serve`` takes, with the records of their training, and the figures. A run that was cut short is begun anew. It
takes an hour and three quarters on two cores; with an effort of 0.5 an hour, and base and memories have learnt less.
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

sys.path.insert(0, str(pathlib.Path(__file__).parent))

from corpus import Corpus, write_corpus

HERE = pathlib.Path(__file__).parent

TEXT = "text"
"""Folder of the texts while they are needed."""

RECIPE = [
    "--data", f"{TEXT}/train.txt", "--length", "512", "--sink-choices", "0", "--max-ratio", "17", "--batch-size", "8",
    "--micro-batch", "8", "--learning-rate", "4e-3", "--warm-up", "0.05", "--seed", "1", "--dtype", "bfloat16",
    "--no-checkpointing", "--save-every", "250",
]  # fmt: skip
"""Of every memory."""

STEPS = 2400

MEMORIES = {
    "gdn": ["--lossless", "32", "32", "64", "64", "128", "256", "--use-q-proj"],
    "dn": ["--lossless", "32", "64", "128", "256"],
    "mamba2": ["--lossless", "32", "64", "128", "256"],
}
"""Names of memories and folders, and what is theirs alone: GatedDeltaNet sees short windows, where most is to be
remembered, in two thirds of its batches; the others would then do harm just behind the longest."""


def memories_in(folder: pathlib.Path) -> list[str]:
    """The memories that `folder` holds."""
    return [name for name in MEMORIES if (folder / name).is_dir()]


def find_own_commands() -> None:
    """Lets ``vllm-ahn`` be the command of this environment, whether it is activated or not."""
    os.environ["PATH"] = f"{pathlib.Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"


def share_of(steps: int, effort: float) -> int:
    """The steps that an effort of 0.5, say, takes of all."""
    return max(1, round(steps * effort))


def train_base(folder: pathlib.Path, effort: float) -> None:
    command = [sys.executable, str(HERE / "train_base.py"), str(folder / "base"), "--effort", str(effort)]
    subprocess.run(command, check=True)


def distill_command(name: str, effort: float = 1.0) -> list[str]:
    """What trains a memory, in the folder that holds base and text."""
    steps = str(share_of(STEPS, effort))
    return [
        "vllm-ahn", "distill", "base", "--memory", name, "--output", name, *RECIPE, "--steps", steps, *MEMORIES[name],
    ]  # fmt: skip


def train_memories(folder: pathlib.Path, corpus: Corpus, effort: float) -> None:
    """All at once, each on a core of its own as long as there are some, and writes ``training.json`` beside each."""
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
    """``training.json``: what it takes to make the memory again."""
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
    find_own_commands()
    corpus = write_corpus(folder / TEXT)
    train_base(folder, args.effort)
    train_memories(folder, corpus, args.effort)
    shutil.rmtree(folder / TEXT)
    for script in ("held_out.py", "recall.py"):
        subprocess.run([sys.executable, str(HERE / script), str(folder)], check=True)


if __name__ == "__main__":
    main()
