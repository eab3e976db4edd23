"""Methods that change attention, against their definitions with all T x T scores in float64."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks import attention_methods  # noqa: E402
from scaled_rope.attention.composed import Attend, composed_attention, flash, is_composable, pieces
from scaled_rope.attention.regions import Regions, dual_chunk, leaky_rerope, region_attention, rerope, self_extend
from scaled_rope.errors import ConfigError
from scaled_rope.results import read_rows

L = 24
INV_FREQ = [100.0 ** (-d / 4) for d in range(4)]
Distance = Callable[[int, int], float]


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


def plain_distance(i: int, j: int) -> float:
    return i - j


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
        [[distance(i, j) if j <= i else 0 for j in range(length)] for i in range(length - queries, length)]
    ).double()
    turn = torch.polar(torch.ones(1).double(), apart[..., None] * torch.tensor(INV_FREQ).double())
    pair_scores = torch.einsum("bhqd,bhkd,qkd->bhqk", complex_pairs(q), complex_pairs(k).conj(), turn).real
    rest = torch.einsum("bhqd,bhkd->bhqk", q[..., rotated:], k[..., rotated:])
    scores = scale * (pair_scores + rest)
    if log_length is not None:
        factors = [max(1.0, math.log(i + 1) / math.log(log_length)) for i in range(length - queries, length)]
        scores = scores * torch.tensor(factors).double()[:, None]
    hidden = torch.ones(queries, length).triu(length - queries + 1).bool()
    return scores.masked_fill(hidden, -torch.inf).softmax(-1) @ v


METHODS: list[tuple[str, Regions, Distance, int | None]] = [
    *((f"rerope-{w}", rerope(w), rerope_distance(w), None) for w in (1, 5, 16, 23)),
    ("rerope-7-logn", rerope(7, L), rerope_distance(7), L),
    *((f"leaky-{w}-{k}", leaky_rerope(w, k), leaky_distance(w, k), None) for w, k in ((1, 2.5), (7, 4), (16, 16))),
    ("leaky-7-logn", leaky_rerope(7, 4, L), leaky_distance(7, 4), L),
    *((f"self-{g}-{w}", self_extend(g, w), self_extend_distance(g, w), None) for g, w in ((2, 1), (3, 8), (8, 17))),
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


@pytest.mark.parametrize(("regions", "distance", "log_length"), [m[1:] for m in METHODS], ids=[m[0] for m in METHODS])
def test_equals_the_definition(regions: Regions, distance: Distance, log_length: int | None) -> None:
    inv_freq = torch.tensor(INV_FREQ)
    for length, queries in ((1, 1), (3, 3), (17, 17), (24, 24), (61, 61), (61, 1), (61, 20), (75, 75)):
        q, k, v = heads(length, queries)
        found = region_attention(q, k, v, inv_freq, regions, 0.4, block=8)
        wanted = oracle(q, k, v, distance, 0.4, log_length)
        assert (found - wanted).abs().max() < NOISE, (length, queries)


@pytest.mark.parametrize(("regions", "distance", "log_length"), [m[1:] for m in METHODS], ids=[m[0] for m in METHODS])
def test_is_plain_attention_where_the_definition_says_so(
    regions: Regions, distance: Distance, log_length: int | None
) -> None:
    longest = 1
    while all(distance(longest, j) == longest - j for j in range(longest + 1)) and longest < L:
        longest += 1  # positions 0 to longest - 1 are seen as they are
    for length in {1, longest}:
        q, k, v = heads(length, length)
        found = region_attention(q, k, v, torch.tensor(INV_FREQ), regions, 0.4)
        assert (found - oracle(q, k, v, plain_distance, 0.4)).abs().max() < NOISE
    q, k, v = heads(75, 75)
    beyond = region_attention(q, k, v, torch.tensor(INV_FREQ), regions, 0.4)
    assert (beyond - oracle(q, k, v, plain_distance, 0.4)).abs().max() > 1000 * NOISE


def plain(q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool) -> tuple[Tensor, Tensor]:
    """What a kernel is asked for, written down."""
    scores = scale * q @ k.mT
    if causal:
        assert q.shape[2] == k.shape[2]
        scores = scores.masked_fill(torch.ones(scores.shape[-2:]).triu(1).bool(), -torch.inf)
    return scores.softmax(-1) @ v, scores.logsumexp(-1)


@pytest.mark.parametrize("attend", [plain, flash])
@pytest.mark.parametrize(("regions", "distance", "log_length"), [m[1:] for m in METHODS], ids=[m[0] for m in METHODS])
def test_pieces_of_plain_attention_make_up_the_definition(
    regions: Regions, distance: Distance, log_length: int | None, attend: Attend
) -> None:
    for length in (1, 3, 17, 24, 61, 75):
        q, k, v = heads(length, length)
        wanted = oracle(q, k, v, distance, 0.4, log_length)
        found = composed_attention(q, k, v, torch.tensor(INV_FREQ), regions, 0.4, attend)
        assert (found - wanted).abs().max() < NOISE, length


@pytest.mark.parametrize(("regions", "distance", "log_length"), [m[1:] for m in METHODS], ids=[m[0] for m in METHODS])
def test_every_pair_is_in_one_piece(regions: Regions, distance: Distance, log_length: int | None) -> None:
    for length in (1, 2, 24, 61):
        count = torch.zeros(length, length, dtype=torch.long)
        for piece in pieces(regions, length):
            block = torch.ones(len(piece.queries), len(piece.keys), dtype=torch.long)
            count[piece.queries[:, None], piece.keys] += block.tril() if piece.causal else block
        assert torch.equal(count, torch.ones_like(count).tril())


def test_merging_in_bfloat16_loses_what_bfloat16_does() -> None:
    # Heads wide enough for a GPU's kernel; outputs of some 1 are rounded by up to 2^-9 each of three times.
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, h, 300, 64, generator=generator).bfloat16() for h in (4, 2, 2))
    for regions in (rerope(64), self_extend(4, 48), dual_chunk(96, 128)):
        wanted = region_attention(q.double(), k.double(), v.double(), torch.tensor(INV_FREQ), regions, 0.125)
        for attend in (plain, flash):
            found = composed_attention(q, k, v, torch.tensor(INV_FREQ), regions, 0.125, attend)
            assert found.dtype == torch.bfloat16 and (found.double() - wanted).abs().max() < 0.03
    assert not is_composable(q, k, v)  # on a CPU, regions are computed at once


def test_costs_are_written_as_rows(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = tmp_path / "rows.jsonl"
    assert attention_methods.main(["--lengths", "64,96", "--rounds", "1", "--output", str(rows)]) == 0
    found = [(row["dtype"], row["queries"], row["length"], row["variant"]) for row in read_rows(rows)]
    # sdpa and four methods in two dtypes for each of three shapes, and blockwise attention where it can be.
    assert len(set(found)) == len(found) == 2 * 3 * 5 + 2
    assert all(row["seconds"] > 0 and row["provenance"]["command"] for row in read_rows(rows))
    with pytest.raises(ConfigError, match="lengths '64,x'"):
        attention_methods.main(["--lengths", "64,x"])
