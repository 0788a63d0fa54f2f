"""Times and memory of functions on a device: CUDA events around single calls, cold caches, medians.

Before every timed call the L2 cache is overwritten and the device is kept busy for a moment, so that the call's kernels
are queued by the time it begins: what is timed is the device's work, not Python's.
On a CPU, where only the benchmark itself is tested, wall-clock times and no memory.
"""

import statistics
import time
from collections.abc import Callable
from typing import NamedTuple

import torch

BUSY_CYCLES = 1_000_000  # about half a millisecond: longer than Python needs to queue a forward and a backward


class Timing(NamedTuple):
    median: float  # seconds
    best: float
    worst: float
    runs: int

    def __str__(self):
        return f"{1e3 * self.median:.3f} ({1e3 * self.best:.3f} .. {1e3 * self.worst:.3f})"


class Clock:
    def __init__(self, device: torch.device, budget: float = 0.4):
        self.device, self.budget = device, budget  # budget: seconds of timed calls per function
        self.cuda = device.type == "cuda"
        if self.cuda:
            cache = torch.cuda.get_device_properties(device).L2_cache_size
            self._flush = torch.empty(max(2 * cache, 128 << 20), dtype=torch.uint8, device=device)

    def time(self, function: Callable[[], object]) -> Timing:
        """Time single calls of function, five to a hundred, after two of warm-up."""
        for _ in range(2):
            function()
        estimate = self._once(function)
        runs = min(100, max(5, int(self.budget / max(estimate, 1e-6))))
        seconds = self._series(function, runs) if self.cuda else [self._once(function) for _ in range(runs)]
        return Timing(statistics.median(seconds), min(seconds), max(seconds), runs)

    def peak_bytes(self, function: Callable[[], object]) -> int | None:
        """Return the most memory that was allocated at once since before function began, inputs it makes included."""
        if not self.cuda:
            function()
            return None
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        function()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before

    def copy_bandwidth(self) -> float:
        """Return bytes per second, read and written, of a large copy: the roofline."""
        size = (2 << 30) if self.cuda else (8 << 20)
        source = torch.randint(0, 255, (size,), dtype=torch.uint8, device=self.device)
        target = torch.empty_like(source)
        return 2 * size / self.time(lambda: target.copy_(source)).median

    def replayed(self, function: Callable[[], object]) -> Callable[[], object]:
        """Return a function that replays function's kernels as a CUDA graph; on a CPU function itself."""
        if not self.cuda:
            return function
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            function()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            kept = function()
        return lambda: (graph.replay(), kept)[1]

    def _once(self, function) -> float:
        if self.cuda:
            return self._series(function, 1)[0]
        start = time.perf_counter()
        function()
        return time.perf_counter() - start

    def _series(self, function, runs) -> list[float]:
        events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(runs)]
        for start, end in events:
            self._flush.zero_()
            torch.cuda._sleep(BUSY_CYCLES)
            start.record()
            result = function()
            end.record()
            del result  # its memory is free for the next call
        torch.cuda.synchronize()
        return [start.elapsed_time(end) / 1e3 for start, end in events]
