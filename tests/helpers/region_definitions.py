"""Attention in regions by its definition, with all T x T scores in float64."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from scaled_rope import RopeScaling
from scaled_rope.attention.regions import Regions, dpe, dual_chunk, leaky_rerope, rerope, self_extend
from scaled_rope.scaling.temperature import compute_temperature

L = 24
INV_FREQ = [100.0 ** (-d / 4) for d in range(4)]
Distance = Callable[[int, int], float | list[float]]
"""(i, j) -> the distance at which a query at i sees a key at j, or one for each of the pairs of dimensions."""


def rerope_distance(w: int) -> Distance:
    return lambda i, j: min(i - j, w)


def leaky_distance(w: int, k: float) -> Distance:
    return lambda i, j: i - j if i - j < w else w + (i - j - w) / k


def self_extend_distance(g: int, w: int) -> Distance:
    return lambda i, j: i - j if i - j < w else i // g - j // g + (w - w // g)


def dual_chunk_distance(s: int, length: int) -> Distance:
    def distance(i: int, j: int) -> float:
        apart = i // s - j // s
        at = i % s if apart == 0 else min(s + i % s, length - 1) if apart == 1 else length - 1
        return at - j % s

    return distance


def dpe_distance(groups: list[int], w: int) -> Distance:
    shared = [groups[d * len(groups) // len(INV_FREQ)] for d in range(len(INV_FREQ))]

    def distance(i: int, j: int) -> list[float]:
        return [i - j if i - j < w else i // g - j // g + (w - w // g) for g in shared]

    return distance


def oracle(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    distance: Distance,
    scale: float,
    log_length: int | None = None,
    pairs: str = "halves",
) -> Tensor:
    """One score at a time: the real part of q times the conjugate of k, turned by the angle of their distance."""
    batch, heads, queries, dim = q.shape
    length, groups = k.shape[2], heads // k.shape[1]
    rotated = 2 * len(INV_FREQ)

    def complex_pairs(x: Tensor) -> Tensor:
        return torch.complex(x[..., : rotated // 2], x[..., rotated // 2 : rotated])

    q, k, v = (x.double() for x in (q, k, v))
    k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    apart = torch.tensor(
        [[distance(i, min(i, j)) for j in range(length)] for i in range(length - queries, length)]
    ).double()
    apart = apart if apart.dim() == 3 else apart[..., None]
    turn = torch.polar(torch.ones(1).double(), apart * torch.tensor(INV_FREQ).double())
    pair_scores = torch.einsum("bhqd,bhkd,qkd->bhqk", complex_pairs(q), complex_pairs(k).conj(), turn).real
    rest = torch.einsum("bhqd,bhkd->bhqk", q[..., rotated:], k[..., rotated:])
    scores = scale * (pair_scores + rest)
    if log_length is not None:
        factors = [max(1.0, math.log(i + 1) / math.log(log_length)) for i in range(length - queries, length)]
        scores = scores * torch.tensor(factors).double()[:, None]
    hidden = torch.ones(queries, length).triu(length - queries + 1).bool()
    return scores.masked_fill(hidden, -torch.inf).softmax(-1) @ v


def with_log(regions: Regions) -> Regions:
    """Regions under the temperature "log" for L tokens."""
    scaling = RopeScaling("default", original_max_position_embeddings=L, attention_temperature="log")
    return replace(regions, temperature=partial(compute_temperature, scaling))


DPE = [([3, 3, 3, 3], 8), ([4, 1, 2, 8], 5), ([1, 6], 17), ([5, 2, 7], 1)]
METHODS: list[tuple[str, Regions, Distance, int | None]] = [
    *((f"rerope-{w}", rerope(w), rerope_distance(w), None) for w in (1, 5, 16, 23)),
    ("rerope-7-logn", with_log(rerope(7)), rerope_distance(7), L),
    *((f"leaky-{w}-{k}", leaky_rerope(w, k), leaky_distance(w, k), None) for w, k in ((1, 2.5), (7, 4), (16, 16))),
    ("leaky-7-logn", with_log(leaky_rerope(7, 4)), leaky_distance(7, 4), L),
    *((f"self-{g}-{w}", self_extend(g, w), self_extend_distance(g, w), None) for g, w in ((2, 1), (3, 8), (8, 17))),
    *((f"dpe-{'-'.join(map(str, g))}-{w}", dpe(g, w), dpe_distance(g, w), None) for g, w in DPE),
    *((f"chunk-{s}", dual_chunk(s, L), dual_chunk_distance(s, L), None) for s in (1, 5, 12, 18, 23)),
]


def heads(length: int, queries: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v of 2 rows, 6 heads of which 3 share keys, head_dim 10 of which 8 rotate; k and v not contiguous."""
    generator = torch.Generator().manual_seed(length)
    q = torch.randn(2, 6, queries, 10, generator=generator, dtype=dtype)
    k, v = (torch.randn(2, length, 2, 10, generator=generator, dtype=dtype).transpose(1, 2) for _ in range(2))
    return q, k, v


# Two rotations and a product of 10 numbers of some 3 round scores by 5e-6; outputs are off by that share of some 4.
NOISE = 2e-5
