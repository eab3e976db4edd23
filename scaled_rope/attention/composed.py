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
from torch import Tensor

from scaled_rope.attention.regions import Regions, rotated

Attend = Callable[[Tensor, Tensor, Tensor, float, bool], tuple[Tensor, Tensor]]
"""(q [B, H, Q, D], k [B, K, N, D], v [B, K, N, V], scale, causal) -> attention [B, H, Q, V] and the log-sum-exp of its
scores, float32 [B, H, Q]. K divides H. Causal: Q = N, and query t sees keys 0 to t."""


@dataclass(frozen=True)
class Span:
    """Neighbouring places in a text, from `start` up to `stop`, read backwards or not."""

    start: int
    stop: int
    backwards: bool = False

    def __len__(self) -> int:
        return self.stop - self.start

    def of(self, x: Tensor) -> Tensor:
        """These places of x [B, H, T, ...]: a view, or a copy backwards."""
        return self.turned(x[:, :, self.start : self.stop])

    def turned(self, x: Tensor) -> Tensor:
        return x.flip(2) if self.backwards else x


@dataclass(frozen=True)
class Piece:
    """The queries and keys of one attention call."""

    region: int
    queries: Span
    keys: Span
    causal: bool


def pieces(regions: Regions, length: int) -> Iterator[Piece]:
    """Cut what `length` queries see of as many keys into pieces, each pair in one; a query's first piece is causal."""
    if regions.period is not None:
        # All queries up to the next jump see the same keys of earlier regions.
        for start in range(0, length, regions.period):
            block = Span(start, min(start + regions.period, length))
            yield Piece(0, block, block, causal=True)
            stop = start
            for index, region in enumerate(regions.near_to_far[1:], start=1):
                first = max(0, region.start(start))
                if first < stop:
                    yield Piece(index, block, Span(first, stop), causal=False)
                stop = first
        return
    # Two regions, the nearer as wide as a window; the further one is a triangle.
    window = 1 - regions.near_to_far[0].start(0)
    for start in range(0, length, window):
        block = Span(start, min(start + window, length))
        yield Piece(0, block, block, causal=True)
        if start and window > 1:
            # Of the window - 1 keys before the block, its first query sees all and each next one fewer from the left:
            # read backwards, that is a triangle, beside a rectangle where the text ends within the block.
            count = min(window - 1, len(block))
            first, edge = start - window + 1, start - window + 1 + count
            if edge < start:
                yield Piece(0, Span(start, start + count), Span(edge, start), causal=False)
            yield Piece(0, Span(start, start + count, backwards=True), Span(first, edge, backwards=True), causal=True)
    if length > window:
        yield Piece(1, Span(window, length), Span(0, length - window), causal=True)


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
    length = q.shape[2]
    inv_freq = inv_freq.to(q.device, exact)
    positions = torch.arange(length, device=q.device)
    queries = q.to(exact)
    if regions.temperature is not None:
        queries = queries * regions.temperature(positions).to(exact)[:, None]
    turned = [
        (
            rotated(queries, region.query(positions), inv_freq, interleaved).to(q.dtype),
            rotated(k.to(exact), region.key(positions), inv_freq, interleaved).to(q.dtype),
        )
        for region in regions.near_to_far
    ]
    out = torch.zeros(*q.shape[:-1], v.shape[-1], dtype=exact, device=q.device)
    total = torch.full(q.shape[:-1], -torch.inf, dtype=exact, device=q.device)
    for piece in pieces(regions, length):
        region_q, region_k = turned[piece.region]
        asking, seen = piece.queries, piece.keys
        part, lse = attend(asking.of(region_q), seen.of(region_k), seen.of(v), scale, piece.causal)
        part, lse = asking.turned(part).to(exact), asking.turned(lse).to(exact)
        # exp(lse) is the sum that the piece's softmax has divided by; pieces are weighted by their share of all of it.
        # The first piece of a query is causal and so sees a key: from then on its total is finite, and no weight NaN.
        before, so_far = (x[:, :, asking.start : asking.stop] for x in (total, out))
        merged = torch.logaddexp(before, lse)
        so_far.mul_((before - merged).exp()[..., None]).addcmul_(part, (lse - merged).exp()[..., None])
        before.copy_(merged)
    return out.to(q.dtype)


def flash(q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool) -> tuple[Tensor, Tensor]:
    """PyTorch's own FlashAttention, on CUDA or a CPU, with the log-sum-exp that it keeps for its backward pass.

    It takes fewer key heads than query heads as they are. Keys and values need not be contiguous.
    """
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
