"""vLLM's paged attention over compacted block tables, against a masked softmax over whole sequences."""

import dataclasses
import random
from typing import Any

import pytest
import torch
from vllm.v1.attention.backend import CommonAttentionMetadata

from vllm_ahn.attention.gpu import core as gpu
from vllm_ahn.attention.gpu import metadata as gpu_metadata
from vllm_ahn.attention.gpu.metadata import AHNGpuMetadataPlanner
from vllm_ahn.cache.page import WindowPageLayout, WindowPages
from vllm_ahn.cache.specs import AHNWindowSpec

TOLERANCE = 2e-6
HEADS, KV_HEADS, HEAD_SIZE = 6, 2, 24
SCALE = 0.3


@dataclasses.dataclass
class Batch:
    """Sequences in pages, the last tokens of which are new; everything that is none of theirs is NaN."""

    spec: AHNWindowSpec
    pages: WindowPages
    common: CommonAttentionMetadata
    query: torch.Tensor
    expected: torch.Tensor


def make_batch(
    window: int,
    sinks: int,
    block_size: int,
    requests: list[tuple[int, int]],
    num_padding: int = 0,
    mean_score: float = 0.0,
) -> Batch:
    """``requests`` are (tokens before, new tokens); rows that pad the batch follow."""
    layout = WindowPageLayout(KV_HEADS, HEAD_SIZE, 2 * HEADS // KV_HEADS, block_size, torch.float32)
    spec = AHNWindowSpec(
        block_size=block_size,
        num_kv_heads=KV_HEADS,
        head_size=HEAD_SIZE,
        dtype=layout.dtype,
        state_content_bytes=layout.content_bytes,
        dcp_sharded=False,
        window=window,
        sinks=sinks,
        max_in_flight_tokens=1024,
    )
    width = max(-(-sum(request) // block_size) for request in requests) + 3
    num_blocks = 1 + len(requests) * width
    shape = (num_blocks, KV_HEADS, block_size, layout.content_elements)
    pages = WindowPages(torch.full(shape, float("nan")), layout)
    # What a table holds behind a row's end, and between sinks and window, is some other request's block.
    table = torch.randint(1, num_blocks, (len(requests) + num_padding, width), dtype=torch.int32)
    free = torch.randperm(num_blocks - 1).add(1).tolist()
    queries, expected = [], []
    for row, (before, new) in enumerate(requests):
        total = before + new
        k, v = torch.randn(2, total, KV_HEADS, HEAD_SIZE).unbind()
        q = torch.randn(new, HEADS, HEAD_SIZE)
        k[..., 0], q[..., 0] = 1.0, mean_score / SCALE
        for block in range(-(-total // block_size)):
            start, stop = block * block_size, min((block + 1) * block_size, total)
            if start >= sinks and stop <= before - window:
                continue
            table[row, block] = free.pop()
            pages.keys[table[row, block], :, : stop - start] = k[start:stop].transpose(0, 1)
            pages.values[table[row, block], :, : stop - start] = v[start:stop].transpose(0, 1)
        t, j = torch.arange(before, total)[:, None], torch.arange(total)[None, :]
        visible = (j <= t) & ((t - j < window) | (j < sinks))
        k, v = (x.double().repeat_interleave(HEADS // KV_HEADS, 1) for x in (k, v))
        scores = torch.einsum("thd,jhd->htj", q.double(), k) * SCALE
        weights = scores.masked_fill(~visible, -torch.inf).softmax(-1)
        queries.append(q)
        expected.append(torch.einsum("htj,jhd->thd", weights, v).float())
    new_tokens = [new for _, new in requests]
    starts = torch.tensor([0, *new_tokens, *[0] * num_padding], dtype=torch.int32).cumsum(0).int()
    seq_lens = torch.tensor([sum(request) for request in requests] + [0] * num_padding, dtype=torch.int32)
    num_tokens = sum(new_tokens) + num_padding
    common = CommonAttentionMetadata(
        query_start_loc=starts,
        query_start_loc_cpu=starts.clone(),
        seq_lens=seq_lens,
        seq_lens_cpu_upper_bound=seq_lens.clone(),
        num_reqs=len(seq_lens),
        num_actual_tokens=num_tokens,
        max_query_len=max(new_tokens),
        max_seq_len=int(seq_lens.max()),
        block_table_tensor=table,
        slot_mapping=torch.full((num_tokens,), -1),
    )
    query = torch.cat((*queries, torch.full((num_padding, HEADS, HEAD_SIZE), float("nan"))))
    return Batch(spec, pages, common, query, torch.cat(expected))


def planner(batch: Batch) -> AHNGpuMetadataPlanner:
    return AHNGpuMetadataPlanner(
        batch.spec, num_heads=HEADS, max_requests=16, max_tokens=256, device=torch.device("cpu")
    )


def attend(batch: Batch, metadata: Any) -> torch.Tensor:
    output = torch.full_like(batch.query, float("nan"))
    rows = metadata.windowed or metadata.causal
    gpu.attend(batch.pages, batch.query, output, rows, metadata.segments, SCALE)
    return output[: len(batch.expected)]


@pytest.mark.parametrize("block_size", [16, 32])
@pytest.mark.parametrize("window, sinks", [(24, 8), (33, 17), (40, 0), (1, 48), (64, 16)])
@pytest.mark.parametrize("decode", [True, False], ids=["decode", "mixed"])
def test_attends_to_sinks_and_window(
    window: int, sinks: int, block_size: int, decode: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu_metadata, "QUERIES_PER_ROW", 20)
    capacity = window + sinks
    requests = [(capacity - 1, 1), (capacity, 1), (200, 1), (3, 1)]
    if not decode:
        requests += [(0, 7), (capacity - 5, 50), (160, 33), (0, capacity + 3)]
    random.shuffle(requests)
    batch = make_batch(window, sinks, block_size, requests)
    metadata = planner(batch).plan(batch.common)
    assert metadata.windowed is not None
    assert metadata.windowed.block_table.shape[1] * block_size <= capacity + 20 + 5 * block_size
    torch.testing.assert_close(attend(batch, metadata), batch.expected, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("block_size", [16, 32])
@pytest.mark.parametrize("requests", [[(150, 1), (70, 1)], [(150, 1), (130, 60)]], ids=["decode", "mixed"])
def test_scores_far_below_zero(block_size: int, requests: list[tuple[int, int]]) -> None:
    """Keys that are masked must not count as keys with a score of 0, beside which all others vanish."""
    batch = make_batch(33, 17, block_size, requests, mean_score=-300.0)
    actual = attend(batch, planner(batch).plan(batch.common))
    torch.testing.assert_close(actual, batch.expected, rtol=0, atol=1e-4)


def test_inside_the_capacity_attention_is_plain() -> None:
    batch = make_batch(40, 8, 16, [(0, 48), (20, 3), (47, 1)])
    metadata = planner(batch).plan(batch.common)
    assert metadata.windowed is None and metadata.decode_rows is None and metadata.prefill is None
    torch.testing.assert_close(attend(batch, metadata), batch.expected, rtol=0, atol=TOLERANCE)


def test_a_replayed_graph_finds_another_batch_in_its_buffers() -> None:
    """What is planned at capture is used, with vLLM's and the planner's buffers filled for another batch since."""
    captured = make_batch(24, 8, 16, [(0, 1)] * 5)
    plan = planner(captured)
    metadata = plan.plan(captured.common, for_capture=True)
    assert metadata.decode_rows is not None
    batch = make_batch(24, 8, 16, [(200, 1), (10, 1), (32, 1)], num_padding=2)
    for name in ("query_start_loc", "seq_lens"):
        getattr(captured.common, name).copy_(getattr(batch.common, name))
        setattr(batch.common, name, getattr(captured.common, name))
    plan.plan(batch.common)
    torch.testing.assert_close(attend(batch, metadata), batch.expected, rtol=0, atol=TOLERANCE)
    assert metadata.decode_rows.tolist() == [0, -1, 2, -1, -1]


@pytest.mark.parametrize("queries_per_row", [1, 7, 64])
def test_rows_cover_all_queries_once(queries_per_row: int) -> None:
    generator = random.Random(queries_per_row)
    lens = [generator.choice((0, 1, 1, 6, 7, 8, 70)) for _ in range(20)]
    seq_lens = torch.tensor([length + generator.randrange(50) for length in lens]).numpy()
    starts = torch.tensor([0, *lens]).cumsum(0).numpy()
    requests, row_starts, row_lens = gpu_metadata.cut_into_rows(starts, seq_lens, queries_per_row)
    queries = []
    for row, request in enumerate(requests):
        num_queries = row_starts[row + 1] - row_starts[row]
        assert 0 < num_queries <= queries_per_row
        queries += [(request, row_lens[row] - num_queries + i) for i in range(num_queries)]
    positions = [
        (request, seq_lens[request] - length + i) for request, length in enumerate(lens) for i in range(length)
    ]
    assert queries == positions
