"""What `engine.py` and `length.py` compare: models, rows, and the arguments of each row's engine."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

from vllm_ahn.config import NO_MEMORY
from vllm_ahn.memory.spec import MEMORIES
from vllm_ahn.tools.tiny import make_tiny

SHAPES: dict[str, dict[str, Any]] = {
    "3B": {
        "hidden": 2048,
        "intermediate": 11008,
        "heads": 16,
        "kv_heads": 2,
        "layers": 36,
        "vocab": 151936,
        "tie_word_embeddings": True,
    },
    "7B": {
        "hidden": 3584,
        "intermediate": 18944,
        "heads": 28,
        "kv_heads": 4,
        "layers": 28,
        "vocab": 152064,
        "tie_word_embeddings": False,
    },
    "0.5B": {
        "hidden": 896,
        "intermediate": 4864,
        "heads": 14,
        "kv_heads": 2,
        "layers": 24,
        "vocab": 151936,
        "tie_word_embeddings": True,
    },
    "tiny": {
        "hidden": 128,
        "intermediate": 256,
        "heads": 4,
        "kv_heads": 2,
        "layers": 2,
        "vocab": 512,
        "tie_word_embeddings": False,
    },
}
"""Arguments of `vllm_ahn.tools.tiny.make_tiny`: Qwen2.5's own shapes, and one for a test."""

DTYPE_BYTES = {"bfloat16": 2, "float32": 4}


@dataclasses.dataclass(frozen=True)
class Row:
    """One engine of the comparison."""

    text: str
    memory: str | None = None
    """One of vllm_ahn's memories, "none" for sinks and window alone, None for full attention."""
    cache_dtype: str = "auto"
    may_be_missing: bool = False
    """vLLM lacks it on some devices: the row then says so, in vLLM's words."""


ROWS = {
    "full": Row("full attention"),
    "full-fp8": Row("full attention, fp8 cache", cache_dtype="fp8", may_be_missing=True),
    "window": Row("sinks + window, no memory", NO_MEMORY),
    "ahn-gdn": Row("AHN, GatedDeltaNet", "GatedDeltaNet"),
    "ahn-dn": Row("AHN, DeltaNet", "DeltaNet"),
    "ahn-mamba2": Row("AHN, Mamba2", "Mamba2"),
}
DEFAULT_ROWS = ("full", "full-fp8", "window", "ahn-gdn")


@dataclasses.dataclass(frozen=True)
class Comparison:
    """What the models and engines of all rows have in common. Lengths are in tokens."""

    model: str
    layers: int
    dtype: str
    rows: tuple[str, ...]
    contexts: tuple[int, ...]
    """Longest first, so that what a time budget cuts off is the lesser part."""
    window: int
    sinks: int
    max_batch: int
    sequences: int
    """Cache of an engine: what so many sequences of the longest context take with full attention; 0: all vLLM takes."""
    budget: int
    steps: int
    repetitions: int
    tolerance: float
    engine: dict[str, Any]
    """Arguments of every engine, over those below."""

    @property
    def shape(self) -> dict[str, Any]:
        """The model's, as in `SHAPES`, with the layers of this comparison."""
        return SHAPES[self.model] | {"layers": self.layers}

    @property
    def all_layers(self) -> int:
        """Layers of the real model."""
        return int(SHAPES[self.model]["layers"])

    @property
    def capacity(self) -> int:
        """W + S: tokens before any leaves the window."""
        return self.window + self.sinks

    def cache_bytes(self, sequences: float) -> int:
        """Keys and values of so many sequences of the longest context, full attention in the model's dtype."""
        shape = self.shape
        head_size = shape["hidden"] // shape["heads"]
        token = 2 * shape["kv_heads"] * head_size * DTYPE_BYTES[self.dtype] * self.layers
        # One block more, since vLLM keeps one for itself: 128 tokens are enough for any size of blocks.
        return math.ceil((sequences * self.contexts[0] + 128) * token)

    def keeps_all(self, row: str, context: int) -> bool:
        """Whether a sequence of ``context`` tokens keeps all its blocks in this row."""
        return ROWS[row].memory is None or context <= self.capacity


@dataclasses.dataclass(frozen=True)
class Setting(Comparison):
    """One comparison of `engine.py`."""

    batches: tuple[int, ...]
    alone: bool
    """One engine at a time, where otherwise all live side by side and take turns."""
    seed: int


def write_models(setting: Comparison, folder: Path, *, weights: bool = False) -> dict[str, Path]:
    """Writes configurations, and ``weights`` if wanted.

    Returns the folder of the base as "base", of each AHN by its memory.
    """
    folders: dict[str, Path] = {}
    wanted = [ROWS[row].memory for row in setting.rows]
    for memory in [memory for memory in MEMORIES if memory in wanted] or list(MEMORIES)[:1]:  # the base comes with any
        paths = make_tiny(
            folder / memory,
            memory=memory,
            dtype=setting.dtype,
            max_position_embeddings=max(setting.contexts),
            weights=weights,
            **setting.shape,
        )
        folders.setdefault("base", paths.base)
        assert paths.ahn is not None
        folders[memory] = paths.ahn
    return folders


def arguments(setting: Comparison, row: str, folders: dict[str, Path], *, eager: bool) -> dict[str, Any]:
    """The arguments of `vllm.LLM` for one row, the eager one to verify by or the one to measure."""
    memory = ROWS[row].memory
    values: dict[str, Any] = {
        "model": str(folders["base"]),
        "load_format": "dummy",
        "dtype": setting.dtype,
        "max_model_len": setting.contexts[0],
        "max_num_batched_tokens": setting.budget,
        "max_num_seqs": setting.max_batch,
        "kv_cache_dtype": ROWS[row].cache_dtype,
    }
    if memory is not None:
        checkpoint = memory if memory == NO_MEMORY else str(folders[memory])
        ahn = {"checkpoint": checkpoint, "window": setting.window, "sinks": setting.sinks}
        values["additional_config"] = {"ahn": ahn}
    if setting.sequences or eager:
        values["kv_cache_memory_bytes"] = setting.cache_bytes(1.25 if eager else setting.sequences)
        # With the cache's size given this only has vLLM refuse to start if less is free, and others are there.
        values["gpu_memory_utilization"] = 0.02
    values |= setting.engine
    if eager:
        values["enforce_eager"] = True
    return values
