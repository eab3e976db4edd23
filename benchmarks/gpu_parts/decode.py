"""Part `decode`: attention of one new token over a cache of keys that are not rotated yet."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention as sdpa

from benchmarks.gpu_parts import timing
from benchmarks.gpu_parts.rotary import beside_copy
from benchmarks.gpu_parts.rows import add_bandwidth, complete, relative_difference
from scaled_rope import RopeScaling
from scaled_rope.kernels import DecodeAngles, rotary_decode, rotate
from scaled_rope.results import Row
from scaled_rope.scaling.frequencies import compute_rope

DECODED = (2048, 8192, 32768, 131072)
NAMED = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "cuDNN": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
}
"""torch's backends of attention, by the names that rows have for them."""
DecodeShape = tuple[int, int, int, int]
"""Rows, query heads, key heads, head_dim."""
DECODE_SHAPES: tuple[DecodeShape, ...] = ((1, 32, 8, 128), (8, 32, 8, 128), (1, 9, 3, 64))


def decode_inputs(shape: DecodeShape, keys: int, dtype: torch.dtype, device: torch.device) -> tuple[Any, ...]:
    """Unrotated query [B, H, 1, D], keys and values, and the angles of the last of `keys` tokens under YaRN x32."""
    batch, heads, key_heads, width = shape
    query = torch.randn(batch, heads, 1, width, dtype=dtype, device=device)
    key, value = (torch.randn(batch, key_heads, keys, width, dtype=dtype, device=device) for _ in range(2))
    inv_freq, factor = compute_rope(RopeScaling("yarn", 32.0, 4096), width, device=device)
    at, first = torch.tensor([[keys - 1]], device=device), torch.tensor([0], device=device)
    angles = DecodeAngles(inv_freq[None], at, first, factor)
    table = torch.arange(keys, device=device)[:, None] * inv_freq
    return query, key, value, angles, (table.cos() * factor)[None], (table.sin() * factor)[None]


Variant = Callable[..., Any]
"""A function of `decode_inputs` that gives [B, 1, H, D]."""


def our_variants() -> dict[str, Variant]:
    def ours(query: Any, key: Any, value: Any, angles: Any, *_: Any) -> Any:
        return rotary_decode(query, key, value, angles, backend="triton")

    return {"ours, rotates while it reads": ours}


def decode_variants() -> dict[str, Variant]:
    """All variants by name; those that don't rotate are the yardstick."""

    def in_memory(query: Any, key: Any, value: Any, _: Any, cos: Any, sin: Any) -> Any:
        query = rotate(query, cos[:, -1:], sin[:, -1:])
        return sdpa(query, rotate(key, cos, sin), value, enable_gqa=True).transpose(1, 2)

    found = our_variants()
    found["rotated in memory, then sdpa"] = in_memory
    found["sdpa, no rotation"] = lambda q, k, v, *_: sdpa(q, k, v, enable_gqa=True).transpose(1, 2)
    for name, kind in NAMED.items():
        found[f"sdpa {name}, no rotation"] = partial(static_by, kind)
    if importlib.util.find_spec("flash_attn") is not None:
        from flash_attn import flash_attn_with_kvcache

        found["flash-attn, no rotation"] = lambda q, k, v, *_: flash_attn_with_kvcache(
            *(x.transpose(1, 2) for x in (q, k, v))
        )
    return found


def static_by(kind: SDPBackend, query: Any, key: Any, value: Any, *_: Any) -> Any:
    """Attention to keys that are rotated already, as static scaling has them, by one of torch's backends."""
    with sdpa_kernel(kind):
        return sdpa(query, key, value, enable_gqa=True).transpose(1, 2)


def decode_error(run: Variant, shape: DecodeShape, keys: int, dtype: torch.dtype, device: torch.device) -> float:
    """Mean square error, relative, to attention in float64 over keys that were rotated in float64."""
    query, key, value, angles, cos, sin = decode_inputs(shape, keys, dtype, device)
    out = run(query, key, value, angles, cos, sin)
    q = rotate(query.double(), cos[:, -1:].double(), sin[:, -1:].double(), backend="torch")
    k = rotate(key.double(), cos.double(), sin.double(), backend="torch")
    return relative_difference(out, sdpa(q, k, value.double(), enable_gqa=True).transpose(1, 2))


def time_decode(run: Variant, shape: DecodeShape, keys: int, dtype: torch.dtype, size: int) -> Row:
    """Time one token over so many caches of `size` bytes that the L2 cache cannot hold them."""
    device = torch.device(timing.DEVICE)
    sets = [decode_inputs(shape, keys, dtype, device) for _ in range(timing.rotated_sets(size, most=16))]
    with torch.no_grad():
        return timing.time_calls([partial(run, *given) for given in sets], size < timing.SHORT_BYTES)


def measure(
    clock: timing.Clock,
    dtype: torch.dtype = torch.bfloat16,
    lengths: Sequence[int] | None = None,
    shapes: Sequence[DecodeShape] | None = None,
) -> Iterator[Row]:
    """A row per number of keys, shape and variant; bytes are keys and values, read once."""
    for keys in lengths or DECODED:
        for shape in shapes or DECODE_SHAPES:
            batch, _, key_heads, width = shape
            size = 2 * batch * key_heads * keys * width * dtype.itemsize
            for name, run in decode_variants().items():
                row: Row = {
                    "metric": "decode",
                    "shape": "B{} H{}/{} D{}".format(*shape),
                    "tokens": keys,
                    "variant": name,
                    "bytes": size,
                }
                rotates = "no rotation" not in name
                check = partial(decode_error, run, shape, min(keys, 4096), dtype, torch.device(timing.DEVICE))
                time_it = partial(beside_copy, size, partial(time_decode, run, shape, keys, dtype, size))
                # Exception: a backend of torch that does not take the shape, or anything else.
                row = complete(row, clock, 3, time_it, check if rotates else None, refusals=(Exception,))
                yield add_bandwidth(row)
