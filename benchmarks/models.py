"""The models and engines that the benchmarks compare, and the options that say which."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import math
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import report
from engines import EngineProcess, started
from report import Mismatch
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


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(number) for number in text.split(","))


OPTIONS: dict[str, dict[str, Any]] = {
    "model": {"help": "shape of the model", "choices": list(SHAPES)},
    "layers": {"help": "of the model", "type": int},
    "dtype": {"help": "of the model", "choices": list(DTYPE_BYTES)},
    "rows": {"help": f"of {', '.join(ROWS)}", "type": lambda text: tuple(text.split(","))},
    "contexts": {"help": "tokens, with commas", "type": _numbers},
    "window": {"help": "W", "type": int},
    "sinks": {"help": "S", "type": int},
    "max_batch": {"help": "sequences at a time, at most", "type": int},
    "sequences": {"help": "size of a cache; 0: all memory that vLLM takes", "type": int},
    "budget": {"help": "tokens a step (max_num_batched_tokens)", "type": int},
    "steps": {"help": "decode steps of a measurement", "type": int},
    "rounds": {"help": "turns at one length", "type": int},
    "repetitions": {"help": "of every measurement", "type": int},
    "tolerance": {"help": "of log-probabilities against eager, nats", "type": float},
    "batches": {"help": "to measure at, besides the most that fits; default: 1,2,4,...", "type": _numbers},
    "seed": {"help": "of the weights", "type": int},
    "threads": {"help": "of OpenMP, for each engine", "type": int},
    "engine_args": {"help": "vllm.LLM's, for all", "type": json.loads, "metavar": "JSON"},
}
"""Options of the programs that compare engines; each takes some of them, and has its own defaults."""


def parser(description: str | None, output: str, *names: str) -> argparse.ArgumentParser:
    """Return a parser of ``--output`` and some of `OPTIONS`; what is not given is not among its values."""
    result = report.parser(description)
    result.add_argument("--output", type=Path, default=report.FOLDER / output, help="without .json and .md")
    for name in names:
        result.add_argument("--" + name.replace("_", "-"), default=argparse.SUPPRESS, **OPTIONS[name])
    return result


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
    """Arguments of every engine, over those of `arguments`."""
    rounds: int = 1
    batches: tuple[int, ...] = ()
    seed: int = 0
    alone: bool = False
    """One engine at a time, where otherwise all live side by side and take turns."""

    @classmethod
    def read(cls, defaults: dict[str, Any], args: argparse.Namespace, **fixed: Any) -> Comparison:
        """Return what options and defaults say, over which come ``fixed`` values."""
        values = defaults | {name: value for name, value in vars(args).items() if name in OPTIONS} | fixed
        values["contexts"] = tuple(sorted(values["contexts"], reverse=True))
        values["engine"] = values.get("engine", {}) | values.pop("engine_args", {})
        values.pop("threads", None)
        return cls(**values)

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
        token = 2 * shape["kv_heads"] * (shape["hidden"] // shape["heads"]) * DTYPE_BYTES[self.dtype] * self.layers
        # One block more, since vLLM keeps one for itself: 128 tokens are enough for any size of blocks.
        return math.ceil((sequences * self.contexts[0] + 128) * token)

    def keeps_all(self, row: str, context: int) -> bool:
        """Return whether a sequence of ``context`` tokens keeps all its blocks in this row."""
        return ROWS[row].memory is None or context <= self.capacity


def write_models(setting: Comparison, folder: Path, *, weights: bool = False) -> dict[str, Path]:
    """Write configurations, and ``weights`` if asked to; return the base's folder as "base", an AHN's by its memory."""
    folders: dict[str, Path] = {}
    wanted = [ROWS[row].memory for row in setting.rows]
    longest = {"max_position_embeddings": setting.contexts[0], "weights": weights, "dtype": setting.dtype}
    for memory in [memory for memory in MEMORIES if memory in wanted] or list(MEMORIES)[:1]:  # the base comes with any
        paths = make_tiny(folder / memory, memory=memory, **longest, **setting.shape)
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
    """Yield an engine for each row, which has started with weights from disk, and the folders of the models.

    A `Mismatch` ends the program with a sentence.
    """
    with tempfile.TemporaryDirectory(prefix="vllm-ahn-benchmark-") as folder:
        folders = write_models(setting, Path(folder), weights=True)
        with started({row: arguments(setting, row, folders) for row in setting.rows}, threads) as engines:
            for row, engine in engines.items():
                engine.wait()
                report.say(f"{row} has started in {engine.info['start_s']:.0f} s")
            try:
                yield engines, folders
            except Mismatch as error:
                sys.exit(f"not verified: {error}")
