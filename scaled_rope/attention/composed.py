"""Attention in regions, composed of plain attention calls to kernels that return the log-sum-exp of their scores.

Every region of `Regions` can be cut into squares of which the lower triangle is seen, and rectangles, so a kernel that
computes causal and full attention, such as FlashAttention, computes all of it. The results for the pieces of a query
are merged by their log-sum-exp, as in ring attention (arXiv 2310.01889). Nothing is as large as T x T. Gradients would
have to go through the log-sum-exp as well, which kernels don't offer: `region_attention` is for training.

Shapes as in `scaled_rope.attention.regions`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from einops import repeat
from torch import Tensor

from scaled_rope.attention.regions import Regions, length_factor, rotated

Attend = Callable[[Tensor, Tensor, Tensor, float, bool], tuple[Tensor, Tensor]]
"""(q [B, H, Q, D], k [B, H, N, D], v [B, H, N, V], scale, causal) -> attention [B, H, Q, V] and the log-sum-exp of its
scores, float32 [B, H, Q]. Causal: Q = N, and query t sees keys 0 to t."""


@dataclass(frozen=True)
class Piece:
    """The queries and keys of one attention call, by their places in the text, which may run backwards."""

    region: int
    queries: Tensor
    keys: Tensor
    causal: bool


def pieces(regions: Regions, length: int) -> Iterator[Piece]:
    """Cut what `length` queries see of as many keys into pieces, each pair in one; a query's first piece is causal."""
    at = torch.arange(length)
    if regions.period is not None:
        # All queries up to the next jump see the same keys of earlier regions.
        for start in range(0, length, regions.period):
            block = at[start : start + regions.period]
            yield Piece(0, block, block, causal=True)
            stop = start
            for index, region in enumerate(regions.near_to_far[1:], start=1):
                first = max(0, region.start(start))
                if first < stop:
                    yield Piece(index, block, at[first:stop], causal=False)
                stop = first
        return
    # Two regions, the nearer as wide as a window; the further one is a triangle.
    window = 1 - regions.near_to_far[0].start(0)
    for start in range(0, length, window):
        block = at[start : start + window]
        yield Piece(0, block, block, causal=True)
        if start and window > 1:
            # Of the window - 1 keys before the block, its first query sees all and each next one fewer from the left:
            # read backwards, that is a triangle, beside a rectangle where the text ends within the block.
            seen = at[start - window + 1 : start].flip(0)
            asking = block[: window - 1].flip(0)
            rest = len(seen) - len(asking)
            if rest:
                yield Piece(0, asking, seen[:rest], causal=False)
            yield Piece(0, asking, seen[rest:], causal=True)
    if length > window:
        yield Piece(1, at[window:], at[: length - window], causal=True)


def composed_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    inv_freq: Tensor,
    regions: Regions,
    scale: float,
    attend: Attend,
    *,
    interleaved: bool = False,
) -> Tensor:
    """`region_attention` of all T queries at once, without gradients, by calls of `attend`.

    Args:
        q: [B, H, T, D], not rotated.
        k, v: [B, K, T, D] and [B, K, T, V].

    Returns:
        [B, H, T, V] in the dtype of q. Rotation and merging are float32 (float64 for float64).
    """
    exact = torch.float64 if q.dtype == torch.float64 else torch.float32
    length, groups = q.shape[2], q.shape[1] // k.shape[1]
    inv_freq = inv_freq.to(q.device, exact)
    positions = torch.arange(length, device=q.device)
    queries = q.to(exact)
    if regions.log_length is not None:
        queries = queries * length_factor(positions, regions.log_length).to(exact)[:, None]
    v = repeat(v, "b k t v -> b (k group) t v", group=groups)
    turned = [
        (
            rotated(queries, region.query(positions), inv_freq, interleaved).to(q.dtype),
            repeat(
                rotated(k.to(exact), region.key(positions), inv_freq, interleaved).to(q.dtype),
                "b k t d -> b (k group) t d",
                group=groups,
            ),
        )
        for region in regions.near_to_far
    ]
    out = torch.zeros(*q.shape[:-1], v.shape[-1], dtype=exact, device=q.device)
    total = torch.full(q.shape[:-1], -torch.inf, dtype=exact, device=q.device)
    for piece in pieces(regions, length):
        asking, seen = piece.queries.to(q.device), piece.keys.to(q.device)
        region_q, region_k = turned[piece.region]
        part, lse = attend(region_q[:, :, asking], region_k[:, :, seen], v[:, :, seen], scale, piece.causal)
        # exp(lse) is the sum that the piece's softmax has divided by; pieces are weighted by their share of all of it.
        # The first piece of a query is causal and so sees a key: from then on its total is finite, and no weight NaN.
        before, lse = total[:, :, asking], lse.to(exact)
        merged = torch.logaddexp(before, lse)
        kept = out[:, :, asking] * (before - merged).exp()[..., None]
        out[:, :, asking] = kept + part.to(exact) * (lse - merged).exp()[..., None]
        total[:, :, asking] = merged
    return out.to(q.dtype)


def flash(q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool) -> tuple[Tensor, Tensor]:
    """PyTorch's own FlashAttention, on CUDA or a CPU, with the log-sum-exp that it keeps for its backward pass."""
    if q.device.type == "cpu":
        kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    else:
        kernel = torch.ops.aten._scaled_dot_product_flash_attention
    out, lse = kernel(q, k, v, 0.0, causal, scale=scale)[:2]
    return out, lse


def is_composable(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Whether `flash` can compute this attention on a GPU: whole texts of 16-bit numbers, no gradients."""
    return (
        q.is_cuda
        and q.dtype in (torch.bfloat16, torch.float16)
        and q.shape[2] == k.shape[2]
        and q.shape[-1] == v.shape[-1]
        and q.shape[-1] % 8 == 0
        and q.shape[-1] <= 256
        and not (torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v)))
        and torch.cuda.get_device_capability(q.device) >= (8, 0)
    )
