"""Attention whose positions depend on how far a key is from its query, in linear memory.

ReRoPE, Self-Extend and their like split the keys before a query into regions: the nearest keys keep their true
distance, those further away get other positions of query and key. Within a region the rotation is ordinary RoPE, so a
score is one product of a rotated query and a rotated key, and each key is scored under one pair of positions.

Shapes: B rows, H query heads, K key heads (K divides H), D = head_dim. Positions count tokens from 0. Queries are the
last Q of T positions, so that a cache of unrotated keys needs nothing else. Scores are held for one block of queries
at a time: memory grows with block x T. A block meets a key twice only where a region begins within the block.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from einops import rearrange
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from scaled_rope.attention.blockwise import bfloat16_products
from scaled_rope.kernels import rotate

_BLOCK = 128
"""Number of queries whose scores are in memory at once."""


@dataclass(frozen=True)
class Region:
    """A range of keys that share one rule for the positions of query and key."""

    start: Callable[[Any], Any]
    """Position of a query, a number or a tensor -> position of the region's first key (below 0: all keys)."""
    query: Callable[[Tensor], Tensor]
    """Positions of queries [T] -> the positions that they are rotated to: [T], or [T, G] where groups of pairs of
    dimensions have positions of their own, see `rotated`."""
    key: Callable[[Tensor], Tensor]
    """Positions of keys -> the positions that they are rotated to, likewise."""


@dataclass(frozen=True)
class Regions:
    """All keys up to the query itself, in regions from the nearest to the furthest."""

    near_to_far: tuple[Region, ...]
    """Each ends where the one before begins, the first one with the query itself; the last begins at the first key."""
    period: int | None = None
    """Number of queries after which the bounds of regions jump: no block of queries crosses a multiple of it.
    None: bounds move with every query."""
    temperature: Callable[[Tensor], Tensor] | None = None
    """Positions of queries -> what their scores are multiplied by; None: nothing."""


def _everything(position: Any) -> Any:
    return position * 0


def _itself(position: Tensor) -> Tensor:
    return position


def rerope(window: int) -> Regions:
    """Relative position min(i - j, window)."""
    # A token sees itself and window - 1 tokens before it at their distances, 0 to window - 1.
    near = Region(lambda i: i - window + 1, _itself, _itself)
    # A query at w and a key at 0 are w apart, whatever their positions.
    far = Region(_everything, lambda i: i * 0 + window, lambda j: j * 0)
    return Regions((near, far))


def leaky_rerope(window: int, k: float) -> Regions:
    """Relative position i - j within the window, window + (i - j - window)/k beyond."""
    near = Region(lambda i: i - window + 1, _itself, _itself)
    # The difference of the two positions is window + (i - j - window)/k.
    far = Region(_everything, lambda i: (i.double() + window * (k - 1)) / k, lambda j: j.double() / k)
    return Regions((near, far))


