"""vLLM's paged attention over compacted block tables, against a masked softmax over whole sequences.

Triton's kernel runs in the interpreter, FlashAttention is emulated; see ``flash_emulation.py``.
"""

import dataclasses
import random
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from vllm.v1.attention.backend import CommonAttentionMetadata

from support import flash_emulation
from vllm_ahn.attention.core import LayerInputs
from vllm_ahn.attention.gpu import plan as gpu_plan
from vllm_ahn.attention.gpu.compute import GPUCore
from vllm_ahn.attention.gpu.plan import GPUPlan, GPUPlanner
from vllm_ahn.attention.paged import PagedAttention
from vllm_ahn.attention.paged.flash import FlashAttention
from vllm_ahn.attention.paged.triton import TritonAttention
from vllm_ahn.attention.plan import StepRequests, cut_into_spans
from vllm_ahn.cache.specs import AHNWindowSpec, window_spec
from vllm_ahn.kernels.pages import WindowPageLayout, WindowPages
from vllm_ahn.kernels.settled import Settling

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
    max_drafts: int = 0,
) -> Batch:
    """``requests`` are (tokens before, new tokens); rows that pad the batch follow."""
    layout = WindowPageLayout(KV_HEADS, HEAD_SIZE, 2 * HEADS // KV_HEADS, block_size, torch.float32)
    rule = Settling(window, sinks, turns=2 if max_drafts else 1)
    spec = window_spec(layout, rule, max_in_flight_tokens=1024, max_drafts=max_drafts)
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


def attention(spec: AHNWindowSpec, kernel: str) -> PagedAttention:
    device = torch.device("cpu")
    if kernel == "triton":
        return TritonAttention(spec, num_heads=HEADS, device=device)
    version = int(kernel[-1])
    flash_emulation.install(version)
    return FlashAttention(spec, num_heads=HEADS, version=version, device=device, graph_spans=6, graph_splits=4)


def planner(batch: Batch, kernel: str = "triton") -> GPUPlanner:
    return GPUPlanner(
        batch.spec, attention(batch.spec, kernel), max_requests=16, max_tokens=256, device=torch.device("cpu")
    )


def attend(batch: Batch, plan: GPUPlan) -> torch.Tensor:
    output = torch.full_like(batch.query, float("nan"))
    for spans in plan.windowed:
        plan.attention.attend(batch.pages, batch.query, output, spans, SCALE)
    return output[: len(batch.expected)]


def requests_at(window: int, sinks: int, decode: bool) -> list[tuple[int, int]]:
    """Requests within ``W + S``, about to leave it and past it, in any order."""
    capacity = window + sinks
    requests = [(capacity, 1), (200, 1)]
    if decode:
        requests += [(capacity - 1, 1), (3, 1)]
    else:
        requests += [(0, 7), (capacity - 5, 50), (160, 33), (0, capacity + 3)]
    random.shuffle(requests)
    return requests


MASKED = [(24, 8, 16), (33, 17, 32), (1, 48, 16), (10, 0, 16)]
SLIDING = [(40, 0, 16), (33, 16, 16), (32, 64, 32), (64, 16, 16), (67, 64, 64)]
CHUNKS = [(33, 17, 32), (10, 0, 16), (33, 16, 16), (67, 64, 64)]
"""Settings in which Triton attends to chunks too, which takes the interpreter longest; ``test_tables`` has the tables
of chunks in all settings."""


@pytest.mark.parametrize(
    "setting, decode",
    [(setting, decode) for setting in MASKED for decode in (True, False) if decode or setting in CHUNKS],
    ids=str,
)
def test_attends_to_sinks_and_window_by_a_mask(
    setting: tuple[int, int, int], decode: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    window, sinks, block_size = setting
    monkeypatch.setattr(gpu_plan, "MASKED_QUERIES", 20)
    batch = make_batch(window, sinks, block_size, requests_at(window, sinks, decode))
    plan = planner(batch).plan(batch.common)
    assert not batch.spec.rearrangeable
    (windowed,) = plan.windowed
    assert windowed.sinks is not None
    longest = int(windowed.lens.max())
    assert longest <= window + sinks + (1 if decode else 20) + 3 * block_size
    torch.testing.assert_close(attend(batch, plan), batch.expected, rtol=0, atol=TOLERANCE)


SLIDING_CASES = [
    (setting, kernel, decode)
    for setting in SLIDING
    for kernel in ("triton", "flash2", "flash3")
    for decode in (True, False)
    if decode or kernel != "triton" or setting in CHUNKS
]


@pytest.mark.parametrize("setting, kernel, decode", SLIDING_CASES, ids=str)
def test_attends_to_sinks_and_window_by_a_sliding_window(
    setting: tuple[int, int, int], kernel: str, decode: bool
) -> None:
    window, sinks, block_size = setting
    batch = make_batch(window, sinks, block_size, requests_at(window, sinks, decode))
    plan = planner(batch, kernel).plan(batch.common)
    assert batch.spec.rearrangeable
    (windowed,) = plan.windowed
    assert windowed.sinks is None
    # A chunk of 50 is longer than some of these windows: then it is cut into spans.
    longest = int(windowed.lens.max())
    assert longest <= window + sinks + (1 if decode else window) + block_size
    torch.testing.assert_close(attend(batch, plan), batch.expected, rtol=0, atol=TOLERANCE)


DECODES, WITH_A_CHUNK = [(150, 1), (70, 1)], [(150, 1), (130, 60)]


@pytest.mark.parametrize(
    "window, sinks, block_size, requests",
    [
        (33, 17, 32, DECODES),
        (40, 0, 16, DECODES),
        (33, 32, 32, DECODES),
        (67, 16, 16, DECODES),
        (33, 17, 32, WITH_A_CHUNK),
        (67, 16, 16, WITH_A_CHUNK),
    ],
)
def test_scores_far_below_zero(window: int, sinks: int, block_size: int, requests: list[tuple[int, int]]) -> None:
    """Keys that are masked must not count as keys with a score of 0, beside which all others vanish."""
    batch = make_batch(window, sinks, block_size, requests, mean_score=-300.0)
    actual = attend(batch, planner(batch).plan(batch.common))
    torch.testing.assert_close(actual, batch.expected, rtol=0, atol=1e-4)


def test_decodes_are_split_wherever_a_sliding_window_serves() -> None:
    for block_size in (16, 32, 64):
        spec = make_batch(64, 64, block_size, [(3, 1)]).spec
        assert spec.rearrangeable
        assert TritonAttention(spec, num_heads=HEADS, device=torch.device("cpu")).max_split_spans > 0


@pytest.mark.parametrize("kernel", ["triton", "flash3"])
def test_inside_the_capacity_attention_is_plain(kernel: str) -> None:
    batch = make_batch(40, 16, 16, [(0, 48), (20, 3), (47, 1)])
    plan = planner(batch, kernel).plan(batch.common)
    assert plan.windowed == [plan.causal] and not plan.steps and not plan.passes
    torch.testing.assert_close(attend(batch, plan), batch.expected, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("sinks, kernel", [(8, "triton"), (16, "triton"), (16, "flash2"), (16, "flash3")])
def test_a_replayed_graph_finds_another_batch_in_its_buffers(sinks: int, kernel: str) -> None:
    """What is planned at capture is used, with vLLM's and the planner's buffers filled for another batch since."""
    captured = make_batch(24, sinks, 16, [(0, 1)] * 5)
    one_planner = planner(captured, kernel)
    plan = one_planner.plan(captured.common, for_capture=True)
    (steps,) = plan.steps
    # A step with a chunk in between leaves the buffers alone or is forgotten.
    chunk = make_batch(24, sinks, 16, [(200, 1), (100, 30)])
    one_planner.plan(chunk.common)
    batch = make_batch(24, sinks, 16, [(200, 1), (10, 1), (24 + sinks, 1)], num_padding=2)
    for name in ("query_start_loc", "seq_lens"):
        getattr(captured.common, name).copy_(getattr(batch.common, name))
        setattr(batch.common, name, getattr(captured.common, name))
    one_planner.plan(batch.common)
    torch.testing.assert_close(attend(batch, plan), batch.expected, rtol=0, atol=TOLERANCE)
    assert steps.tokens.flatten().tolist() == [0, -1, 2, -1, -1]
    assert steps.counts.tolist() == [1, 0, 1, 0, 0]


@pytest.mark.parametrize("sinks, kernel", [(8, "triton"), (16, "triton"), (16, "flash2"), (16, "flash3")])
def test_a_replayed_graph_of_drafts(sinks: int, kernel: str) -> None:
    """As above with three drafts a request, where the host knows lengths only as bounds."""
    captured = make_batch(24, sinks, 16, [(0, 4)] * 5, max_drafts=3)
    one_planner = planner(captured, kernel)
    plan = one_planner.plan(captured.common, for_capture=True)
    batch = make_batch(24, sinks, 16, [(200, 4), (10, 4), (24 + sinks - 2, 4)], num_padding=2, max_drafts=3)
    batch.common.seq_lens_cpu_upper_bound[:3] += 3
    for name in ("query_start_loc", "seq_lens"):
        getattr(captured.common, name).copy_(getattr(batch.common, name))
        setattr(batch.common, name, getattr(captured.common, name))
    one_planner.plan(batch.common)
    torch.testing.assert_close(attend(batch, plan), batch.expected, rtol=0, atol=TOLERANCE)
    (steps,) = plan.steps
    nothing = [-1] * 4
    assert steps.tokens.tolist() == [[0, 1, 2, 3], nothing, [10, 11, -1, -1], nothing, nothing]
    assert steps.positions[2, :2].tolist() == [24 + sinks, 24 + sinks + 1]


@pytest.mark.parametrize("sinks, kernel", [(8, "triton"), (16, "flash3")])
def test_drafts_beside_chunks_are_decided_on_the_device(sinks: int, kernel: str) -> None:
    """Bounds that are too high do not show, neither in what is attended to nor in what steps."""
    requests = [(200, 4), (24 + sinks - 1, 2), (130, 40), (9, 3), (0, 30)]
    batch = make_batch(24, sinks, 16, requests, max_drafts=3)
    short = torch.tensor([new <= 4 for _, new in requests])
    batch.common.seq_lens_cpu_upper_bound[short] += 3
    plan = planner(batch, kernel).plan(batch.common)
    torch.testing.assert_close(attend(batch, plan), batch.expected, rtol=0, atol=TOLERANCE)
    found, tails = plan.steps
    assert found.counts.tolist() == [4, 1, 0, 0, 0]
    assert tails.requests is not None and tails.requests.tolist() == [2]
    assert tails.counts.tolist() == [170 % 16] and tails.first_tokens.tolist() == [46 - 170 % 16]
    assert [stretches.requests.tolist() for stretches in plan.passes] == [[2]]


def test_what_flash_attention_is_asked() -> None:
    """Version 3 is given its schedule once a step; only what graphs may replay is bounded in its splits."""
    batch = make_batch(64, 16, 16, [(200, 1)] * 6)
    plan = planner(batch, "flash3").plan(batch.common)
    (windowed,) = plan.windowed
    schedule = windowed.schedule
    flash = plan.attention
    assert isinstance(flash, FlashAttention) and flash.kept is not None and schedule is not None
    assert schedule.data_ptr() == flash.kept.data_ptr() and flash._max_splits(windowed) == 4
    flash_emulation.calls.clear()
    attend(batch, plan)
    asked = {"version": 3, "batch": 6, "max_seqlen_q": 1, "window": 79, "scheduled": True}
    assert flash_emulation.calls == [asked]

    for requests in ([(200, 1)] * 7, [(200, 1), (100, 30)]):  # more than graphs are for; not decodes alone
        batch = make_batch(64, 16, 16, requests)
        (windowed,) = planner(batch, "flash3").plan(batch.common).windowed
        assert windowed.schedule is not None
        assert windowed.schedule.data_ptr() != flash.kept.data_ptr() and flash._max_splits(windowed) == 0
    (windowed,) = planner(batch, "flash2").plan(batch.common).windowed
    assert windowed.schedule is None


@pytest.mark.parametrize("kernel", ["triton", "flash2", "flash3"])
def test_tensors_that_are_padded_for_a_graph(kernel: str) -> None:
    """Piecewise graphs pad the layers' tensors, and not the plan."""
    batch = make_batch(64, 16, 16, [(200, 1), (100, 30), (0, 9)])
    padded = torch.nn.functional.pad(batch.query, (0, 0, 0, 0, 0, 24), value=float("nan"))
    key = torch.full((len(padded), KV_HEADS, HEAD_SIZE), float("nan"))
    inputs = LayerInputs(padded, key, key, padded, None, None, torch.full_like(padded, float("nan")))
    layer: Any = SimpleNamespace(pages=batch.pages, memory=None, full_attention=False, scale=SCALE)
    GPUCore().run(layer, inputs, planner(batch, kernel).plan(batch.common), None)
    torch.testing.assert_close(inputs.output[: len(batch.expected)], batch.expected, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("queries_per_span, block_size", [(1, 1), (7, 1), (64, 1), (16, 16), (48, 16)])
def test_spans_cover_all_queries_once(queries_per_span: int, block_size: int) -> None:
    generator = random.Random(queries_per_span)
    lens = [generator.choice((0, 1, 1, 6, 7, 8, 70)) for _ in range(40)]
    seq_lens = torch.tensor([length + generator.randrange(50) for length in lens]).numpy()
    starts = torch.tensor([0, *lens]).cumsum(0).numpy()
    owners, span_starts, span_lens = cut_into_spans(
        StepRequests(starts, seq_lens, Settling(8, 2)), queries_per_span, block_size
    )
    queries = []
    for span, request in enumerate(owners):
        num_queries = span_starts[span + 1] - span_starts[span]
        assert num_queries > 0
        first = span_lens[span] - num_queries
        assert span_lens[span] - first // block_size * block_size <= queries_per_span
        queries += [(request, first + i) for i in range(num_queries)]
    positions = [
        (request, seq_lens[request] - length + i) for request, length in enumerate(lens) for i in range(length)
    ]
    assert queries == positions
