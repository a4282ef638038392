"""Window attention and whole AHN attention layers in a long context, against full attention by the same kernel."""

from __future__ import annotations

import torch

from kernel_cases import oracles
from kernel_cases.attention import attend, full_spans, windowed_spans
from kernel_cases.layer import Layer
from kernel_cases.oracles import compare
from kernel_cases.setting import Model, Row, Setting
from kernel_cases.timing import Call, Timer
from report import Aim
from vllm_ahn.memory.spec import MemorySpec

MEAN, MOST = 1e-2, 3e-2
"""Errors allowed in half precision."""

SHARPNESS = 4.0
"""Standard deviation of scores: some keys have a weight that would be missed."""

SPARE = 0.85
"""Share of the device's free memory that caches may take."""

SAMPLED = 16
"""Queries of a chunk that are compared with the oracle."""


def _at_32(sizes: dict[str, int]) -> bool:
    return sizes["new"] == 1 and sizes["batch"] == 32


AIMS = [
    ("AHN layer at batch 32, times as fast as full attention", Aim(">=", 3), "full layer/AHN layer", _at_32),
    ("AHN layer at batch 32, times what it takes without memory", Aim("<=", 1.1), "AHN layer/no memory", _at_32),
]


class Requests(Layer):
    """Requests of the whole context, the last ``new`` tokens of which are this step's.

    ``full``: attention to all keys instead of sinks and window. With more than one new token there is one request.
    """

    def __init__(
        self,
        setting: Setting,
        model: Model,
        memory: MemorySpec | None,
        full: bool,
        requests: int,
        new: int,
        *,
        vast: bool = False,
    ) -> None:
        # One token less than blocks would hold: what follows it is NaN.
        self.full, self.tokens, self.length = full, new, setting.context - 1
        blocks = held_blocks(setting, full, new)
        super().__init__(setting, model, memory, [self.length] * requests, [new] * requests, blocks, vast=vast)
        for plane in self.pool.planes:
            plane[self.pool.window_table[:, blocks[-1]].long(), :, self.length % setting.block_size :] = torch.nan
        self.query.mul_(SHARPNESS)
        self.output.fill_(torch.nan)

    @property
    def kind(self) -> str:
        """What the layer is, in words."""
        return "AHN" if self.memory else "full" if self.full else "no memory"


class Batch:
    """The calls that are timed, of some of the requests."""

    def __init__(self, layer: Requests, first: int, requests: int) -> None:
        self.layer, self.step = layer, layer.step(first, requests)
        self.compaction: Call = lambda: None
        if layer.full:
            spans = full_spans(self.step, layer.tokens, layer.length)
        else:
            spans, self.compaction = windowed_spans(self.step, layer.tokens)
        self.attend = attend(self.step, spans)
        if layer.memory:
            self.plan()

    def plan(self) -> None:
        """Do what a model does on the device once a step, not in every layer."""
        self.compaction()
        if self.layer.memory and self.layer.tokens == 1:
            self.step.plan_decode()

    def remember(self) -> None:
        """Absorb, read and add."""
        step = self.step
        if self.layer.tokens == 1:
            step.read_out(step.decode(), step.rows)
        else:
            step.read_out(step.prefill(), step.prefill_plan.reads)

    def __call__(self) -> None:
        """Run the whole layer, between projections of its input and ``o_proj``."""
        self.step.write()
        self.attend()
        if self.layer.memory:
            self.remember()


