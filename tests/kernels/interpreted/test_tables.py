"""compact_block_table against its twin in plain torch, which is tested against the definition of what a query sees."""

import random

import numpy as np
import pytest
import torch

from support.cache_case import specs
from vllm_ahn.attention.plan import StepRequests, cut_into_spans
from vllm_ahn.attention.window import compact_tables, span_limits
from vllm_ahn.kernels.tables import TILE_BLOCKS, compact_block_table, compact_width

MASKED_QUERIES = 20
SETTINGS = [
    (40, 32, 16),
    (16, 0, 16),
    (33, 16, 16),
    (100, 64, 32),
    (129, 128, 64),
    (24, 8, 16),
    (1, 3, 16),
    (50, 40, 32),
]


@pytest.mark.parametrize("decode", [True, False], ids=["decode", "mixed"])
@pytest.mark.parametrize("window, sinks, size", SETTINGS)
def test_compact_block_table_equals_plain_torch(window: int, sinks: int, size: int, decode: bool) -> None:
    """Requests at every stage; what lies behind a span in its table is left alone, and so is a request without one."""
    spec, _ = specs(window, sinks, 64, size)
    capacity = window + sinks
    before = [0, 1, sinks, window, capacity - 1, capacity, capacity + size // 2 + 1, 3 * capacity + 5]
    new = [1 if decode else random.choice((0, 1, 2, size, 3 * window + 30)) for _ in before]
    starts, seq_lens = np.cumsum([0, *new]), np.add(before, new)
    owners, span_starts, span_lens = cut_into_spans(
        StepRequests(starts, seq_lens, capacity), *span_limits(spec, MASKED_QUERIES)
    )
    width = -(-int(seq_lens.max()) // size) + 3
    tables = torch.randint(1, 1 << 20, (len(before), width), dtype=torch.int32)
    ends = torch.tensor(span_lens)
    wanted, wanted_lens = compact_tables(spec, tables[owners], ends - torch.tensor(np.diff(span_starts)), ends)

    query_start_loc, lens = torch.tensor(span_starts).int(), ends.int()
    requests = None if decode else torch.tensor(owners).int()
    most = max(np.diff(span_starts).max(), 1)
    table = torch.full((len(owners) + 1, compact_width(window, sinks, size, int(most)) + TILE_BLOCKS), -7).int()
    got_lens = torch.full((len(owners) + 1,), -7).int()
    compact_block_table(
        tables, requests, query_start_loc, lens, window, sinks, size, spec.rearrangeable, table, got_lens
    )
    assert got_lens.tolist() == [*wanted_lens.tolist(), -7]
    for got, row, length in zip(table, wanted, wanted_lens.tolist(), strict=False):
        blocks = -(-length // size)
        assert torch.equal(got[:blocks], row[:blocks])
        assert (got[blocks:] == -7).all()
    assert (table[-1] == -7).all()
