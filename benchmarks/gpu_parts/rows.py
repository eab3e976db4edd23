"""Rows of the GPU benchmark: a variant is checked before it is timed, and its row says why if it was not timed."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Callable, Iterable
from typing import Any

import torch

from benchmarks.common import ROOT, gpu_is_lost
from benchmarks.gpu_parts import timing
from scaled_rope.content_hash import content_hash, record_hash
from scaled_rope.errors import ConfigError
from scaled_rope.evaluation.memory_meter import is_out_of_memory
from scaled_rope.provenance import package_version
from scaled_rope.results import OUT_OF_MEMORY, Row

NO_TIME = "no time left"
WRONG = "wrong"
KNOWN = "measured before"
"""Of a case that an earlier run of the same code has measured on the same GPU: no row is written."""
IDENTITY = ("metric", "shape", "model", "tokens", "variant", "kernel", "dtype")
TOLERANCE = 8e-3
"""Largest relative error of a variant in bf16.

bf16 rounds with a relative error of up to 2^-9, so 1.1e-3 in the mean square; variants that round cos, sin and each
product have about twice that, three times with sums. A wrong angle makes 1e-1 and more.
"""


class GpuLost(Exception):
    """An error after which this process cannot use the GPU any more. `row` says which case it was."""

    def __init__(self, row: Row) -> None:
        super().__init__(row["skipped"])
        self.row = row


def source_hash() -> str:
    """A hash of the code that is measured and of that which measures, whether it is committed or not."""
    folders = (ROOT / "scaled_rope", ROOT / "benchmarks" / "gpu_parts")
    files = sorted(path for folder in folders for path in folder.rglob("*.py"))
    return record_hash({path.relative_to(ROOT).as_posix(): content_hash(path) for path in files})[:16]


def is_ours(row: Row) -> bool:
    return str(row.get("variant", "ours")).startswith("ours")


def is_bad(row: Row) -> bool:
    """Whether a row says that a variant of ours is wrong or fails."""
    return "skipped" in row and row["skipped"] not in (NO_TIME, OUT_OF_MEMORY, KNOWN) and is_ours(row)


def relative_difference(out: Any, wanted: Any) -> float:
    """‖out - wanted‖ / ‖wanted‖ in float64."""
    return float((out.double() - wanted.double()).norm() / wanted.double().norm())


def key(row: Row) -> tuple[Any, ...]:
    """The fields that say what a row measured, whatever came out."""
    # Which attention ran is a result where variants have names of their own.
    return *(row.get(name) for name in IDENTITY), None if "variant" in row else row.get("attention")


def known_rows(rows: Iterable[Row], about: Row, failed: bool = False) -> set[tuple[Any, ...]]:
    """Keys of the rows that need not be measured again, by the same code on the same GPU.

    Those for which no time was left are measured again, and so is what failed of ours, unless `failed`.
    """
    same = ("source", "device", "driver")
    return {
        key(row) for row in rows
        if row.get("skipped") != NO_TIME and (failed or not is_bad(row))
        and all(row.get(name) == about.get(name) for name in same)
    }  # fmt: skip


def complete(
    row: Row,
    clock: timing.Clock,
    needed_s: float,
    time_it: Callable[[], Row],
    check: Callable[[], float] | None = None,
    limit: float = TOLERANCE,
    refusals: tuple[type[Exception], ...] = (),
) -> Row:
    """Check one variant and time it; return its row with `error` and times, or with `skipped`, the reason why not.

    Args:
        row: the fields that identify the case.
        needed_s: seconds that must be left on the clock for the first case of its metric and variant; later ones are
            expected to take as long as the one before.
        time_it: measures, and returns the fields to add to the row.
        check: returns the variant's error. A variant whose error is not below `limit` (NaN is not) is not timed.
        refusals: exceptions by which a variant says that it cannot run here; running out of memory always is one.

    Raises:
        GpuLost: an error of CUDA.
    """
    if key(row) in clock.done:
        return row | {"skipped": KNOWN}
    kind = f"{row.get('metric')} {row.get('variant')}"
    if clock.left < clock.needed(kind, needed_s):
        return row | {"skipped": NO_TIME}
    started = time.monotonic()
    try:
        if check is not None:
            row["error"] = check()
        if check is not None and not row["error"] < limit:
            row["skipped"] = WRONG
        else:
            row |= time_it()
    except Exception as problem:
        said = str(problem) if isinstance(problem, ConfigError) else [*str(problem).splitlines(), ""][0][:120]
        if gpu_is_lost(problem):
            raise GpuLost(row | {"skipped": said}) from problem
        if is_out_of_memory(problem):
            row["skipped"] = OUT_OF_MEMORY
        elif isinstance(problem, refusals):
            row["skipped"] = said or type(problem).__name__
        else:
            raise
    timing.free()
    clock.took(kind, time.monotonic() - started)
    return row


def add_bandwidth(row: Row) -> Row:
    """Bytes per second of a row that was timed, and its share of what a copy of as many bytes reaches."""
    if "skipped" not in row:
        row["bytes_per_second"] = row["bytes"] / row["seconds"]
        row["share_of_copy"] = row["copy_seconds"] / row["seconds"]
    return row


def add_rate(row: Row, operations: float) -> Row:
    """Tokens and floating-point operations per second of a row that was timed, the latter as a share of the peak."""
    if "skipped" not in row:
        row |= {"tokens_per_second": row["tokens"] / row["seconds"], "flops": operations}
        row["mfu"] = operations / row["seconds"] / peak if (peak := timing.peak_flops()) else None
    return row


def machine() -> Row:
    """A row's fields about the GPU, besides `results.provenance`."""
    try:
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        driver = subprocess.run(query, capture_output=True, text=True, timeout=60).stdout.split("\n")[0].strip() or None
    except OSError:
        driver = None
    properties = torch.cuda.get_device_properties(0)
    packages = ("triton", "liger-kernel", "flash-attn", "flash-attn-4")
    return {
        "driver": driver,
        "cuda": torch.version.cuda,
        "multiprocessors": properties.multi_processor_count,
        "memory_bytes": properties.total_memory,
        "gpu_versions": {name: package_version(name) for name in packages},
    }


