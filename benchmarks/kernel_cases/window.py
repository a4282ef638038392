"""Window attention and whole AHN attention layers in a long context, against full attention by the same kernel."""

from collections.abc import Sequence

import torch

from kernel_cases import oracles
from kernel_cases.attention import Attend, attend, full_rows, windowed_rows
from kernel_cases.checks import compare
from kernel_cases.decode import ReadOut
from kernel_cases.pool import Pool
from kernel_cases.results import Aim, Row
from kernel_cases.setting import Model, Setting
from kernel_cases.timing import Call, Timer
from support.paged_case import random_gates
from vllm_ahn.kernels.cache_write import write_window_pages
from vllm_ahn.kernels.decode import decode_memory, decode_reads
from vllm_ahn.kernels.prefill import prefill_memory
from vllm_ahn.kernels.prefill_plan import Stretch, plan_prefill
from vllm_ahn.memory.spec import MEMORIES

MEAN, MOST = 1e-2, 3e-2
"""Errors allowed in half precision."""

SHARPNESS = 4.0
"""Standard deviation of scores: some keys have a weight that would be missed."""

SPARE = 0.85
"""Share of the device's free memory that caches may take."""

SAMPLED = 16
"""Queries of a chunk that are compared with the oracle."""


class Layer:
    """One layer's pages for requests of the whole context, the last ``new`` tokens of which are this step's.

    Args:
        setting: sizes.
        model: whose layer.
        memory: None: without.
        full: attention to all keys instead of sinks and window.
        requests: how many.
        new: tokens of each; with more than one there is one request.
        vast: put pages far apart, see :class:`Pool`.
    """

    def __init__(
        self,
        setting: Setting,
        model: Model,
        memory: str | None,
        full: bool,
        requests: int,
        new: int,
        *,
        vast: bool = False,
    ) -> None:
        self.setting, self.model, self.memory, self.full, self.new = setting, model, memory, full, new
        # One token less than blocks would hold: what follows it is NaN.
        self.length = setting.context - 1
        size = setting.block_size
        blocks: Sequence[int] = held_blocks(setting, full, new)
        num_tokens = requests * new
        heads, kv_heads, head_size = model.heads, model.kv_heads, model.head_size
        with torch.device(setting.device):
            self.pool = Pool(setting, model, memory, requests, blocks, vast=vast)
            for plane in self.pool.planes:
                plane[self.pool.window_table[:, blocks[-1]].long(), :, self.length % size :] = torch.nan
            qkv = torch.randn(num_tokens, heads + 2 * kv_heads, head_size).to(setting.dtype)
            self.query, self.key, self.value = qkv.split((heads, kv_heads, kv_heads), dim=1)
            self.query.mul_(SHARPNESS)
            self.z = torch.randn(num_tokens, heads)
            self.A_log = torch.randn(heads)
            self.gates = random_gates(setting.shape(model, memory), num_tokens) if memory else None
            self.output = torch.full((num_tokens, heads, head_size), torch.nan).to(setting.dtype)
            self.positions = torch.arange(self.length - new, self.length)
        self.weights = ReadOut(setting, model, memory, copies=min(requests, 16)) if memory else None

    @property
    def kind(self) -> str:
        return "AHN" if self.memory else "full" if self.full else "no memory"

    def step(self, first: int, requests: int) -> "Step":
        return Step(self, first, requests)


