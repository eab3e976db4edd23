"""Part `rotary`: rotation of queries and keys, with functions that `rotary_backward` uses too."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from benchmarks.gpu_parts import rotary_cases, timing
from benchmarks.gpu_parts.rotary_cases import Inputs, Pair, Shape, Variant, make_inputs
from benchmarks.gpu_parts.rows import add_bandwidth, complete
from scaled_rope.results import Row


def rotation_error(out: Any, x: Any, inputs: Inputs, inverse: bool = False) -> float:
    """‖out - reference‖ / ‖reference‖ in float64, in pieces; x is the input. NaN when any element was not written."""
    half = inputs.cos.shape[-1]
    apart = total = 0.0
    for start in range(0, x.shape[2], 2**14):
        piece = slice(start, start + 2**14)
        rows = piece if inputs.position_ids is None else inputs.position_ids[0, piece]
        cos, sin = inputs.cos[rows].double(), inputs.sin[rows].double()
        sin = -sin if inverse else sin
        wanted = x[:, :, piece].double()
        a, b = wanted[..., :half], wanted[..., half : 2 * half]
        wanted = torch.cat((a * cos - b * sin, b * cos + a * sin, wanted[..., 2 * half :]), dim=-1)
        apart += float((out[:, :, piece].double() - wanted).square().sum())
        total += float(wanted.square().sum())
    return math.sqrt(apart / total)


def poison(*like: Any) -> None:
    """Leave memory full of NaN for the next tensors of these sizes: an element that nothing writes then shows."""
    poisoned = [torch.full_like(x, math.nan) for x in like]
    del poisoned


def forward_error(variant: Variant, shape: Shape, tokens: int, dtype: torch.dtype, device: torch.device) -> float:
    """The larger relative error of q and k, on inputs of its own.

    Inputs are drawn again instead of kept: some variants overwrite them, and at a million tokens memory is short.
    """
    seed = int(torch.randint(2**31, ()))
    torch.manual_seed(seed)
    x = make_inputs(shape, tokens, dtype, device)
    poison(x.q, x.k)
    out = variant(x.q, x.k, x)
    torch.manual_seed(seed)
    x = make_inputs(shape, tokens, dtype, device)
    return max(rotation_error(a, b, x) for a, b in zip(out, (x.q, x.k), strict=True))


def input_sets(shape: Shape, tokens: int, dtype: torch.dtype) -> tuple[Inputs, list[Pair], bool]:
    """Inputs, all pairs of queries and keys to rotate among, and whether a call with them is a short one."""
    size = shape.elements(tokens) * dtype.itemsize
    first = make_inputs(shape, tokens, dtype, torch.device(timing.DEVICE))
    more = [(torch.randn_like(first.q), torch.randn_like(first.k)) for _ in range(timing.rotated_sets(size) - 1)]
    return first, [(first.q, first.k), *more], 2 * size < timing.SHORT_BYTES


def time_forward(variant: Variant, shape: Shape, tokens: int, dtype: torch.dtype) -> Row:
    timing.free()
    first, pairs, short = input_sets(shape, tokens, dtype)
    with torch.no_grad():
        return timing.time_calls([partial(variant, q, k, first) for q, k in pairs], short)


@dataclass(frozen=True)
class Direction:
    """The forward or the backward pass of a rotation: how its error is found, and how it is timed."""

    metric: str
    error: Callable[[Variant, Shape, int, torch.dtype, torch.device], float]
    time: Callable[[Variant, Shape, int, torch.dtype], Row]
    left_out: tuple[str, ...] = ()
    """Names of variants that are not measured."""


FORWARD = Direction("rotary forward", forward_error, time_forward)


def measure(clock: timing.Clock, direction: Direction = FORWARD) -> Iterator[Row]:
    """A row per shape, length and variant; beside it the copy of as many bytes."""
    dtype, device = torch.bfloat16, torch.device(timing.DEVICE)
    for tokens in rotary_cases.TOKENS:
        for shape in rotary_cases.SHAPES:
            if shape.documents and tokens < 4096:
                continue
            copied = timing.copy_time(shape.elements(tokens), dtype)
            timing.free()
            for name, variant in rotary_cases.variants(shape).items():
                if name in direction.left_out:
                    continue
                row: Row = {
                    "metric": direction.metric,
                    "shape": shape.name,
                    "tokens": tokens,
                    "variant": name,
                    "bytes": 2 * shape.elements(tokens) * dtype.itemsize,
                    "copy_seconds": copied["seconds"],
                }
                check = partial(direction.error, variant, shape, tokens, dtype, device)
                time_it = partial(direction.time, variant, shape, tokens, dtype)
                yield add_bandwidth(complete(row, clock, 20, time_it, check))
