"""Part `attention`: the cost of methods that change attention, beside that of plain attention."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention as sdpa

from benchmarks import attention_methods
from benchmarks.gpu_parts import timing
from benchmarks.gpu_parts.decode import NAMED
from benchmarks.gpu_parts.rows import add_rate, complete, relative_difference
from scaled_rope import RopeScaling
from scaled_rope.attention.composed import composed_attention, flash
from scaled_rope.attention.methods import attention_regions
from scaled_rope.attention.regions import region_attention
from scaled_rope.results import Row
from scaled_rope.scaling.frequencies import compute_rope

ATTENDED = (8192, 32768, 131072)
AttentionShape = tuple[int, int, int]
"""Query heads, key heads, head_dim, of one row of tokens."""
ATTENTION_SHAPES: tuple[AttentionShape, ...] = ((32, 8, 128), (9, 3, 64))
COMPARED = 12288
"""The most tokens of the comparison with float64: with windows of 4096 and chunks of 6144, every region of a method."""
Variant = Callable[..., Any]
"""A function of `attention_inputs` that attends causally."""


def attention_inputs(shape: AttentionShape, tokens: int, dtype: torch.dtype) -> tuple[Any, Any, Any]:
    """q [1, H, T, D], k and v [1, K, T, D], not rotated."""
    heads, key_heads, width = shape
    q = torch.randn(1, heads, tokens, width, dtype=dtype, device=timing.DEVICE)
    k, v = (torch.randn(1, key_heads, tokens, width, dtype=dtype, device=timing.DEVICE) for _ in range(2))
    return q, k, v


def attention_variants(width: int, specs: Sequence[str] | None = None) -> dict[str, tuple[Variant, Variant | None]]:
    """Variants by name, each with a function that is exact in float64, to compare it with.

    Models use "composed" for inference on a GPU, "by blocks" elsewhere and in training. The yardstick doesn't rotate,
    and is compared with nothing.
    """
    base = RopeScaling("default", original_max_position_embeddings=attention_methods.ORIGINAL, rope_theta=1e5)
    inv_freq = compute_rope(base, width, device=torch.device(timing.DEVICE))[0]
    found: dict[str, Any] = {"sdpa, no rotation": (partial(sdpa, is_causal=True, enable_gqa=True), None)}
    for name, kind in NAMED.items():
        found[f"sdpa {name}, no rotation"] = (partial(causal_by, kind), None)
    for spec in specs or attention_methods.SPECS:
        regions = attention_regions(RopeScaling.from_spec(spec, base))
        given = {"inv_freq": inv_freq, "regions": regions, "scale": width**-0.5}
        blocks = partial(region_attention, **given)
        found[f"ours, {spec}, composed"] = (partial(composed_attention, attend=flash, **given), blocks)
        found[f"ours, {spec}, by blocks"] = (blocks, blocks)
    return found


def causal_by(kind: SDPBackend, q: Any, k: Any, v: Any) -> Any:
    """Plain causal attention by one of torch's backends."""
    with sdpa_kernel(kind):
        return sdpa(q, k, v, is_causal=True, enable_gqa=True)


@torch.inference_mode()
def attention_error(run: Variant, exact: Variant, shape: AttentionShape, tokens: int, dtype: torch.dtype) -> float:
    """Mean square error, relative, to `exact` in float64."""
    q, k, v = attention_inputs(shape, tokens, dtype)
    wanted = exact(q.double(), k.double(), v.double())
    return relative_difference(run(q, k, v), wanted)


@torch.inference_mode()
def time_attention(run: Variant, shape: AttentionShape, tokens: int, dtype: torch.dtype) -> Row:
    return timing.time_model(partial(run, *attention_inputs(shape, tokens, dtype)))


def measure(
    clock: timing.Clock,
    lengths: Sequence[int] | None = None,
    shapes: Sequence[AttentionShape] | None = None,
    specs: Sequence[str] | None = None,
) -> Iterator[Row]:
    """A row per length, shape and variant, in bf16."""
    dtype = torch.bfloat16
    for tokens in lengths or ATTENDED:
        for shape in shapes or ATTENTION_SHAPES:
            heads, key_heads, width = shape
            clock.forget()
            guess = 2 + 20 * (tokens / 131072) ** 2
            for name, (run, exact) in attention_variants(width, specs).items():
                row: Row = {
                    "metric": "attention",
                    "shape": f"H{heads}/{key_heads} D{width}",
                    "tokens": tokens,
                    "variant": name,
                }
                check = None
                if exact is not None:
                    check = partial(attention_error, run, exact, shape, min(tokens, COMPARED), dtype)
                time_it = partial(time_attention, run, shape, tokens, dtype)
                # Exception: a backend of torch that does not take the shape, or anything else.
                row = complete(row, clock, guess, time_it, check, refusals=(Exception,))
                yield add_rate(row, 2.0 * heads * width * tokens**2)  # two products over half of all pairs
