"""Times of kernels on a GPU, and the bandwidth of a plain copy to hold them against.

What is timed is the device's work alone. Short kernels are captured in one CUDA graph, many calls after one another as
a model's layers are, each on data of its own, so that none finds its inputs in the L2 cache. Longer ones, which vLLM
launches one by one, run behind a pause of the device in which the host gets ahead; how long the host takes is reported
beside it. Everything is called before it is timed: compiling and autotuning fall into that call.
"""

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

Call = Callable[[], Any]

BUDGET_MS = 40.0
"""What a measurement takes, about."""

GRAPH_MS = 2.0
"""What a graph takes, about, if its calls are short."""

COPIED = 1 << 30
"""Bytes of the tensor whose copy is timed."""


@dataclass(frozen=True)
class Times:
    """Microseconds a call."""

    median: float
    low: float
    """20th percentile."""
    high: float
    """80th percentile."""
    repetitions: int
    host: float | None = None
    """What the host takes to launch a call; None for a graph."""


class Timer:
    """Measures on the current device."""

    def __init__(self, device: torch.device) -> None:
        properties = torch.cuda.get_device_properties(device)
        self.device = device
        self.name: str = properties.name
        self.multiprocessors: int = properties.multi_processor_count
        self.memory_bytes: int = properties.total_memory
        self.cache_bytes: int = getattr(properties, "L2_cache_size", 0) or 64 << 20
        self._flush = torch.empty(4 * self.cache_bytes, dtype=torch.int8, device=device)
        self._source, self._target = torch.empty((2, COPIED), dtype=torch.int8, device=device).random_().unbind()
        self.copy_bandwidth = 2e-3 * COPIED / self.graph([lambda: self._target.copy_(self._source)]).median
        """GB/s, bytes read plus bytes written, of ``torch.Tensor.copy_`` from a GiB to another."""

    def describe(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "multiprocessors": self.multiprocessors,
            "memory GiB": round(self.memory_bytes / 2**30, 1),
            "L2 MiB": round(self.cache_bytes / 2**20, 1),
            "copy GB/s": round(self.copy_bandwidth, 1),
        }

    def free_bytes(self) -> int:
        """Memory that tensors could still take."""
        taken = torch.cuda.memory_reserved(self.device) - torch.cuda.memory_allocated(self.device)
        return torch.cuda.mem_get_info(self.device)[0] + taken

    def sets(self, num_bytes: int) -> int:
        """How many sets of data of a size it takes for none to be in the L2 cache when its turn comes again."""
        return max(1, min(-(-4 * self.cache_bytes // max(num_bytes, 1)), 256))

    def copy(self, num_bytes: int) -> Times:
        """A plain copy that moves so many bytes, read and written ones together; of a part of them if they are many."""
        part = min(num_bytes // 2 + 15 & ~15, len(self._source))
        starts = range(0, len(self._source) - part + 1, part)[: self.sets(num_bytes)]

        def copy(start: int) -> Call:
            return lambda: self._target[start : start + part].copy_(self._source[start : start + part])

        times = self.graph([copy(start) for start in starts])
        scale = max(num_bytes / (2 * part), 1)
        return replace(times, median=scale * times.median, low=scale * times.low, high=scale * times.high)

    def percent_of_copy(self, num_bytes: int, microseconds: float) -> float:
        """Bytes moved in a time, as a share of what the copy moves in it."""
        return 100 * num_bytes / (microseconds * 1e3 * self.copy_bandwidth)

    def graph(self, calls: Sequence[Call]) -> Times:
        """Time of a call, on average over ``calls``, which a CUDA graph runs one after the other."""
        stream = torch.cuda.Stream(self.device)
        stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(stream):
            for call in calls:
                call()
            stream.synchronize()
            start = time.perf_counter()
            for call in calls:
                call()
            stream.synchronize()
            milliseconds = 1e3 * (time.perf_counter() - start)
        # A graph of a few microseconds would be measured with what it takes to start one.
        rounds = max(1, min(round(GRAPH_MS / milliseconds), 64 // len(calls)))
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            for _ in range(rounds):
                for call in calls:
                    call()
        graph.replay()
        torch.cuda.synchronize(self.device)
        start = time.perf_counter()
        graph.replay()
        torch.cuda.synchronize(self.device)
        milliseconds = 1e3 * (time.perf_counter() - start)
        repetitions = max(5, min(int(BUDGET_MS / milliseconds), 50))
        events = [tuple(torch.cuda.Event(enable_timing=True) for _ in range(2)) for _ in range(repetitions)]
        for begin, end in events:
            begin.record()
            graph.replay()
            end.record()
        torch.cuda.synchronize(self.device)
        return _times([1e3 * begin.elapsed_time(end) / (rounds * len(calls)) for begin, end in events])

    def stream(self, call: Call) -> Times:
        """Time of a call whose kernels are launched one by one, its inputs flushed from the L2 cache before it."""
        for _ in range(2):
            call()
        torch.cuda.synchronize(self.device)
        start = time.perf_counter()
        call()
        launched = time.perf_counter() - start
        torch.cuda.synchronize(self.device)
        milliseconds = 1e3 * (time.perf_counter() - start)
        # Cycles at 2 GHz or somewhat less: twice what the host needs.
        pause = int(min(max(launched, 2e-4), 0.05) * 4e9)
        device, host = [], []
        for _ in range(max(3, min(int(BUDGET_MS / milliseconds), 30))):
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            self._flush.zero_()
            torch.cuda._sleep(pause)
            begin.record()
            start = time.perf_counter()
            call()
            host.append(1e6 * (time.perf_counter() - start))
            end.record()
            torch.cuda.synchronize(self.device)
            device.append(1e3 * begin.elapsed_time(end))
        return _times(device, statistics.median(host))


def _times(microseconds: Sequence[float], host: float | None = None) -> Times:
    ordered = sorted(microseconds)
    last = len(ordered) - 1
    return Times(statistics.median(ordered), ordered[round(0.2 * last)], ordered[round(0.8 * last)], len(ordered), host)
