"""Attention past W + S: rearranged tables and gathered keys show a query exactly what the definition says."""

import itertools

import pytest
import torch

from support.cache_case import specs
from vllm_ahn.attention.cpu import lossless
from vllm_ahn.cache.specs import AHNWindowSpec


def visible(spec: AHNWindowSpec, t: int) -> set[int]:
    """The definition: positions that a query at ``t`` sees."""
    return {j for j in range(t + 1) if t - j < spec.window or j < spec.sinks}


def table_of(length: int, size: int) -> torch.Tensor:
    """A block table whose block ids say which block it is: block i has the id 1000 + i."""
    return 1000 + torch.arange(-(-length // size) + 3)


@pytest.mark.parametrize(
    "window, sinks, size", [(40, 32, 16), (16, 0, 16), (33, 16, 16), (100, 64, 32), (129, 128, 64)]
)
def test_a_sliding_window_over_a_rearranged_table(window: int, sinks: int, size: int) -> None:
    spec, _ = specs(window, sinks, 64, size)
    assert spec.rearrangeable
    capacity, seen = window + sinks, 0
    starts = [0, 1, sinks, capacity - 1, capacity, capacity + 1, capacity + size // 2, 3 * capacity + 5]
    for start, length in itertools.product(starts, [1, 2, size, window, 3 * window + 7]):
        end = start + length
        if end <= capacity:
            continue
        runs = lossless.segments(spec, start, end)
        assert [position for run in runs for position in range(*run)] == list(range(start, end))
        run_starts, run_ends = torch.tensor(runs).unbind(-1)
        table = table_of(end, size).expand(len(runs), -1)
        tables, lengths = lossless.rearranged_tables(spec, table, run_starts, run_ends)
        for row, seq_len, (run_start, run_end) in zip(tables, lengths.tolist(), runs, strict=True):
            positions = ((row - 1000).unsqueeze(-1) * size + torch.arange(size)).flatten()[:seq_len].tolist()
            for t in range(run_start, run_end):
                query = seq_len - (run_end - t)
                assert positions[query] == t
                last = positions[max(0, query - capacity + 1) : query + 1]
                assert len(last) == len(set(last))
                assert set(last) == visible(spec, t)
                seen += 1
    assert seen > 500


@pytest.mark.parametrize("window, sinks, size", [(24, 8, 16), (24, 8, 32), (1, 3, 16), (50, 40, 16), (300, 100, 32)])
def test_gathered_keys(window: int, sinks: int, size: int) -> None:
    spec, _ = specs(window, sinks, 64, size)
    assert not spec.rearrangeable
    capacity = window + sinks

    def positions(blocks: torch.Tensor) -> torch.Tensor:
        return ((blocks - 1000).unsqueeze(-1) * size + torch.arange(size)).flatten(-2)

    queries = torch.tensor([capacity, capacity + 1, capacity + size, 5 * capacity + 3])
    tables = table_of(int(queries.max()) + 1, size).expand(len(queries), -1)
    decode = lossless.decode_keys(spec, tables, queries)
    for t, keys, mask in zip(queries.tolist(), positions(decode.blocks), decode.visible, strict=True):
        assert sorted(keys[mask].tolist()) == sorted(visible(spec, t))

    for start, length in itertools.product([0, 3, capacity - 1, capacity, 4 * capacity + 1], [1, size, 700]):
        end = start + length
        chunks = lossless.chunk_keys(spec, table_of(end, size), 17, start, end)
        assert [row for chunk in chunks for row in range(chunk.start, chunk.end)] == list(range(17, 17 + length))
        for chunk in chunks:
            keys = positions(chunk.blocks)
            for t, mask in zip(range(start + chunk.start - 17, end), chunk.visible, strict=False):
                assert sorted(keys[mask].tolist()) == sorted(visible(spec, t))