def self_extend(group: int, window: int) -> Regions:
    """Relative position i - j within the window of neighbours, floor(i/g) - floor(j/g) + (w - floor(w/g)) beyond."""
    near = Region(lambda i: i - window + 1, _itself, _itself)
    # Shifted so that groups go on where the window ends: at i - j = window both rules give about window.
    far = Region(_everything, lambda i: i // group + (window - window // group), lambda j: j // group)
    return Regions((near, far))


def dpe(factors: Sequence[int], window: int) -> Regions:
    """Self-Extend with a group size g of its own for each group of pairs of dimensions: relative position i - j within
    the window, floor(i/g) - floor(j/g) + (w - floor(w/g)) beyond, for the pairs of each group.

    factors: g of each group, from the pairs that turn fastest; 1 leaves a group's positions as they are.
    """

    def groups(positions: Tensor) -> Tensor:
        return torch.tensor(factors, device=positions.device)

    near = Region(lambda i: i - window + 1, _itself, _itself)
    far = Region(
        _everything,
        lambda i: i[:, None] // groups(i) + (window - window // groups(i)),
        lambda j: j[:, None] // groups(j),
    )
    return Regions((near, far))


def dual_chunk(chunk: int, length: int) -> Regions:
    """Keys at j mod S; the query at i mod S towards its own chunk, at min(S + i mod S, L-1) towards the chunk before,
    at L-1 towards earlier ones.

    length: L, the trained length.
    """

    within = Region(lambda i: i // chunk * chunk, lambda i: i % chunk, lambda j: j % chunk)
    before = Region(
        lambda i: i // chunk * chunk - chunk, lambda i: (chunk + i % chunk).clamp(max=length - 1), lambda j: j % chunk
    )
    earlier = Region(_everything, lambda i: i * 0 + (length - 1), lambda j: j % chunk)
    return Regions((within, before, earlier), period=chunk)


def region_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    inv_freq: Tensor,
    regions: Regions,
    scale: float,
    *,
    interleaved: bool = False,
    block: int = _BLOCK,
) -> Tensor:
    """softmax(scale · scores) v over the keys up to each query; each score uses the positions of its region.

    Args:
        q: [B, H, Q, D], not rotated: the last Q of T positions.
        k: [B, K, T, D], not rotated.
        v: [B, K, T, V].
        inv_freq: [R/2], radians per position of the R <= D rotated dimensions.
        scale: usually 1 / sqrt(D).
        interleaved: dimensions are paired (2i, 2i+1) instead of (i, i + R/2).
        block: number of queries whose scores are in memory at once.

    Returns:
        [B, H, Q, V] in the dtype of q. Rotation and sums are float32 (float64 for float64). The factors of products are
        rounded to bfloat16 where that is q's dtype (on a CPU without gradients only), on a GPU to float16 likewise.
        With gradients, scores are computed again in the backward pass.
    """
    exact = torch.float64 if q.dtype == torch.float64 else torch.float32
    gradients = torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v))
    options = (inv_freq.to(q.device, exact), regions, scale, interleaved, block, gradients)
    if q.device.type != "cpu" or gradients:
        # A GPU multiplies 16-bit factors some 15 times as fast as float32 ones.
        rounded = q.dtype if q.device.type != "cpu" and q.dtype.itemsize == 2 else None
        return _attend(q.to(exact), k.to(exact), v.to(exact), *options, rounded).to(q.dtype)
    # One key head at a time keeps scores in the caches of a CPU; a GPU wants all of them at once.
    grouped = rearrange(q, "b (k group) q d -> b k group q d", k=k.shape[1])
    out = q.new_empty(*grouped.shape[:-1], v.shape[-1])
    with bfloat16_products() if q.dtype == torch.bfloat16 else nullcontext():
        for row in range(q.shape[0]):
            for head in range(k.shape[1]):
                queries, keys, values = (
                    x[None].to(exact) for x in (grouped[row, head], k[row, head, None], v[row, head, None])
                )
                out[row, head] = _attend(queries, keys, values, *options)[0].to(q.dtype)
    return rearrange(out, "b k group q v -> b (k group) q v")