class Step:
    """What the layer does for some of its requests: the calls that are timed."""

    def __init__(self, layer: Layer, first: int, requests: int) -> None:
        setting, pool, new = layer.setting, layer.pool, layer.new
        self.layer = layer
        self.number = first // requests
        self.tokens = slice(requests * new)
        self.requests = torch.arange(first, first + requests, device=setting.device)
        part = slice(first, first + requests)
        self.window_table, self.state_table = pool.window_table[part], pool.state_table[part]
        with torch.device(setting.device):
            starts = torch.arange(0, requests * new + 1, new, dtype=torch.int32)
            self.lens = torch.full((requests,), layer.length, dtype=torch.int32)
            self.slots = pool.slots(self.requests.repeat_interleave(new), layer.positions.repeat(requests))
            self.rows = torch.full((requests,), -1, dtype=torch.int32)
            self.o = torch.empty(requests, layer.model.heads, layer.model.head_size)
        self.starts = starts
        if layer.full:
            rows = full_rows(self.window_table, self.lens, starts, new, layer.length)
            self.compaction: Call = lambda: None
        else:
            rows, self.compaction = windowed_rows(setting, self.window_table, self.lens, starts, new)
        self._attend: Attend = attend(setting, layer.model, pool, rows)
        if layer.memory and new == 1:
            self.plan_decode()
        if layer.memory and new > 1:
            self.prefill_plan = plan_prefill(
                [Stretch(0, 0, layer.length - new, new)],
                self.window_table,
                window=setting.window,
                sinks=setting.sinks,
                block_size=setting.block_size,
            )

    def plan_decode(self) -> None:
        decode_reads(self.starts, self.lens, self.layer.setting.capacity, self.rows)

    def plan(self) -> None:
        """What a model does on the device once a step, not in every layer."""
        self.compaction()
        if self.layer.memory and self.layer.new == 1:
            self.plan_decode()

    def write(self) -> None:
        layer, t = self.layer, self.tokens
        gates = None if layer.gates is None else layer.gates[t]
        write_window_pages(layer.key[t], layer.value[t], gates, self.slots, layer.pool.window)

    def attend(self) -> None:
        self._attend(self.layer.query[self.tokens], self.layer.output[self.tokens])

    def remember(self) -> None:
        """Absorb, read and add."""
        layer, setting = self.layer, self.layer.setting
        assert layer.memory is not None and layer.weights is not None
        settings = {
            "memory": MEMORIES[layer.memory],
            "scale": setting.shape(layer.model, layer.memory).scale,
            "A_log": layer.A_log,
        }
        query, pages, state = layer.query[self.tokens], layer.pool.window, layer.pool.state
        if layer.new == 1:
            where = (self.window_table, state, self.state_table, self.rows, self.lens, self.o)
            decode_memory(query, pages, *where, window=setting.window, sinks=setting.sinks, **settings)
            o, rows = self.o, self.rows
        else:
            o = prefill_memory(query, pages, state, self.state_table, self.prefill_plan, **settings)
            rows = self.prefill_plan.reads
        layer.weights(o, layer.z[self.tokens], rows, layer.output[self.tokens], copy=self.number)

    def __call__(self) -> None:
        """The whole layer, between projections of its input and ``o_proj``."""
        self.write()
        self.attend()
        if self.layer.memory:
            self.remember()


