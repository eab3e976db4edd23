"""Measure time and peak memory of a block of code; recognise and recover from running out of memory."""

from __future__ import annotations

import gc
import sys
import time
from pathlib import Path

import torch


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception says that memory was not enough, on any device."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    # The CPU's allocator has no exception of its own, nor have libraries that take memory past PyTorch's, as cuBLAS and
    # cuDNN do for their workspaces (CUBLAS_STATUS_ALLOC_FAILED).
    said = ("can't allocate memory", "out of memory", "not enough memory", "STATUS_ALLOC_FAILED")
    return isinstance(error, RuntimeError) and any(words in str(error) for words in said)


def release_memory() -> None:
    """Free memory that an exception's frames and the GPU's cache still hold."""
    gc.collect()  # first: a cycle of frames holds tensors, and the cache is emptied only of what is free
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


class Meter:
    """Wall-clock time and peak memory of a `with` block: `seconds` and `peak_memory` (bytes).

    Memory is what PyTorch allocated on GPUs, of several the sum of their peaks, which need not have been at the same
    time; elsewhere the process's resident set, of which the model is a part.

    Args:
        devices: those that compute in the block.
    """

    def __init__(self, *devices: torch.device) -> None:
        self._gpus = [device for device in devices if device.type == "cuda"]
        self.seconds = 0.0
        self.peak_memory = 0

    def __enter__(self) -> Meter:
        for gpu in self._gpus:
            torch.cuda.reset_peak_memory_stats(gpu)
        if not self._gpus:
            try:  # "5" resets the peak (VmHWM) on Linux; elsewhere it stays that of the whole process
                Path("/proc/self/clear_refs").write_text("5")
            except OSError:
                pass
        self._start = time.perf_counter()
        return self

    def __exit__(self, *error: object) -> None:
        for gpu in self._gpus:
            torch.cuda.synchronize(gpu)  # kernels are only queued when a call returns
        self.seconds = time.perf_counter() - self._start
        peaks = [int(torch.cuda.max_memory_allocated(gpu)) for gpu in self._gpus] or [_peak_resident()]
        self.peak_memory = sum(peaks)


def _peak_resident() -> int:
    """The largest resident set of this process in bytes since it was last reset."""
    try:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # macOS counts bytes, others KiB
