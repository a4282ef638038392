"""Times of kernels on a GPU, and the bandwidth of a plain copy to hold them against.

What is timed is the device's work alone. Short kernels are captured in one CUDA graph, many calls after one another as
a model's layers are, each on data of its own, so that none finds its inputs in the L2 cache. Longer ones, which vLLM
launches one by one, run behind a pause of the device in which the host gets ahead; how long the host takes is reported
beside it. Everything is called before it is timed: compiling and autotuning fall into that call.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from triton.testing import do_bench_cudagraph

Call = Callable[[], Any]

GRAPH_MS = 4.0
"""What a graph takes, about; it is measured ten times."""
STREAM_MS = 40.0
"""What all repetitions of a longer call take, about."""
COPIED = 1 << 30
"""Bytes of the tensor whose copy is timed."""
QUANTILES = (0.5, 0.2, 0.8)


@dataclass(frozen=True)
class Times:
    """Microseconds a call."""

    median: float
    low: float
    """20th percentile."""
    high: float
    """80th percentile."""
    host: float | None = None
    """What the host takes to launch a call; None for a graph."""


class Timer:
    """Measures on the current device."""

    def __init__(self, device: torch.device) -> None:
        self.device, self._properties = device, torch.cuda.get_device_properties(device)
        self.multiprocessors: int = self._properties.multi_processor_count
        self.cache_bytes: int = getattr(self._properties, "L2_cache_size", 0) or 64 << 20
        self._flush = torch.empty(4 * self.cache_bytes, dtype=torch.int8, device=device)
        self._source, self._target = torch.empty((2, COPIED), dtype=torch.int8, device=device).random_().unbind()
        self.copy_bandwidth = 2e-3 * COPIED / self.graph([lambda: self._target.copy_(self._source)]).median
        """GB/s, bytes read plus bytes written, of ``torch.Tensor.copy_`` from a GiB to another."""

    def describe(self) -> dict[str, Any]:
        """Return the device in figures."""
        return {
            "name": self._properties.name,
            "multiprocessors": self.multiprocessors,
            "memory GiB": round(self._properties.total_memory / 2**30, 1),
            "L2 MiB": round(self.cache_bytes / 2**20, 1),
            "copy GB/s": round(self.copy_bandwidth, 1),
        }

    def free_bytes(self) -> int:
        """Return the memory that tensors could still take."""
        taken = torch.cuda.memory_reserved(self.device) - torch.cuda.memory_allocated(self.device)
        return torch.cuda.mem_get_info(self.device)[0] + taken

    def sets(self, num_bytes: int) -> int:
        """Return how many sets of data of a size it takes for none to be in the L2 cache when its turn comes again."""
        return max(1, min(-(-4 * self.cache_bytes // max(num_bytes, 1)), 256))

    def copy(self, num_bytes: int) -> Times:
        """Time a plain copy that moves so many bytes, read and written ones together; a part of them if many."""
        part = min(num_bytes // 2 + 15 & ~15, len(self._source))
        starts = range(0, len(self._source) - part + 1, part)[: self.sets(num_bytes)]

        def copy(start: int) -> None:
            self._target[start : start + part].copy_(self._source[start : start + part])

        times = self.graph([partial(copy, start) for start in starts])
        scale = max(num_bytes / (2 * part), 1)
        return replace(times, median=scale * times.median, low=scale * times.low, high=scale * times.high)

    def percent_of_copy(self, num_bytes: int, microseconds: float) -> float:
        """Return bytes moved in a time, as a share of what the copy moves in it."""
        return 100 * num_bytes / (microseconds * 1e3 * self.copy_bandwidth)

    def graph(self, calls: Sequence[Call]) -> Times:
        """Time a call, on average over ``calls``, which a CUDA graph runs one after the other."""

        def all_calls() -> None:
            for call in calls:
                call()

        torch.cuda.synchronize(self.device)  # a graph is captured on a stream of its own
        milliseconds = do_bench_cudagraph(all_calls, rep=GRAPH_MS, quantiles=QUANTILES)
        return Times(*(1e3 * value / len(calls) for value in milliseconds))

    def stream(self, call: Call) -> Times:
        """Time a call whose kernels are launched one by one, its inputs flushed from the L2 cache before it."""
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
        for _ in range(max(3, min(int(STREAM_MS / milliseconds), 30))):
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
        quantiles = torch.tensor(device, device="cpu").quantile(torch.tensor(QUANTILES, device="cpu"))
        return Times(*quantiles.tolist(), statistics.median(host))
