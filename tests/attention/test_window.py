"""Attention beyond W + S: compacted tables show a query exactly what the definition says."""

import itertools

import numpy as np
import pytest
import torch

from support.cache_case import specs
from vllm_ahn.attention.paged.cpu import MASKED_QUERIES
from vllm_ahn.attention.plan import StepRequests, cut_into_spans
from vllm_ahn.attention.window import compact_tables, span_limits, visible_keys
from vllm_ahn.cache.specs import AHNWindowSpec

REARRANGED = [(40, 32, 16), (16, 0, 16), (33, 16, 16), (100, 64, 32), (129, 128, 64)]
MASKED = [(24, 8, 16), (24, 8, 32), (1, 3, 16), (50, 40, 16), (300, 100, 32)]


def visible(spec: AHNWindowSpec, t: int) -> set[int]:
    """The definition: positions that a query at ``t`` sees."""
    return {j for j in range(t + 1) if t - j < spec.window or j < spec.sinks}


def table_of(length: int, size: int) -> torch.Tensor:
    """A block table whose block ids say which block it is: block i has the id 1000 + i."""
    return 1000 + torch.arange(-(-length // size) + 3)


@pytest.mark.parametrize("window, sinks, size", REARRANGED + MASKED)
def test_compact_tables(window: int, sinks: int, size: int) -> None:
    """By a sliding window alone where the table is rearranged, else by the mask."""
    spec, _ = specs(window, sinks, 64, size)
    assert spec.rearrangeable == ((window, sinks, size) in REARRANGED)
    capacity, seen, longest = window + sinks, 0, 0
    starts = [0, 1, sinks, capacity - 1, capacity, capacity + 1, capacity + size // 2, 3 * capacity + 5]
    for start, length in itertools.product(starts, [1, 2, size, window, 3 * window + 60]):
        end = start + length
        requests = StepRequests(np.array([0, length]), np.array([end]), capacity)
        owners, bounds, lens = cut_into_spans(requests, *span_limits(spec, MASKED_QUERIES))
        span_starts, span_ends = torch.tensor(start + bounds[:-1]), torch.tensor(start + bounds[1:])
        assert (owners == 0).all() and torch.equal(span_ends, torch.tensor(lens))
        positions = [t for span in zip(span_starts.tolist(), span_ends.tolist(), strict=True) for t in range(*span)]
        assert positions == list(range(start, end))
        tables = table_of(end, size).expand(len(owners), -1)
        compact, compact_lens = compact_tables(spec, tables, span_starts, span_ends)
        for row, seq_len, span_start, span_end in zip(
            compact, compact_lens.tolist(), span_starts, span_ends, strict=True
        ):
            # No entry names a block behind the span's end, where nothing may have been written.
            assert int(row.max()) <= 1000 + (int(span_end) - 1) // size
            keys = ((row - 1000).unsqueeze(-1) * size + torch.arange(size)).flatten()
            longest = max(longest, seq_len - int(span_end - span_start))
            for t in range(int(span_start), int(span_end)):
                query = seq_len - (int(span_end) - t)
                assert int(keys[query]) == t
                if spec.rearrangeable:
                    shown = keys[max(0, query - capacity + 1) : query + 1].tolist()
                else:
                    shown = keys[visible_keys(spec, torch.tensor(query), torch.arange(len(keys)))].tolist()
                assert sorted(shown) == sorted(visible(spec, t))
                seen += 1
    assert seen > 500
    assert longest <= capacity + 3 * size  # however long the sequence is
