"""Curves over the attention factor, on shapes with known answers."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from scaled_rope.tuning import curves
from tests.helpers.tuning import GRID


@given(
    vertex=st.floats(1.06, 1.44),
    curvature=st.floats(0.1, 100),
    steps=st.lists(st.floats(0.01, 0.2), min_size=4, max_size=12),
)
def test_the_vertex_of_a_parabola_is_found_on_any_grid(vertex: float, curvature: float, steps: list[float]) -> None:
    grid = np.cumsum([0.9, *steps])
    curve = 3 + curvature * (grid - vertex) ** 2
    found = curves.parabola_minimum(grid, curve)
    lowest = int(np.argmin(curve))
    if 0 < lowest < len(grid) - 1:
        # Differences of the curve are at least 1e-5 here and carry rounding of about 1e-15.
        assert found.edge is None and found.x == pytest.approx(vertex, abs=1e-6)
        assert found.y == pytest.approx(3, abs=1e-9)
    else:
        assert found == curves.Minimum(grid[lowest], curve[lowest], "lower" if lowest == 0 else "upper")


@given(st.lists(st.floats(0, 10), min_size=3, max_size=8))
def test_the_minimum_lies_between_the_neighbours_of_the_lowest_point(curve: list[float]) -> None:
    found = curves.parabola_minimum(range(len(curve)), curve)
    lowest = int(np.argmin(curve))
    # Within half a step: beyond it a neighbour would be lower.
    assert abs(found.x - lowest) <= 0.5 and found.y <= curve[lowest]


def test_interpolation_is_exact_on_parabolas_and_stays_inside_the_grid() -> None:
    curve = [2 + 3 * (x - 1.17) ** 2 for x in GRID]
    assert curves.interpolate(GRID, curve, 1.0693) == pytest.approx(2 + 3 * (1.0693 - 1.17) ** 2, abs=1e-12)
    assert curves.interpolate(GRID, curve, 1.3) == pytest.approx(curve[6], abs=1e-12)
    assert curves.interpolate(GRID, curve, 0.999) is None and curves.interpolate(GRID, curve, 1.501) is None


def test_the_paper_s_line_is_recovered() -> None:
    assert curves.paper_slope() == 0.1
    fit = curves.fit_line({s: curves.paper_attention_factor(s) for s in (1, 2, 4, 8, 16)})
    assert fit is not None and fit.factors == (2, 4, 8, 16) and fit.intercept == 1
    assert fit.a == pytest.approx(0.1, abs=1e-12) and fit.residual < 1e-12
    assert fit.mscale == pytest.approx(1, abs=1e-11)


def test_lines_are_least_squares() -> None:
    best = {1.0: 0.97, 2.0: 1.05, 4.0: 1.2, 8.0: 1.18}
    logs, values = np.log([2, 4, 8]), np.asarray([1.05, 1.2, 1.18])
    expected = np.linalg.lstsq(logs[:, None], values - 1, rcond=None)[0][0]
    fit, free = curves.fit_line(best), curves.fit_line(best, free=True)
    assert fit is not None and free is not None
    assert fit.a == pytest.approx(expected, abs=1e-12)
    assert fit.residual == pytest.approx(np.sqrt(np.mean((values - 1 - expected * logs) ** 2)), abs=1e-12)
    design = np.stack([np.log(list(best)), np.ones(4)], axis=1)
    (slope, intercept), *_ = np.linalg.lstsq(design, np.asarray(list(best.values())), rcond=None)
    assert (free.a, free.intercept) == (pytest.approx(slope, abs=1e-12), pytest.approx(intercept, abs=1e-12))
    assert free.factors == (1, 2, 4, 8)
    assert curves.fit_line({1.0: 1.2}) is None and curves.fit_line({2.0: 1.1, 4.0: 1.2}, free=True) is None


@given(n=st.integers(2, 70), segment=st.integers(1, 40))
def test_segments_hold_every_target_once(n: int, segment: int) -> None:
    nll = np.random.default_rng(n).random(n - 1).astype(np.float32)
    sums, counts = curves.segment_sums(nll, segment)
    for index, (total, count) in enumerate(zip(sums, counts, strict=True)):
        mine = [float(nll[token - 1]) for token in range(1, n) if token // segment == index]
        assert count == len(mine) and total == pytest.approx(sum(mine), abs=1e-4)  # sums are rounded to 1e-4
    assert sum(counts) == n - 1


def test_segment_statistics() -> None:
    perplexities = np.asarray([[10.0, 20.0], [9.0, 22.0], [12.0, 20.0]])
    changes = curves.segment_changes(np.log(perplexities), baseline=0)
    np.testing.assert_allclose(changes, [[0, 0], [-0.1, 0.1], [0.2, 0]], atol=1e-12)
    # [grid, windows, segments]: the first window is best at point 1 and 2, the second at 1 in both segments.
    nlls = np.asarray([[[3, 3], [3, 3]], [[1, 2], [1, 1]], [[2, 1], [2, 3]]], dtype=np.float64)
    np.testing.assert_array_equal(curves.best_counts(nlls), [[0, 2, 0], [0, 1, 1]])