def _attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    inv_freq: Tensor,
    regions: Regions,
    scale: float,
    interleaved: bool,
    block: int,
    gradients: bool,
    rounded: torch.dtype | None = None,
) -> Tensor:
    """`region_attention` of tensors that all have one dtype. rounded: what factors of products are rounded to."""
    queries, length = q.shape[2], k.shape[2]
    before = length - queries
    positions = torch.arange(length, device=q.device)
    factor = torch.full((queries, 1), scale, dtype=q.dtype, device=q.device)
    if regions.temperature is not None:
        factor = factor * regions.temperature(positions[before:]).to(q.dtype)[:, None]
    q = q * factor
    # Rotate the keys of each region, from the first to the last that any of these queries sees there. Bounds rise with
    # the query: the first one decides where the span begins, the last one where it ends.
    spans, keys, ends = [], [], length
    for region in regions.near_to_far:
        first = max(0, region.start(before))
        spans.append(first)
        seen = positions[first:ends]
        turned = rotated(k[:, :, first:ends], region.key(seen), inv_freq, interleaved)
        # With gradients those of all blocks add up in the keys, in float32; without, each is rounded once.
        keys.append(turned if rounded is None or gradients else turned.to(rounded))
        ends = max(0, region.start(length - 1))
    if rounded is not None and not gradients:
        v = v.to(rounded)
    results = []
    start = before
    while start < length:
        end = min(start + block, length)
        if regions.period is not None:
            end = min(end, (start // regions.period + 1) * regions.period)
        part = q[:, :, start - before : end - before]
        given = (part, keys, v, spans, regions, start, end, inv_freq, interleaved, gradients, rounded)
        results.append(checkpoint(_block, *given, use_reentrant=False) if gradients else _block(*given))
        start = end
    return torch.cat(results, dim=2)


def _block(
    q: Tensor,
    keys: list[Tensor],
    v: Tensor,
    spans: list[int],
    regions: Regions,
    start: int,
    end: int,
    inv_freq: Tensor,
    interleaved: bool,
    gradients: bool,
    rounded: torch.dtype | None = None,
) -> Tensor:
    """Attention [B, H, end - start, V] of the queries from start to end; keys[i] begin at position spans[i]."""
    batch, heads, size, _ = q.shape
    kv_heads = v.shape[1]
    groups = heads // kv_heads
    at = torch.arange(start, end, device=q.device)
    pieces = list(_pieces(regions, start, end))
    shares = [last - first for _, first, last in pieces]
    # One buffer for all scores, so that they are written once.
    scores = q.new_empty(batch, kv_heads, groups * size, sum(shares)) if not gradients else None
    parts: list[Tensor] = []
    for place, (index, first, last) in enumerate(pieces):
        region = regions.near_to_far[index]
        # Heads that share keys are rows of one product.
        turned = rotated(q, region.query(at), inv_freq, interleaved).reshape(batch, kv_heads, groups * size, -1)
        seen = keys[index][:, :, first - spans[index] : last - spans[index]].transpose(-1, -2)
        into = None if scores is None else torch.split(scores, shares, dim=-1)[place]
        part = _product(turned, seen, into, rounded)
        by_query = part.view(batch, kv_heads, groups, size, -1)  # a view: the mask is written through it
        stop = regions.near_to_far[index - 1].start if index else lambda i: i + 1
        begins, ends = region.start(at), stop(at)
        # A mask is needed only for keys at which the region begins or ends within this block of queries.
        common = min(last, max(first, region.start(end - 1))), max(first, stop(start))
        for low, high in ((first, common[0]), (max(common), last)):
            if low < high:
                edge = torch.arange(low, high, device=q.device)
                hidden = (edge < begins[:, None]) | (edge >= ends[:, None])
                by_query[..., low - first : high - first].masked_fill_(hidden, -torch.inf)
        parts.append(part)
    if scores is None:
        weights = torch.cat(parts, dim=-1).softmax(dim=-1)
    else:
        weights = torch.softmax(scores, dim=-1, out=scores)
    out = q.new_zeros(batch, kv_heads, groups * size, v.shape[-1])  # in the dtype of sums
    for part, (_, first, last) in zip(torch.split(weights, shares, dim=-1), pieces, strict=True):
        out = out + _product(part, v[:, :, first:last], None, rounded)
    return out.view(batch, heads, size, -1)


def _pieces(regions: Regions, start: int, end: int) -> Iterator[tuple[int, int, int]]:
    """Yield (index of a region, first key, end) for the keys that queries from start to end see."""
    stop = end
    for index, region in enumerate(regions.near_to_far):
        first = max(0, region.start(start))
        if first < stop:
            yield index, first, stop
        stop = region.start(end - 1)
        if stop <= 0:
            return


def _product(a: Tensor, b: Tensor, into: Tensor | None = None, rounded: torch.dtype | None = None) -> Tensor:
    """The matrix product a b, written into `into` if that is given, which may be strided if there is one head.

    rounded: the dtype that a and b are rounded to, if not None; sums and the result are float32.
    """
    if rounded is not None:
        found: Tensor = _RoundedProduct.apply(a, b, rounded)  # type: ignore[no-untyped-call]
        return found if into is None else into.copy_(found)
    if a.shape[0] * a.shape[1] == 1 and not a.requires_grad and not b.requires_grad:
        one = torch.mm(a[0, 0], b[0, 0], out=None if into is None else into[0, 0])
        return one[None, None] if into is None else into
    if into is None:
        return torch.matmul(a, b)
    return into.copy_(torch.matmul(a, b))


class _RoundedProduct(torch.autograd.Function):
    """a b and its gradients, with all factors rounded to 16 bits, and sums and results in float32."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor, rounded: torch.dtype) -> Tensor:
        ctx.dtypes = a.dtype, b.dtype
        a, b = a.to(rounded), b.to(rounded)
        ctx.save_for_backward(a, b)
        return _summed_in_float32(a, b)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        (a, b), wanted = ctx.saved_tensors, ctx.needs_input_grad
        gradient = gradient.to(a.dtype)
        for_a = _summed_in_float32(gradient, b.mT).to(ctx.dtypes[0]) if wanted[0] else None
        for_b = _summed_in_float32(a.mT, gradient).to(ctx.dtypes[1]) if wanted[1] else None
        return for_a, for_b, None


def _summed_in_float32(a: Tensor, b: Tensor) -> Tensor:
    """The product of 16-bit [B, K, M, D] and [B, K, D, N] in float32."""
    if a.device.type != "cuda":
        return a.float() @ b.float()  # products of 16-bit numbers are exact in float32, so this is the same
    # As any other product, torch would round the sums to 16 bits.
    product: Tensor = torch.bmm(a.flatten(0, 1), b.flatten(0, 1), out_dtype=torch.float32)
    return product.view(*a.shape[:2], *product.shape[1:])


def rotated(x: Tensor, positions: Tensor, inv_freq: Tensor, interleaved: bool) -> Tensor:
    """x [B, H, T, D] rotated to positions [T], or [T, G]: those of G groups, as even as can be, of the R/2 pairs."""
    if not len(positions):
        return x
    by_pair = positions[:, None]
    if positions.dim() == 2:
        count = positions.shape[1]
        by_pair = positions[:, torch.arange(len(inv_freq), device=positions.device) * count // len(inv_freq)]
    angles = by_pair.to(inv_freq.dtype) * inv_freq
    return rotate(x, angles.cos(), angles.sin(), interleaved=interleaved, backend="torch")
