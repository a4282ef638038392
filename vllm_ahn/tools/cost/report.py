"""One report: every row of both tables for each length, as plain values."""

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
    """What is to be reported."""

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


def configs(
    window: int, sinks: int, ahn: AHNConfig | None, memories: Sequence[str] = tuple(MEMORIES)
) -> list[AHNConfig]:
    """The rows to compare: sinks and window alone, then `ahn` or, without one, each of `memories`."""
    rows = [AHNConfig(None, window, sinks)]
    if ahn is None:
        rows += [AHNConfig(memory, window, sinks) for memory in memories]
    elif ahn.memory is not None:
        rows.append(ahn)
    return rows


def name(config: AHNConfig) -> str:
    """A row's name."""
    return WINDOW_ROW if config.memory is None else f"AHN, {config.memory}"


def report(question: Question) -> dict[str, Any]:
    """Everything that is printed, as JSON values: sizes in bytes, on each rank where vLLM allocates; shares in %."""
    model, settings, first = question.model, question.settings, question.configs[0]
    return {
        "model": {"name": model.name, **dataclasses.asdict(model.shape)},
        "window": first.window,
        "sinks": first.sinks,
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
        yield _paper_row(name(config), paper.window_attention(shape, length, config.capacity, config.memory), full)


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
    rows += [(name(config), config, ahn_attention(shape, settings, length, config)) for config in question.configs]
    whole = {
        "mixing_flops": flops.mixing_flops(shape, length, None),
        "model_flops": flops.model_flops(shape, length, None),
        "reserved_bytes": full.reserved_bytes,
        "held_bytes": full.held_bytes,
    }
    for row, config, allocation in rows:
        values = {
            "mixing_flops": flops.mixing_flops(shape, length, config),
            "model_flops": flops.model_flops(shape, length, config),
            "reserved_bytes": allocation.reserved_bytes,
            "held_bytes": allocation.held_bytes,
        }
        yield {
            "name": row,
            **values,
            "percent": {key: 100 * values[key] / whole[key] for key in values},
            "block_bytes": allocation.block_bytes,
            "reserved_blocks": allocation.reserved_blocks,
            "held_blocks": allocation.held_blocks,
            "parts_bytes": allocation.parts(),
            "parts_percent": {key: 100 * value / full.held_bytes for key, value in allocation.parts().items()},
            "max_concurrency": allocation.max_concurrency(question.cache_bytes),
            "max_decoding": allocation.max_decoding(question.cache_bytes),
        }
