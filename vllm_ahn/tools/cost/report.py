"""The report: every row of both tables for each length, as plain values."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

from vllm_ahn.config import AHNConfig
from vllm_ahn.errors import AHNError
from vllm_ahn.memory.spec import MEMORIES
from vllm_ahn.tools.cost import flops, paper
from vllm_ahn.tools.cost.allocation import FP8, Allocation, EngineSettings, ahn_attention, full_attention
from vllm_ahn.tools.cost.shape import Model, ModelShape

WINDOW_ROW = "sinks + window"
FULL_ROW = "full attention"


@dataclasses.dataclass(frozen=True)
class Question:
    """What the report is about. Raises `AHNError` for a length that never leaves the window."""

    model: Model
    configs: Sequence[AHNConfig]
    """One a row: sinks and window alone first, then the memories. All have the same window and sinks."""
    settings: EngineSettings
    lengths: Sequence[int]
    cache_gib: float
    """Memory for the cache, on each rank."""

    def __post_init__(self) -> None:
        for length in self.lengths:
            if length <= self.configs[0].capacity:
                raise AHNError(
                    f"--length is {length:,}, expected more tokens than window and sinks together, "
                    f"{self.configs[0].window:,} + {self.configs[0].sinks:,} = {self.configs[0].capacity:,}"
                )

    @property
    def cache_bytes(self) -> int:
        return int(self.cache_gib * 2**30)


def compared_configs(
    window: AHNConfig, ahn: AHNConfig | None, memories: Sequence[str] = tuple(MEMORIES)
) -> list[AHNConfig]:
    """Return the rows to compare: `window`, which has no memory, then `ahn` or, without one, each of `memories`."""
    if ahn is not None:
        return [window] if ahn.memory is None else [window, ahn]
    return [window, *(dataclasses.replace(window, memory=memory) for memory in memories)]


def row_name(config: AHNConfig) -> str:
    """Return what a row is called."""
    return WINDOW_ROW if config.memory is None else f"AHN, {config.memory}"


def build_report(question: Question) -> dict[str, Any]:
    """Return everything that is printed, as JSON values: sizes in bytes, of one rank where vLLM allocates; shares in
    %."""
    model, settings, first = question.model, question.settings, question.configs[0]
    return {
        "model": {"name": model.name, **dataclasses.asdict(model.shape)},
        "window": first.window,
        "sinks": first.sinks,
        "state_dtype": first.state_dtype,
        "settings": {**dataclasses.asdict(settings), "max_in_flight_tokens": settings.max_in_flight_tokens},
        "cache_memory_bytes": question.cache_bytes,
        "lengths": [
            {
                "length": length,
                "paper": list(_paper_rows(model.shape, length, question.configs)),
                "vllm": list(_vllm_rows(question, length)),
            }
            for length in question.lengths
        ],
    }


def _paper_rows(shape: ModelShape, length: int, rows: Sequence[AHNConfig]) -> Iterator[dict[str, Any]]:
    full = paper.full_attention(shape, length)
    yield _paper_row(FULL_ROW, full, full)
    for config in rows:
        yield _paper_row(row_name(config), paper.window_attention(shape, length, config.capacity, config.memory), full)


def _paper_row(row: str, cost: paper.PaperCost, full: paper.PaperCost) -> dict[str, Any]:
    values, whole = dataclasses.asdict(cost), dataclasses.asdict(full)
    return {"name": row, **values, "percent": {key: 100 * values[key] / whole[key] for key in values}}


def _vllm_rows(question: Question, length: int) -> Iterator[dict[str, Any]]:
    shape, settings = question.model.shape, question.settings
    full = full_attention(shape, settings, length, settings.dtype)
    rows: list[tuple[str, AHNConfig | None, Allocation]] = [
        (f"{FULL_ROW}, {settings.dtype}", None, full),
        (f"{FULL_ROW}, {FP8}", None, full_attention(shape, settings, length, FP8)),
    ]
    rows += [(row_name(config), config, ahn_attention(shape, settings, length, config)) for config in question.configs]

    def costs(config: AHNConfig | None, allocation: Allocation) -> dict[str, int]:
        return {
            "mixing_flops": flops.mixing_flops(shape, length, config),
            "model_flops": flops.model_flops(shape, length, config),
            "reserved_bytes": allocation.reserved_bytes,
            "held_bytes": allocation.held_bytes,
        }

    whole = costs(None, full)
    for row, config, allocation in rows:
        values, parts = costs(config, allocation), allocation.parts()
        yield {
            "name": row,
            **values,
            "percent": {key: 100 * values[key] / whole[key] for key in values},
            "block_bytes": allocation.block_bytes,
            "reserved_blocks": allocation.reserved_blocks,
            "held_blocks": allocation.held_blocks,
            "checkpoint_blocks": allocation.checkpoint_blocks,
            "parts_bytes": parts,
            "parts_percent": {key: 100 * value / full.held_bytes for key, value in parts.items()},
            "max_concurrency": allocation.max_concurrency(question.cache_bytes),
            "max_decoding": allocation.max_decoding(question.cache_bytes),
        }