def held_blocks(setting: Setting, full: bool, new: int) -> list[int]:
    """Return the blocks that a request holds before a step of ``new`` tokens: those of sinks and window, or all."""
    size = setting.block_size
    last = -(-setting.context // size)
    if full:
        return list(range(last))
    first = max((setting.context - 1 - new - setting.window) // size, 0)
    return [*range(min(-(-setting.sinks // size), first)), *range(first, last)]


def verify(setting: Setting, model: Model, memory: MemorySpec) -> None:
    """Verify decodes of three requests and chunks, of layers with memory, without, and with full attention."""
    for new in (1, *setting.chunks):
        requests = 3 if new == 1 else 1
        for with_memory, full in ((memory, False), (None, False), (None, True)):
            _verify(Requests(setting, model, with_memory, full, requests, new))
    if setting.on_gpu:
        _verify(Requests(setting, model, memory, False, 3, 1, vast=True))


def _verify(layer: Requests) -> None:
    setting, new, requests = layer.setting, layer.tokens, len(layer.lens)
    batch = Batch(layer, 0, requests)
    step = batch.step
    # What is evicted was written long ago, so the oracle may come first, as it has to: states change in place.
    reads = oracles.memory_reads(step, list(range(requests)))[0] if layer.memory else None
    batch()
    for request in range(requests):
        chosen = torch.randint(new, (min(new, SAMPLED),), device=setting.device)
        if new > 1:
            chosen[0], chosen[1] = 0, new - 1
        rows = request * new + chosen
        window = None if layer.full else setting.window
        wanted = oracles.attention(layer.pool, request, step.query[rows], step.positions[rows], window, setting.sinks)
        if reads is not None:
            wanted += oracles.read_out(step, rows, reads[rows])
        where = f"{layer.model.name} layer, {layer.kind}, {new} new tokens, request {request}"
        compare(where, step.output[rows], wanted, mean=MEAN, most=MOST)


def key_bytes(model: Model, tokens: int) -> int:
    """Return bytes of keys and values of so many tokens."""
    return 4 * model.kv_heads * model.head_size * tokens


def measure(setting: Setting, model: Model, memory: MemorySpec) -> list[Row]:
    """Time decodes and chunks."""
    timer = setting.measures
    rows = _decodes(setting, timer, model, memory)
    rows += [_chunk(setting, timer, model, memory, new) for new in setting.chunks]
    for row in rows:
        row.ratios = {
            "full/window": row.faster("full", "window"),
            "full layer/AHN layer": row.faster("full layer", "AHN layer"),
            "AHN layer/no memory": row.faster("AHN layer", "no memory layer"),
            **row.ratios,
        }
    return rows


def _decodes(setting: Setting, timer: Timer, model: Model, memory: MemorySpec) -> list[Row]:
    free = SPARE * timer.free_bytes()
    batches = [batch for batch in setting.attention_batches if batch * key_bytes(model, setting.context) < free]
    left_out = [batch for batch in setting.attention_batches if batch not in batches]
    if left_out:
        print(f"window attention, {model.name}: batches {left_out} do not fit the device", flush=True)
    rows = {batch: Row("window", model.name, memory.name, {"batch": batch, "new": 1}) for batch in batches}
    for with_memory, full in ((memory, False), (None, False), (None, True)) if batches else ():
        # One after the other: together they would take twice the memory.
        _time_decodes(timer, Requests(setting, model, with_memory, full, max(batches), 1), rows)
    for batch, row in rows.items():
        window = batch * key_bytes(model, setting.capacity)
        row.ratios["window, % of copy"] = timer.percent_of_copy(window, row.microseconds("window"))
    return list(rows.values())


def _time_decodes(timer: Timer, layer: Requests, rows: dict[int, Row]) -> None:
    setting, model = layer.setting, layer.model
    seen = setting.context if layer.full else setting.capacity
    for size, row in rows.items():
        batches = [Batch(layer, first, size) for first in range(0, max(rows), size)]
        some = batches[: timer.sets(size * key_bytes(model, seen))]
        row.times[f"{layer.kind} layer"] = timer.graph(some)
        if layer.memory:
            row.times["memory"] = timer.graph([batch.remember for batch in batches])
            row.times["plan a step"] = timer.graph([batch.plan for batch in batches])
        else:
            row.times["full" if layer.full else "window"] = timer.graph([batch.attend for batch in some])


def _chunk(setting: Setting, timer: Timer, model: Model, memory: MemorySpec, new: int) -> Row:
    row = Row("window", model.name, memory.name, {"batch": 1, "new": new})
    for with_memory, full in ((memory, False), (None, False), (None, True)):
        batch = Batch(Requests(setting, model, with_memory, full, 1, new), 0, 1)
        row.times[f"{batch.layer.kind} layer"] = timer.stream(batch)
        if with_memory:
            row.times["memory"] = timer.stream(batch.remember)
            row.times["plan a step"] = timer.stream(batch.plan)
        else:
            row.times["full" if full else "window"] = timer.stream(batch.attend)
    return row
