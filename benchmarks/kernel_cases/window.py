"""Window attention and whole AHN attention layers in a long context, against full attention by the same kernel."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch

from kernel_cases import oracles
from kernel_cases.attention import full_spans, kernel, windowed_spans
from kernel_cases.layer import Step
from kernel_cases.oracles import compare
from kernel_cases.setting import Model, Row, Setting
from report import Aim
from vllm_ahn.memory.spec import MemorySpec

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

KINDS = ("AHN", "no memory", "full")


class LayerStep(Step):
    """A layer of one of `KINDS`, and requests of the whole context, the last ``tokens`` of which are new.

    With more than one new token there is one request.
    """

    def __init__(
        self, kind: str, setting: Setting, model: Model, memory: MemorySpec, requests: int, tokens: int, *, vast=False
    ) -> None:
        # One token less than blocks would hold: what follows it is NaN.
        self.kind, self.tokens, length, size = kind, tokens, setting.context - 1, setting.block_size
        # What a request holds before the step: the blocks of sinks and window, or all.
        last = -(-setting.context // size)
        first = 0 if kind == "full" else max((length - tokens - setting.window) // size, 0)
        blocks = [*range(min(-(-setting.sinks // size), first)), *range(first, last)]
        batch = ([length] * requests, [tokens] * requests, blocks)
        super().__init__(setting, model, memory if kind == "AHN" else None, *batch, vast=vast)
        for plane in self.pool.planes:
            plane[self.pool.window_table[:, blocks[-1]].long(), :, length % size :] = torch.nan
        self.query.mul_(SHARPNESS)
        self.output.fill_(torch.nan)
        self.compaction = None
        if kind == "full":
            spans = full_spans(self, tokens, length)
        else:
            spans, self.compaction = windowed_spans(self, tokens)
        self._attend = kernel(self, spans)
        self.plan()

    def plan(self) -> None:
        """Do what a model does on the device once a step, not in every layer."""
        if self.compaction:
            self.compaction()
        if self.memory and self.tokens == 1:
            self.plan_decode()

    def attend(self) -> None:
        """Attend to the window or to everything."""
        self._attend(self.query, self.output)

    def remember(self) -> None:
        """Absorb, read and add."""
        if self.tokens == 1:
            self.read_out(self.decode(), self.rows)
        else:
            self.read_out(self.prefill(), self.prefill_plan.reads)

    def __call__(self) -> None:
        """Run the whole layer, between projections of its input and ``o_proj``."""
        self.write()
        self.attend()
        if self.memory:
            self.remember()


def verify(setting: Setting, model: Model, memory: MemorySpec) -> None:
    """Verify decodes of three requests and chunks, of layers with memory, without, and with full attention."""
    some = [(kind, new, False) for new in (1, *setting.chunks) for kind in KINDS]
    for kind, new, vast in [*some, ("AHN", 1, True)] if setting.on_gpu else some:
        requests = 3 if new == 1 else 1
        step = LayerStep(kind, setting, model, memory, requests, new, vast=vast)
        # What is evicted was written long ago, so the oracle may come first, as it has to: states change in place.
        reads = None
        if step.memory:
            step.keep_updates()
            reads = oracles.memory_reads(step, list(range(requests)), settled=new == 1)[0]
        step()
        for request in range(requests):
            chosen = torch.randint(new, (min(new, SAMPLED),), device=setting.device)
            if new > 1:
                chosen[0], chosen[1] = 0, new - 1
            rows = request * new + chosen
            wanted = oracles.attention(step, request, rows, None if kind == "full" else setting.window)
            if reads is not None:
                wanted += oracles.read_out(step, rows, reads[rows])
            where = f"{model.name} layer, {kind}, {new} new tokens, request {request}"
            compare(where, step.output[rows], wanted, mean=1e-2, most=3e-2)


def measure(setting: Setting, model: Model, memory: MemorySpec) -> Iterator[Row]:
    """Time decodes and chunks."""
    timer, key_bytes = setting.timer, 4 * model.kv_heads * model.head_size  # of a token, and its value's
    free = SPARE * timer.free_bytes()
    batches = [batch for batch in setting.attention_batches if batch * key_bytes * setting.context < free]
    left_out = [batch for batch in setting.attention_batches if batch not in batches]
    if left_out:
        print(f"window attention, {model.name}: batches {left_out} do not fit the device", flush=True)
    for batch, new in [*((batch, 1) for batch in batches), *((1, new) for new in setting.chunks)]:
        row = Row("window", model.name, memory.name, {"batch": batch, "new": new})
        for kind in KINDS:  # one after the other: together they would take twice the memory
            sets = max(batches) // batch if new == 1 else 1
            if kind != "AHN":
                seen = setting.context if kind == "full" else setting.capacity
                sets = min(sets, timer.sets(batch * key_bytes * seen))
            _time(row, [LayerStep(kind, setting, model, memory, batch, new) for _ in range(sets)])
        window = timer.percent_of_copy(batch * key_bytes * setting.capacity, row.microseconds("window"))
        row.ratios = {
            "full/window": row.faster("full", "window"),
            "full layer/AHN layer": row.faster("full layer", "AHN layer"),
            "AHN layer/no memory": row.faster("AHN layer", "no memory layer"),
            **({"window, % of copy": window} if new == 1 else {}),
        }
        yield row


def _time(row: Row, steps: list[LayerStep]) -> None:
    """Time what there is in layers of one kind: decodes in a graph, a chunk launched kernel by kernel."""
    first, timer = steps[0], steps[0].setting.timer
    parts = {f"{first.kind} layer": LayerStep.__call__}
    if first.memory:
        parts |= {"memory": LayerStep.remember, "plan a step": LayerStep.plan}
    else:
        parts["full" if first.kind == "full" else "window"] = LayerStep.attend
    for name, part in parts.items():
        calls = [partial(part, step) for step in steps]
        row.times[name] = timer.graph(calls) if first.tokens == 1 else timer.stream(*calls)