def show(row: Row) -> str:
    """A row as a line of text."""
    words = [row["metric"], row.get("shape") or row.get("model") or "", f"T={row['tokens']}"]
    words += [row["variant"]] if "variant" in row else [row["attention"], f"kernel {row['kernel']}"]
    words += [row["dtype"]] if "dtype" in row else []
    if "skipped" in row:
        return f"{', '.join(words)}: {row['skipped']}"
    if "seconds" not in row:
        return f"{', '.join(words)}: error {row['error']:.1e}"
    if "flops_per_second" in row:
        speed = f"{row['flops_per_second'] / 1e12:.0f} TFLOP/s"
    elif "share_of_copy" not in row and "bytes_per_second" in row:
        speed = f"{row['bytes_per_second'] / 1e9:.0f} GB/s"
    elif "bytes_per_second" in row:
        speed = f"{row['bytes_per_second'] / 1e9:.0f} GB/s, {100 * row['share_of_copy']:.0f} % of a copy"
    else:
        used = "" if row["mfu"] is None else f", {100 * row['mfu']:.0f} % of the peak rate"
        speed = f"{row['tokens_per_second']:.0f} tokens/s{used}, peak {row['peak_bytes'] / 2**30:.1f} GiB"
    if "host_seconds" in row:
        speed += f", host {row['host_seconds'] * 1e6:.1f} us"
    error = f", error {row['error']:.1e}" if "error" in row else ""
    return f"{', '.join(words)}: {row['seconds'] * 1e6:.1f} us, {speed}{error}"
