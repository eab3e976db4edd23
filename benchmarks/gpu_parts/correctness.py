"""Part `correctness`: every kernel against float64, by dtype, width of heads and layout, a few tokens each."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch

from benchmarks.gpu_parts import timing
from benchmarks.gpu_parts.models import THETA
from benchmarks.gpu_parts.rows import complete, relative_difference
from scaled_rope.kernels import (
    DecodeAngles,
    apply_rotary,
    apply_rotary_from_frequencies,
    frequency_phases,
    rotary_decode,
)
from scaled_rope.results import Row

TOLERANCES = {torch.bfloat16: 8e-3, torch.float16: 1e-3, torch.float32: 5e-6}
"""Largest relative error by dtype: inputs of products, weights and results are rounded, to 2^-9, 2^-12 and 2^-24."""
DTYPES = (torch.bfloat16, torch.float32, torch.float16)
WIDTHS = ((128, 128), (256, 256), (64, 64), (80, 32))
"""head_dim and how much of it is rotated."""
SHARED = ((4, 1), (16, 1), (4, 16), (1, 1))
"""Query heads of a key head, and queries."""
TOKENS = 257
FIRST_KEY = 100_000
"""Position of the first key: angles in float32 would be off by far more than the tolerance."""


def rotated_exactly(x: Any, positions: Any, inv_freq: Any, interleaved: bool, inverse: bool = False) -> Any:
    """x [B, H, T, D] in float64, rotated to positions [T]."""
    half, x = len(inv_freq), x.double()
    angles = positions.double()[:, None] * inv_freq * (-1 if inverse else 1)
    cos, sin = angles.cos(), angles.sin()
    one, two = (slice(0, 2 * half, 2), slice(1, 2 * half, 2)) if interleaved else (slice(half), slice(half, 2 * half))
    out = x.clone()
    out[..., one] = x[..., one] * cos - x[..., two] * sin
    out[..., two] = x[..., two] * cos + x[..., one] * sin
    return out


def frequencies(rotated: int) -> Any:
    half = rotated // 2
    return THETA ** (-torch.arange(half, dtype=torch.float64, device=timing.DEVICE) / half)


def rotary_error(dtype: torch.dtype, width: int, rotated: int, interleaved: bool, tables: bool, tokens: int) -> float:
    """The largest relative error of q, k and their gradients; q is token-major, k heads-major.

    Without gradients it is called twice: the second call takes a shorter way to the kernel.
    """
    inv_freq = frequencies(rotated)
    positions = torch.arange(tokens, device=timing.DEVICE)
    angles = positions.double()[:, None] * inv_freq
    q = torch.randn(2, tokens, 8, width, dtype=dtype, device=timing.DEVICE).transpose(1, 2).requires_grad_()
    k = torch.randn(2, 2, tokens, width, dtype=dtype, device=timing.DEVICE, requires_grad=True)
    options: dict[str, Any] = {"interleaved": interleaved, "backend": "triton"}
    cos, sin, phases = angles.cos().float(), angles.sin().float(), frequency_phases(inv_freq)

    def call() -> Any:
        if tables:
            return apply_rotary(q, k, cos, sin, **options)
        return apply_rotary_from_frequencies(q, k, phases, **options)

    with torch.no_grad():
        plain = [*call(), *call()]
    out = call()
    given = [torch.randn_like(x) for x in out]
    found = (*out, *torch.autograd.grad(out, (q, k), given), *plain)
    exactly = partial(rotated_exactly, positions=positions, inv_freq=inv_freq, interleaved=interleaved)
    wanted = [exactly(x) for x in (q.detach(), k.detach())] + [exactly(x, inverse=True) for x in given]
    wanted += 2 * wanted[:2]
    return max(relative_difference(a.detach(), b) for a, b in zip(found, wanted, strict=True))


def decode_error(
    dtype: torch.dtype, width: int, rotated: int, interleaved: bool, group: int, count: int, keys: int
) -> float:
    """The relative error of the last `count` of `keys` tokens."""
    inv_freq = frequencies(rotated)
    query = torch.randn(1, 2 * group, count, width, dtype=dtype, device=timing.DEVICE)
    key, value = (torch.randn(1, 2, keys, width, dtype=dtype, device=timing.DEVICE) for _ in range(2))
    positions = FIRST_KEY + torch.arange(keys, device=timing.DEVICE)
    # Frequencies as float32 holds them, which is what is given.
    angles = DecodeAngles(inv_freq.float()[None], positions[None, -count:], positions[:1])
    found = rotary_decode(query, key, value, angles, interleaved=interleaved, backend="triton")
    exactly = partial(rotated_exactly, inv_freq=inv_freq.float().double(), interleaved=interleaved)
    q, k = exactly(query, positions[-count:]), exactly(key, positions).repeat_interleave(group, dim=1)
    hidden = positions[None, :] > positions[-count:, None]
    weights = (q @ k.transpose(2, 3) / width**0.5).masked_fill(hidden, -torch.inf).softmax(-1)
    wanted = weights @ value.double().repeat_interleave(group, dim=1)
    return relative_difference(found, wanted.transpose(1, 2))


def cases(dtypes: Sequence[torch.dtype], widths: Sequence[tuple[int, int]], tokens: int) -> Iterator[tuple[Row, Any]]:
    """The fields that identify a case, and the function that finds its error; what models use most comes first."""
    for dtype in dtypes:
        for interleaved in (False, True):
            for width, rotated in widths:
                layout = f"D{width}, {rotated} rotated{', interleaved' if interleaved else ''}"
                for tables in (True, False):
                    name = "ours, rotary by tables" if tables else "ours, rotary without tables"
                    check = partial(rotary_error, dtype, width, rotated, interleaved, tables, tokens)
                    yield {"shape": layout, "variant": name, "dtype": dtype}, check
                for group, count in SHARED:
                    name = f"ours, decoding {count} of {group} heads on one"
                    decoding = partial(decode_error, dtype, width, rotated, interleaved, group, count, tokens)
                    yield {"shape": layout, "variant": name, "dtype": dtype}, decoding


def measure(
    clock: timing.Clock,
    dtypes: Sequence[torch.dtype] | None = None,
    widths: Sequence[tuple[int, int]] | None = None,
    tokens: int | None = None,
) -> Iterator[Row]:
    """A row per kernel, dtype, width and layout, with its error; "wrong" above the tolerance. Nothing is timed."""
    tokens = tokens or TOKENS
    for named, check in cases(dtypes or DTYPES, widths or WIDTHS, tokens):
        dtype = named["dtype"]
        row: Row = {"metric": "correctness", "tokens": tokens, **named, "dtype": str(dtype).removeprefix("torch.")}
        limit = TOLERANCES[dtype]
        yield complete(row, clock, 2, lambda: {}, check, limit=limit, refusals=(Exception,))
