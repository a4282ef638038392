"""The models and engines that the benchmarks compare."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import report
from engines import EngineProcess, started
from report import option
from vllm_ahn.config import NO_MEMORY
from vllm_ahn.memory.spec import MEMORIES
from vllm_ahn.tools.tiny import make_tiny

_SIZES = ("hidden", "intermediate", "heads", "kv_heads", "layers", "vocab", "tie_word_embeddings")
SHAPES: dict[str, dict[str, Any]] = {
    name: dict(zip(_SIZES, values, strict=True))
    for name, values in {
        "3B": (2048, 11008, 16, 2, 36, 151936, True),
        "7B": (3584, 18944, 28, 4, 28, 152064, False),
        "0.5B": (896, 4864, 14, 2, 24, 151936, True),
        "tiny": (128, 256, 4, 2, 2, 512, False),
    }.items()
}
"""Arguments of `vllm_ahn.tools.tiny.make_tiny`: Qwen2.5's own shapes, and one for a test."""
DTYPE_BYTES = {"bfloat16": 2, "float32": 4}


@dataclasses.dataclass(frozen=True)
class Row:
    """One engine of a comparison."""

    text: str
    memory: str | None = None
    """One of vllm_ahn's memories, "none" for sinks and window alone, None for full attention."""
    cache_dtype: str = "auto"
    may_be_missing: bool = False
    """vLLM lacks it on some devices: the row then says so, in vLLM's words."""


FULL, WINDOW, AHN = "full", "window", "ahn-gdn"
ROWS = {
    FULL: Row("full attention"),
    "full-fp8": Row("full attention, fp8 cache", cache_dtype="fp8", may_be_missing=True),
    WINDOW: Row("sinks + window, no memory", NO_MEMORY),
    **{f"ahn-{memory.short_name}": Row(f"AHN, {name}", name) for name, memory in MEMORIES.items()},
}


@dataclasses.dataclass(frozen=True)
class Comparison:
    """What the models and engines of all rows have in common. Lengths are in tokens."""

    model: str = option("shape of the model", choices=list(SHAPES))
    layers: int = option("of the model")
    dtype: str = option("of the model", choices=list(DTYPE_BYTES))
    rows: tuple[str, ...]
    contexts: tuple[int, ...] = option("tokens, with commas")
    """Longest first, so that what a time budget cuts off is the lesser part."""
    window: int = option("W")
    sinks: int = option("S")
    max_batch: int
    sequences: int
    """Cache of an engine: what so many sequences of the longest context take with full attention; 0: all vLLM takes."""
    budget: int = option("tokens a step (max_num_batched_tokens)")
    steps: int = option("decode steps of a measurement")
    repetitions: int = option("of every measurement")
    tolerance: float
    engine: dict[str, Any]
    """Arguments of every engine, over those of `arguments`."""

    @property
    def shape(self) -> dict[str, Any]:
        """The model's, as in `SHAPES`, with the layers of this comparison."""
        return SHAPES[self.model] | {"layers": self.layers}

    @property
    def capacity(self) -> int:
        """W + S: tokens before any leaves the window."""
        return self.window + self.sinks

    def describe(self) -> str:
        """Return the model in words."""
        name = "a tiny model" if self.model == "tiny" else f"Qwen2.5-{self.model}'s shape"
        return f"{name} with {self.layers} layers, {self.dtype}"

    def cache_bytes(self, sequences: float) -> int:
        """Return bytes of so many sequences of the longest context, full attention in the model's dtype."""
        shape = self.shape
        head_size = shape["hidden"] // shape["heads"]
        token = 2 * shape["kv_heads"] * head_size * DTYPE_BYTES[self.dtype] * self.layers
        # One block more, since vLLM keeps one for itself: 128 tokens are enough for any size of blocks.
        return math.ceil((sequences * self.contexts[0] + 128) * token)

    def keeps_all(self, row: str, context: int) -> bool:
        """Return whether a sequence of ``context`` tokens keeps all its blocks in this row."""
        return ROWS[row].memory is None or context <= self.capacity


def write_models(setting: Comparison, folder: Path, *, weights: bool = False) -> dict[str, Path]:
    """Write configurations, and ``weights`` if asked to; return the base's folder as "base", an AHN's by its memory."""
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


def arguments(setting: Comparison, row: str, folders: dict[str, Path], *, eager: bool = False) -> dict[str, Any]:
    """Return the arguments of `vllm.LLM` for one row, the engine to measure or the ``eager`` one to verify by."""
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
    return values | setting.engine | ({"enforce_eager": True} if eager else {})


@contextlib.contextmanager
def running(setting: Comparison, threads: int) -> Iterator[tuple[dict[str, EngineProcess], dict[str, Path]]]:
    """Yield an engine for each row, which has started with weights from disk, and the folders of the models."""
    with tempfile.TemporaryDirectory(prefix="vllm-ahn-benchmark-") as folder:
        folders = write_models(setting, Path(folder), weights=True)
        with started({row: arguments(setting, row, folders) for row in setting.rows}, threads) as engines:
            for row, engine in engines.items():
                engine.wait()
                report.say(f"{row} has started in {engine.info['start_s']:.0f} s")
            yield engines, folders
