"""Seconds, peak memory and rates on one GPU."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Sequence
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
SHORT_BYTES = 2**26
"""Calls that move less than this are timed in a CUDA graph."""
HEAD_START_CYCLES = 1_000_000
"""Cycles that the GPU spins before a timed call, half a millisecond, so that the call is queued by then."""


class Clock:
    """The time limit of a part, in seconds."""

    def __init__(self, limit: float) -> None:
        self.end = time.monotonic() + limit

    @property
    def left(self) -> float:
        return self.end - time.monotonic()


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


def time_calls(calls: Sequence[Callable[[], Any]], short: bool, budget_s: float = 0.3) -> Row:
    """Time calls that use buffers of their own by CUDA events; return seconds per call.

    short: whether launches would be a good part of the time; then all calls are captured into one CUDA graph, whose
    replays are timed. Where that fails, launches are part of the time and the row says so.
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
        torch.cuda._sleep(HEAD_START_CYCLES)
        start.record()
        run()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1e3 / per_run)
    low, median, high = quartiles(times)
    return {"seconds": median, "seconds_quartiles": [low, high], "runs": len(times), "timing": method}


def time_model(run: Callable[[], Any]) -> Row:
    """`time_calls` of one long call, and the most memory that was allocated during it, in bytes."""
    run()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    timed = time_calls([run], short=False, budget_s=1.0)
    return timed | {"peak_bytes": torch.cuda.max_memory_allocated()}


def copy_time(elements: int, dtype: torch.dtype) -> Row:
    """Time a device-to-device copy of as many elements, like everything else."""
    size = elements * dtype.itemsize
    source = torch.randn(rotated_sets(size, fewest=2), elements, dtype=dtype, device=DEVICE)
    target = torch.empty_like(source)
    calls = [partial(a.copy_, b) for a, b in zip(target, source, strict=True)]
    return time_calls(calls, short=2 * size < SHORT_BYTES)


def matmul_rate(size: int = 8192) -> float:
    """Floating-point operations per second of a large bf16 matrix product of random numbers."""
    a, b = (torch.randn(size, size, dtype=torch.bfloat16, device=DEVICE) for _ in range(2))
    return 2 * size**3 / float(time_calls([partial(torch.matmul, a, b)], short=False)["seconds"])


def peak_flops() -> float | None:
    """Floating-point operations per second that this GPU's data sheet states; None for a GPU that isn't listed."""
    return device_peak_flops(torch.device(DEVICE))