def held_blocks(setting: Setting, full: bool, new: int) -> list[int]:
    """Blocks that a request holds before a step of ``new`` tokens: those of sinks and window, or all."""
    size = setting.block_size
    last = -(-setting.context // size)
    if full:
        return list(range(last))
    first = max((setting.context - 1 - new - setting.window) // size, 0)
    sinks = -(-setting.sinks // size)
    return [*range(min(sinks, first)), *range(first, last)]


def verify(setting: Setting, model: Model, memory: str) -> None:
    """Decodes of three requests and chunks, of layers with memory, without, and with full attention."""
    for new in (1, *setting.chunks):
        requests = 3 if new == 1 else 1
        for with_memory, full in ((memory, False), (None, False), (None, True)):
            _verify(Layer(setting, model, with_memory, full, requests, new), requests)
    if setting.on_gpu:
        _verify(Layer(setting, model, memory, False, 3, 1, vast=True), 3)


def _verify(layer: Layer, requests: int) -> None:
    setting, new = layer.setting, layer.new
    step = layer.step(0, requests)
    reads: list[torch.Tensor] = []
    if layer.memory:
        # What is evicted was written long ago, so the oracle may come first, as it has to: states change in place.
        shape = setting.shape(layer.model, layer.memory)
        evicted = layer.positions - setting.window
        for request in step.requests:
            state = layer.pool.states(request[None])[0]
            q = layer.query[int(request) * new : (int(request) + 1) * new]
            tokens = layer.pool.tokens(request.expand(new), evicted)
            reads.append(oracles.stretch(shape, q, tokens, layer.A_log, state)[0])
    step()
    for request in range(requests):
        chosen = torch.randint(new, (min(new, SAMPLED),), device=setting.device)
        if new > 1:
            chosen[0], chosen[1] = 0, new - 1
        rows = request * new + chosen
        window = None if layer.full else setting.window
        wanted = oracles.attention(
            layer.pool, request, layer.query[rows], layer.positions[chosen], window, setting.sinks
        )
        if layer.memory:
            assert layer.weights is not None
            o = reads[request][chosen]
            wanted += oracles.read_out(layer.memory, o, layer.z[rows], layer.weights.norm, layer.weights.o_proj[0])
        where = f"{layer.model.name} layer, {layer.kind}, {new} new tokens, request {request}"
        compare(where, layer.output[rows], wanted, mean=MEAN, most=MOST)


def key_bytes(model: Model, tokens: int) -> int:
    """Keys and values of so many tokens."""
    return 4 * model.kv_heads * model.head_size * tokens


def measure(setting: Setting, model: Model, memory: str) -> list[Row]:
    timer = setting.timer
    assert timer is not None
    rows = _decodes(setting, timer, model, memory)
    for new in setting.chunks:
        rows.append(_chunk(setting, timer, model, memory, new))
    return rows


def _decodes(setting: Setting, timer: Timer, model: Model, memory: str) -> list[Row]:
    free = SPARE * timer.free_bytes()
    batches = [batch for batch in setting.attention_batches if batch * key_bytes(model, setting.context) < free]
    left_out = [batch for batch in setting.attention_batches if batch not in batches]
    if left_out:
        print(f"window attention, {model.name}: batches {left_out} do not fit the device", flush=True)
    if not batches:
        return []
    rows = {batch: Row("window", model.name, memory, {"batch": batch, "new": 1}) for batch in batches}
    # One after the other: together they would take twice the memory.
    _time_decodes(timer, Layer(setting, model, memory, False, max(batches), 1), rows)
    _time_decodes(timer, Layer(setting, model, None, False, max(batches), 1), rows)
    _time_decodes(timer, Layer(setting, model, None, True, max(batches), 1), rows)
    for batch, row in rows.items():
        _ratios(row)
        window = batch * key_bytes(model, setting.capacity)
        row.ratios["window, % of copy"] = timer.percent_of_copy(window, row.times["window"].median)
    return list(rows.values())


def _time_decodes(timer: Timer, layer: Layer, rows: dict[int, Row]) -> None:
    setting, model = layer.setting, layer.model
    seen = setting.context if layer.full else setting.capacity
    for batch, row in rows.items():
        steps = [layer.step(first, batch) for first in range(0, max(rows), batch)]
        some = steps[: timer.sets(batch * key_bytes(model, seen))]
        row.times[f"{layer.kind} layer"] = timer.graph(some)
        if layer.memory:
            row.times["memory"] = timer.graph([step.remember for step in steps])
            row.times["plan a step"] = timer.graph([step.plan for step in steps])
        else:
            row.times["full" if layer.full else "window"] = timer.graph([step.attend for step in some])


def _chunk(setting: Setting, timer: Timer, model: Model, memory: str, new: int) -> Row:
    row = Row("window", model.name, memory, {"batch": 1, "new": new})
    for with_memory, full in ((memory, False), (None, False), (None, True)):
        step = Layer(setting, model, with_memory, full, 1, new).step(0, 1)
        row.times[f"{step.layer.kind} layer"] = timer.stream(step)
        if with_memory:
            row.times["memory"] = timer.stream(step.remember)
            row.times["plan a step"] = timer.stream(step.plan)
        else:
            row.times["full" if full else "window"] = timer.stream(step.attend)
    _ratios(row)
    return row


def _ratios(row: Row) -> None:
    times = {name: measured.median for name, measured in row.times.items()}
    row.ratios = {
        "full/window": times["full"] / times["window"],
        "full layer/AHN layer": times["full layer"] / times["AHN layer"],
        "AHN layer/no memory": times["AHN layer"] / times["no memory layer"],
    }


def aims(rows: list[Row]) -> list[Aim]:
    decodes = [row for row in rows if row.sizes["new"] == 1 and row.sizes["batch"] == 32]
    return [
        Aim.least("AHN layer at batch 32, times as fast as with full attention", 3, decodes, "full layer/AHN layer"),
        Aim.most("AHN layer at batch 32, times what it takes without memory", 1.1, decodes, "AHN layer/no memory"),
    ]
