"""Part `copies`: what this card's memory and matrix units reach, the two limits that other rows are held against."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial

import torch

from benchmarks.gpu_parts import timing
from benchmarks.gpu_parts.rows import complete
from scaled_rope.results import Row

SIZES = tuple(2**power for power in (12, 16, 20, 22, 24, 26, 28, 30, 32))
"""Bytes moved, read and written together: from one token of a layer to a million."""
DTYPES = (torch.bfloat16, torch.float32)


def measure(clock: timing.Clock, sizes: Sequence[int] | None = None) -> Iterator[Row]:
    """A row per dtype and size of a device-to-device copy, and one of a large bf16 matrix product."""
    for dtype in DTYPES:
        for size in sizes or SIZES:
            row: Row = {
                "metric": "copy", "variant": "device to device", "tokens": size, "bytes": size,
                "dtype": str(dtype).removeprefix("torch."),
            }  # fmt: skip
            # Not from the cache of `copy_seconds`: its quartiles belong in the row.
            time_it = partial(timing.copy_time, size // dtype.itemsize // 2, dtype)
            row = complete(row, clock, 1, time_it, refusals=(Exception,))
            if "skipped" not in row:
                row["bytes_per_second"] = size / row["seconds"]
            yield row
    row = {"metric": "matmul", "variant": "bf16, 8192 x 8192 x 8192", "tokens": 8192}
    row = complete(row, clock, 1, lambda: {"flops_per_second": timing.matmul_rate()}, refusals=(Exception,))
    if "skipped" not in row:
        row |= {"seconds": 2 * 8192**3 / row["flops_per_second"]}
    yield row
