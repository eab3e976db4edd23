"""Attention in regions against its definition with all T x T scores in float64."""

from __future__ import annotations

import pytest
import torch

from scaled_rope.attention import regions as regions_module
from scaled_rope.attention.regions import Regions, dpe, region_attention, rerope, self_extend
from scaled_rope.training.traced_memory import LiveBytes
from tests.helpers.region_definitions import (
    INV_FREQ,
    METHODS,
    NOISE,
    Distance,
    L,
    heads,
    oracle,
    rerope_distance,
    with_log,
)


def plain_distance(i: int, j: int) -> float:
    return i - j


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


def test_dpe_with_all_groups_alike_is_self_extend() -> None:
    q, k, v = heads(61, 61)
    inv_freq = torch.tensor(INV_FREQ)
    found = region_attention(q, k, v, inv_freq, dpe([3, 3], 8), 0.4)
    assert torch.equal(found, region_attention(q, k, v, inv_freq, self_extend(3, 8), 0.4))


def test_gradients_are_those_of_the_definition() -> None:
    inv_freq = torch.tensor([100.0 ** (-d / 4) for d in range(4)])
    generator = torch.Generator().manual_seed(0)
    shapes = (1, 4, 37, 10), (1, 2, 37, 10), (1, 2, 37, 10)
    leaves = [torch.randn(shape, generator=generator, dtype=torch.float64, requires_grad=True) for shape in shapes]
    weights = torch.randn(1, 4, 37, 10, generator=generator, dtype=torch.float64)
    found = torch.autograd.grad(
        (region_attention(*leaves, inv_freq, with_log(rerope(7)), 0.4, block=8) * weights).sum(), leaves
    )
    wanted = torch.autograd.grad((oracle(*leaves, rerope_distance(7), 0.4, 24) * weights).sum(), leaves)
    for one, other in zip(found, wanted, strict=True):
        # Frequencies were given in float32 to both; all else is float64.
        assert (one - other).abs().max() < 1e-6


def test_memory_grows_with_the_length_and_not_its_square() -> None:
    def peak(length: int) -> int:
        q, k, v = (torch.randn(1, 2, length, 16) for _ in range(3))
        with LiveBytes() as live:
            region_attention(q, k, v, torch.ones(8), rerope(512), 0.25)
        return live.peak

    short, long = peak(2048), peak(8192)
    assert long < 4.2 * short  # linear: 4, quadratic: 16
    assert long < 8192 * 8192  # a quarter of one head's T x T scores


def test_products_of_rounded_factors_as_on_a_gpu() -> None:
    """Factors rounded to bfloat16, sums in float32: the result and the gradients, with and without them kept."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, h, 150, 16, generator=generator).bfloat16().float() for h in (4, 2, 2))
    inv_freq, regions = torch.tensor(INV_FREQ), rerope(24)
    given = torch.randn(1, 4, 150, 16, generator=generator)
    exact = [x.double().requires_grad_() for x in (q, k, v)]
    wanted = region_attention(*exact, inv_freq, regions, 0.25)
    gradients = torch.autograd.grad(wanted, exact, given.double())
    options = (inv_freq, regions, 0.25, False, 64)
    # 2^-9 of rotated queries and keys, of weights and values: a few times 1e-3 of the mean square.
    found = regions_module._attend(q, k, v, *options, False, torch.bfloat16)
    assert found.dtype == torch.float32 and _apart(found, wanted) < 6e-3
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    traced = regions_module._attend(*leaves, *options, True, torch.bfloat16)
    assert _apart(traced, wanted) < 6e-3
    for one, other in zip(torch.autograd.grad(traced, leaves, given), gradients, strict=True):
        assert one.dtype == torch.float32 and _apart(one, other) < 1.2e-2
    assert _apart(found, regions_module._attend(q, k, v, *options, False)) > 1e-4, "nothing was rounded"


def _apart(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((found - wanted).detach().double().norm() / wanted.double().norm())
