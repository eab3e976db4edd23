"""Part `rotary`: rotation of queries and keys, with functions that `rotary_backward` uses too."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from benchmarks.gpu_parts import rotary_cases, timing
from benchmarks.gpu_parts.rotary_cases import Inputs, Pair, Shape, Variant, make_inputs
from benchmarks.gpu_parts.rows import add_bandwidth, complete
from scaled_rope.results import Row

FEW = 32
"""The most tokens of a call of which the host's time counts."""


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
        return timed([partial(variant, q, k, first) for q, k in pairs], short, tokens)


def timed(calls: list[Callable[[], Any]], short: bool, tokens: int) -> Row:
    """Times of a call; of few tokens without a CUDA graph too, launches included, and of the host alone."""
    row = timing.time_calls(calls, short)
    if tokens <= FEW:
        row["seconds_without_graph"] = timing.time_calls(calls, False, head_start=False)["seconds"]
        row["host_seconds"] = timing.host_seconds(calls)
    return row


@dataclass(frozen=True)
class Direction:
    """The forward or the backward pass of a rotation: how its error is found, and how it is timed."""

    metric: str
    error: Callable[[Variant, Shape, int, torch.dtype, torch.device], float]
    time: Callable[[Variant, Shape, int, torch.dtype], Row]
    left_out: tuple[str, ...] = ()
    """Names of variants that are not measured."""


FORWARD = Direction("rotary forward", forward_error, time_forward)


def touched_bytes(name: str, shape: Shape, tokens: int, dtype: torch.dtype) -> int:
    """Bytes of the tensors that a variant is given to read and to write: q, k and tables, of each what it needs."""
    in_place = name == "ours, in place"  # where dimensions that are not rotated stay as they are
    width = shape.rotary_dim if in_place else shape.head_dim
    moved = 2 * tokens * (shape.heads + shape.kv_heads) * width * dtype.itemsize
    if name == "ours, no tables":
        return moved
    half = shape.rotary_dim // 2
    if name.startswith("ours") or name == "flash-attn":
        return moved + 2 * tokens * half * (4 if name.startswith("ours") else dtype.itemsize)
    return moved + 4 * tokens * half * dtype.itemsize


def measure(
    clock: timing.Clock,
    direction: Direction = FORWARD,
    lengths: Sequence[int] | None = None,
    shapes: Sequence[Shape] | None = None,
) -> Iterator[Row]:
    """A row per length, shape and variant, with the seconds of a copy of as many bytes. Ours and eager come first, what
    has to be compiled last."""
    dtype, device = torch.bfloat16, torch.device(timing.DEVICE)
    cases = [
        (tokens, shape) for tokens in lengths or rotary_cases.TOKENS for shape in shapes or rotary_cases.SHAPES
        if not (shape.documents and tokens < 4096)
    ]  # fmt: skip
    for compiled in (False, True):
        for tokens, shape in cases:
            for name, variant in rotary_cases.variants(shape).items():
                if name in direction.left_out or (name == rotary_cases.COMPILED) != compiled:
                    continue
                size = touched_bytes(name, shape, tokens, dtype)
                row: Row = {
                    "metric": direction.metric, "shape": shape.name, "tokens": tokens, "variant": name, "bytes": size,
                }  # fmt: skip
                check = partial(direction.error, variant, shape, tokens, dtype, device)
                time_it = partial(beside_copy, size, partial(direction.time, variant, shape, tokens, dtype))
                # Exception: whatever a variant fails with, the others are measured.
                yield add_bandwidth(complete(row, clock, 8 if compiled else 3, time_it, check, refusals=(Exception,)))


def beside_copy(size: int, time_it: Callable[[], Row]) -> Row:
    """Times, and beside them that of a copy of as many bytes."""
    row = time_it()
    timing.free()
    return row | {"copy_seconds": timing.copy_seconds(size)}
