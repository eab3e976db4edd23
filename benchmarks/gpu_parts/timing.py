"""Seconds, peak memory and rates on one GPU."""

from __future__ import annotations

import functools
import gc
import time
from collections.abc import Callable, Collection, Hashable, Sequence
from functools import partial
from typing import Any

import torch

from scaled_rope.results import Row
from scaled_rope.training.costs import device_peak_flops

DEVICE = "cuda"
ROTATED_BYTES = 2**28
"""Bytes of inputs to rotate among: five times the L2 cache of an H100."""
RUNS = 20, 500
"""Fewest and most timings of which the median is taken; three where a call takes seconds."""
HOST_RUNS = 5, 100
"""Rounds, and calls in each, of which the host's time is taken: few enough that the GPU's queue never fills."""
SHORT_BYTES = 2**26
"""Calls that move less than this are timed in a CUDA graph."""
HEAD_START_CYCLES = 1_000_000
"""Cycles that the GPU spins before a timed call, half a millisecond, so that the call is queued by then."""


class Clock:
    """The time limit of a part in seconds, and what the part need not measure again.

    done: keys (`rows.key`) of the rows that this code has measured on this GPU.
    """

    def __init__(self, limit: float, done: Collection[Hashable] = ()) -> None:
        self.end = time.monotonic() + limit
        self.done = done
        self._cost: dict[str, float] = {}

    @property
    def left(self) -> float:
        return self.end - time.monotonic()

    def needed(self, kind: str, guess: float) -> float:
        """Seconds that must be left for another case of a kind: what the last one took and a half more, or a guess."""
        return 1.5 * self._cost[kind] if kind in self._cost else guess

    def forget(self) -> None:
        """Go by guesses again, where the next case is of another size."""
        self._cost.clear()

    def took(self, kind: str, seconds: float) -> None:
        self._cost[kind] = seconds


def free() -> None:
    gc.collect()
    torch.cuda.empty_cache()


def rotated_sets(size: int, most: int = 64, fewest: int = 1) -> int:
    """The number of inputs of `size` bytes to rotate among, so that the L2 cache cannot hold them all."""
    return max(fewest, min(most, ROTATED_BYTES // size))


def quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    """Lower quartile, median, upper quartile."""
    ordered = sorted(values)
    return tuple(ordered[round(share * (len(ordered) - 1))] for share in (0.25, 0.5, 0.75))  # type: ignore[return-value]


def time_calls(calls: Sequence[Callable[[], Any]], short: bool, budget_s: float = 0.3, head_start: bool = True) -> Row:
    """Time calls that use buffers of their own by CUDA events; return seconds per call.

    short: whether launches would be a good part of the time; then all calls are captured into one CUDA graph, whose
    replays are timed. Where that fails, launches are part of the time and the row says so. head_start: whether the
    GPU is kept busy until the call is queued; without, the time of the host counts where it is the longer one.
    """
    for call in calls:
        call()
    torch.cuda.synchronize()
    method, per_run = "events", 1
    runs: list[Callable[[], Any]] = list(calls)
    if short:
        try:
            graph = torch.cuda.CUDAGraph()
            # Backward passes run on the stream of their forward pass, so they are captured on that stream.
            with torch.cuda.graph(graph, stream=torch.cuda.current_stream()):
                kept = [call() for call in calls]  # outputs with memory of their own
            del kept
            runs, method, per_run = [graph.replay], "graph", len(calls)
        except Exception as error:  # some libraries do things that cannot be captured
            method = f"events, launches included ({type(error).__name__})"
            torch.cuda.synchronize()
    times: list[float] = []
    started = time.monotonic()
    while len(times) < RUNS[0] or (time.monotonic() - started < budget_s and len(times) < RUNS[1]):
        if len(times) >= 3 and time.monotonic() - started > 10 * budget_s:
            break  # calls of a second and more
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        run = runs[len(times) % len(runs)]
        if head_start:
            torch.cuda._sleep(HEAD_START_CYCLES)
        start.record()
        run()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1e3 / per_run)
    low, median, high = quartiles(times)
    return {"seconds": median, "seconds_quartiles": [low, high], "runs": len(times), "timing": method}


def host_seconds(calls: Sequence[Callable[[], Any]]) -> float:
    """Seconds that the host needs for a call, the GPU being left to follow: the median of some rounds of calls."""
    found = []
    rounds, each = HOST_RUNS
    for _ in range(rounds):
        torch.cuda.synchronize()
        started = time.perf_counter()
        for index in range(each):
            calls[index % len(calls)]()
        found.append((time.perf_counter() - started) / each)
    torch.cuda.synchronize()
    return quartiles(found)[1]


def time_model(run: Callable[[], Any]) -> Row:
    """`time_calls` of one long call, and the most memory that was allocated during it, in bytes."""
    run()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    timed = time_calls([run], short=False, budget_s=0.2)
    return timed | {"peak_bytes": torch.cuda.max_memory_allocated()}


@functools.cache
def copy_seconds(size: int, dtype: torch.dtype = torch.bfloat16) -> float:
    """Seconds of a device-to-device copy that moves `size` bytes, half of them read and half written."""
    return float(copy_time(max(1, size // dtype.itemsize // 2), dtype)["seconds"])


def copy_time(elements: int, dtype: torch.dtype) -> Row:
    """Time a device-to-device copy of as many elements, like everything else."""
    size = elements * dtype.itemsize
    source = torch.randn(rotated_sets(size, fewest=2), elements, dtype=dtype, device=DEVICE)
    target = torch.empty_like(source)
    calls = [partial(a.copy_, b) for a, b in zip(target, source, strict=True)]
    return time_calls(calls, short=2 * size < SHORT_BYTES)


@functools.cache
def matmul_rate(size: int = 8192) -> float:
    """Floating-point operations per second of a large bf16 matrix product of random numbers."""
    a, b = (torch.randn(size, size, dtype=torch.bfloat16, device=DEVICE) for _ in range(2))
    return 2 * size**3 / float(time_calls([partial(torch.matmul, a, b)], short=False)["seconds"])


def peak_flops() -> float | None:
    """Floating-point operations per second that this GPU's data sheet states; None for a GPU that isn't listed."""
    return device_peak_flops(torch.device(DEVICE))
