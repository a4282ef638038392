"""What the memories of the small model are trained with, and how the scripts beside this one find their commands."""

from __future__ import annotations

import os
import pathlib
import sys

TEXT = "text"
"""Folder of the texts while they are needed."""

RECIPE = [
    "--data", f"{TEXT}/train.txt", "--length", "512", "--sink-choices", "0", "--max-ratio", "17", "--batch-size", "8",
    "--micro-batch", "8", "--learning-rate", "4e-3", "--warm-up", "0.05", "--seed", "1", "--dtype", "bfloat16",
    "--no-checkpointing", "--save-every", "250",
]  # fmt: skip
"""Arguments of ``vllm-ahn distill`` for every memory."""

STEPS = 2400

MEMORIES = {
    "gdn": ["--lossless", "32", "32", "64", "64", "128", "256", "--use-q-proj"],
    "dn": ["--lossless", "32", "64", "128", "256"],
    "mamba2": ["--lossless", "32", "64", "128", "256"],
}
"""Names of memories, and of their folders, with the arguments of each. GatedDeltaNet is trained with short windows,
where most is to be remembered, in two thirds of its batches; with so many of them the others would do harm just beyond
the longest window."""


def distill_command(name: str, effort: float = 1.0) -> list[str]:
    """Return the command that trains the memory `name`, in the folder that holds base and text."""
    steps = str(share_of(STEPS, effort))
    return [
        "vllm-ahn", "distill", "base", "--memory", name, "--output", name, *RECIPE, "--steps", steps, *MEMORIES[name],
    ]  # fmt: skip


def share_of(steps: int, effort: float) -> int:
    """Return how many of `steps` an effort of 0.5, say, takes."""
    return max(1, round(steps * effort))


def memories_in(folder: pathlib.Path) -> list[str]:
    """Return the memories that `folder` holds."""
    return [name for name in MEMORIES if (folder / name).is_dir()]


def use_own_commands() -> None:
    """Put this environment's ``vllm`` and ``vllm-ahn`` first on the path, whether it is activated or not."""
    os.environ["PATH"] = f"{pathlib.Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
