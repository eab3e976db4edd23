"""Correctness of the kernels on the CPU, in Triton's interpreter; TRITON_INTERPRET=1 must be set before the import."""

from __future__ import annotations

import torch

from benchmarks.gpu_parts import rotary_cases
from benchmarks.gpu_parts.decode import DECODE_SHAPES, decode_error, our_variants
from benchmarks.gpu_parts.rotary import FORWARD
from benchmarks.gpu_parts.rotary_backward import BACKWARD
from benchmarks.gpu_parts.rows import TOLERANCE

CPU = torch.device("cpu")


def is_good(error: float, tolerance: float, what: str) -> bool:
    """Whether an error is small enough; prints a line that says so. what: the thing that was checked."""
    good = error < tolerance
    print(f"{'ok   ' if good else 'WRONG'} {error:.1e} {what}")
    return good


def interpret() -> int:
    """Check every shape with a few tokens, forward and backward. Returns 1 when one is wrong."""
    good = []
    for dtype in (torch.float32, torch.bfloat16):
        # float32: products and sums of roundings of 6e-8. bf16: the interpreter truncates, which doubles the error.
        tolerance = 5e-7 if dtype == torch.float32 else TOLERANCE
        for shape in rotary_cases.SHAPES:
            for name, variant in rotary_cases.our_variants("triton").items():
                for direction in (FORWARD, BACKWARD):
                    error = direction.error(variant, shape, 41 if shape.documents else 5, dtype, CPU)
                    way = direction.metric.removeprefix("rotary ")
                    what = f"{str(dtype).removeprefix('torch.')}, {shape.name}, {name}, {way}"
                    good.append(is_good(error, tolerance, what))
    for rows, heads, key_heads, width in DECODE_SHAPES:
        # In float32 alone: the interpreter cannot multiply matrices in bf16.
        for name, run in our_variants().items():
            small = (min(rows, 2), heads // key_heads, 1, width)
            error = decode_error(run, small, 70, torch.float32, CPU)
            # Sums of 70 weighted values, whose angles, up to 70, are rounded to 2^-24 of themselves in the reference.
            good.append(is_good(error, 2e-6, f"float32, decode B{small[0]} H{heads}/{key_heads}, {name}"))
    return int(not all(good))
