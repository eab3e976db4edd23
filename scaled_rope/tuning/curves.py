"""Curves over the attention factor: minima, fits and their intervals."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from scaled_rope.scaling.record import RopeScaling

Floats = npt.NDArray[np.float64]
LEVEL = 0.9
"""Coverage of the bootstrap intervals."""
DRAWS = 1000
"""Bootstrap samples: the ends of a 90 % interval then rest on 50 of them each."""


# ------------------------------------------------------------------------------------------------------ pure functions


@dataclass(frozen=True)
class Minimum:
    """The lowest point of a curve on a grid."""

    x: float
    y: float
    """The parabola's value; at an edge, the measured one."""
    edge: str | None = None
    """"lower" or "upper" when the lowest point is the grid's first or last: then x is a bound and not an optimum."""


def parabola_minimum(x: Sequence[float] | Floats, y: Sequence[float] | Floats) -> Minimum:
    """The minimum of a curve sampled at ascending x: the vertex of the parabola through the lowest point and its
    neighbours, which enclose it. (The three lowest points need not: on a steep side they can all lie on the other.)
    """
    x, y = np.asarray(x, dtype=np.float64), np.asarray(y, dtype=np.float64)
    at = int(np.argmin(y))
    if at == 0 or at == len(x) - 1:
        return Minimum(float(x[at]), float(y[at]), "lower" if at == 0 else "upper")
    left, right = x[at] - x[at - 1], x[at + 1] - x[at]
    fall, rise = (y[at] - y[at - 1]) / left, (y[at + 1] - y[at]) / right  # fall <= 0 <= rise
    curvature = (rise - fall) / (left + right)
    if curvature <= 0:  # three equal values
        return Minimum(float(x[at]), float(y[at]))
    slope = (fall * right + rise * left) / (left + right)  # of the parabola, at x[at]
    shift = -slope / (2 * curvature)
    return Minimum(float(x[at] + shift), float(y[at] + shift * slope / 2))


def interpolate(x: Sequence[float] | Floats, y: Sequence[float] | Floats, at: float) -> float | None:
    """The curve's value at `at` from the parabola through the three nearest grid points; None outside the grid."""
    x, y = np.asarray(x, dtype=np.float64), np.asarray(y, dtype=np.float64)
    if not x[0] <= at <= x[-1]:
        return None
    near = np.argsort(np.abs(x - at), kind="stable")[:3]
    weights = [np.prod([(at - x[j]) / (x[i] - x[j]) for j in near if j != i]) for i in near]  # Lagrange
    return float(np.dot(weights, y[near]))


@dataclass(frozen=True)
class Fit:
    """√(1/t) = a·ln s + intercept, fitted by least squares."""

    a: float
    intercept: float
    residual: float
    """Root mean square error of the line, in units of √(1/t)."""
    factors: tuple[float, ...]
    """The factors that were fitted."""

    @property
    def mscale(self) -> float:
        """The `mscale` with which YaRN follows this line at every factor; 1 for the paper's line."""
        return self.a / paper_slope()


def fit_line(best: Mapping[float, float], free: bool = False) -> Fit | None:
    """Fit a line to `best` (factor s: √(1/t)).

    Args:
        free: whether the intercept is free as well; otherwise it is 1, because YaRN is to do nothing at s = 1.

    None when there are too few factors: s = 1 says nothing about a line through 1, and a free line passes through any
    two points exactly.
    """
    points = {factor: value for factor, value in best.items() if free or factor > 1}
    if len(points) < (3 if free else 1):
        return None
    logs, values = np.log(list(points)), np.asarray(list(points.values()))
    if free:
        a, intercept = (float(number) for number in np.polyfit(logs, values, 1))
    else:
        a, intercept = float(np.dot(logs, values - 1) / np.dot(logs, logs)), 1.0
    return Fit(a, intercept, float(np.sqrt(np.mean((values - a * logs - intercept) ** 2))), tuple(points))


def paper_attention_factor(factor: float) -> float:
    """√(1/t) of plain YaRN for factor s, equation 22; it depends on s alone."""
    return RopeScaling("yarn", factor, original_max_position_embeddings=4096).static_attention_factor


def paper_slope() -> float:
    """The slope a of the paper's line, 0.1."""
    return round(paper_attention_factor(math.e) - 1, 12)


def segment_bounds(length: int, segment: int) -> list[tuple[int, int]]:
    """The segments of a window of `length` tokens as (first position, end); the last one may be shorter."""
    return [(start, min(start + segment, length)) for start in range(0, length, segment)]


def segment_sums(nll: npt.NDArray[Any], segment: int) -> tuple[list[float], list[int]]:
    """Nats and targets of each segment from the nats of tokens 1 … n-1 of a window of n.

    Token 0 is no target, so the first segment has one target less than the others. Sums are rounded to 1e-4 nats.
    """
    bounds = segment_bounds(len(nll) + 1, segment)
    pieces = [nll[max(start - 1, 0) : end - 1].astype(np.float64) for start, end in bounds]
    return [round(float(piece.sum()), 4) for piece in pieces], [len(piece) for piece in pieces]


def segment_changes(curves: Floats, baseline: int) -> Floats:
    """Relative change of each segment's perplexity from that at grid point `baseline`.

    curves: mean nats per token [grid, segments]. Returns [grid, segments]; -0.1 is a perplexity that is 10 % lower.
    """
    return np.asarray(np.exp(curves - curves[baseline]) - 1)


def best_counts(curves: Floats) -> npt.NDArray[np.int64]:
    """Count the windows for which each grid point is best, per segment.

    curves: mean nats per token [grid, windows, segments]. Returns [segments, grid]; of equal points the first counts.
    """
    best = curves.argmin(axis=0)
    return np.stack([np.bincount(column, minlength=len(curves)) for column in best.T])


def resample(windows: int, seed: int) -> npt.NDArray[np.int64]:
    """Bootstrap samples of windows, [DRAWS, windows], drawn with replacement."""
    return np.random.default_rng(seed).integers(0, windows, (DRAWS, windows))


def bootstrap_minima(grid: Sequence[float], curves: Floats, samples: npt.NDArray[np.int64]) -> list[Minimum]:
    """The minimum of the mean curve of each bootstrap sample; curves: [grid, windows]."""
    return [parabola_minimum(grid, curves[:, sample].mean(axis=1)) for sample in samples]


def interval(values: Sequence[float]) -> tuple[float, float]:
    """The central range that contains the share `LEVEL` of a sample."""
    low, high = np.quantile(values, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)


@dataclass(frozen=True)
class Tuned:
    """The result of the search for one factor."""

    factor: float
    grid: tuple[float, ...]
    means: Floats
    """Nats per token [grid, windows, segments]."""
    curve: Floats
    """The same over all windows and targets, [grid]: the curve that is minimised."""
    per_window: Floats
    """The same for each window, [grid, windows]."""
    minimum: Minimum
    scaling: RopeScaling
    """The scaling to reuse, √(1/t) rounded to four decimals."""
    ramps: tuple[tuple[float, float, float], ...]
    """(beta_fast, beta_slow, nats per token) of every ramp that was tried; empty without such a search."""

    @property
    def lengths(self) -> tuple[int, int]:
        """Tokens of a window and of a segment."""
        window, segment = self.scaling.max_position_embeddings, self.scaling.original_max_position_embeddings
        assert window is not None and segment is not None  # "yarn" needs the original length
        return window, segment


# ------------------------------------------------------------------------------------------------------------- figures


BLUE, ORANGE, GREY = "#0072b2", "#d55e00", "#8a8a8a"
