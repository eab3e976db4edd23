"""Shares of right answers, differences between models on the same questions, and their confidence intervals."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from scaled_rope.results import Row

PASSED = 0.8
"""The least accuracy at which the paper's table 5 counts a context length as passed."""
T95 = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262, 10: 2.228}
"""Two-sided 95 % points of Student's t, by degrees of freedom."""


def wilson_interval(right: int, n: int) -> list[float]:
    """The 95 % score interval of a share (Wilson 1927); unlike the normal one it is sensible at 0 and 1."""
    z, share = 1.959964, right / n  # z: the 97.5th percentile of the normal distribution
    centre, width = share + z * z / (2 * n), z * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    low, high = [(centre + side * width) / (1 + z * z / n) for side in (-1, 1)]
    return [max(0.0, round(low, 4)), min(1.0, round(high, 4))]


def tally(outcomes: Sequence[bool]) -> Row:
    """A row's fields for the number and share of right answers."""
    n, right = len(outcomes), sum(outcomes)
    return {"n": n, "right": right, "accuracy": right / n, "interval": wilson_interval(right, n)}


def format_share(row: Row) -> str:
    """Format a row's share of right answers: "8/10, 80.0 % (49.0 to 94.3)"."""
    low, high = (100 * bound for bound in row["interval"])
    return f"{row['right']}/{row['n']}, {100 * row['accuracy']:.1f} % ({low:.1f} to {high:.1f})"


def mean_interval(values: Sequence[float]) -> tuple[float, float] | None:
    """The 95 % interval of the mean of a few values that are taken as normal: mean ± t·sd/√n.

    Returns None for fewer than 2 values, and for more than `T95` is for, where a bootstrap is better.
    """
    if len(values) - 1 not in T95:
        return None
    mean, half = statistics.fmean(values), T95[len(values) - 1] * statistics.stdev(values) / math.sqrt(len(values))
    return mean - half, mean + half


_RESAMPLES = 2000
_SEED = 42


@dataclass(frozen=True)
class Difference:
    """How far a score is above another on the same questions."""

    value: float
    """The mean difference, on the scale of the scores."""
    interval: tuple[float, float] | None
    """95 %, over resampled questions; None where a task has one question only."""
    questions: int

    @property
    def shown(self) -> bool:
        """Whether the whole interval is on one side of 0."""
        return self.interval is not None and (self.interval[0] > 0 or self.interval[1] < 0)

    @property
    def points(self) -> str:
        """Of shares, in percentage points with the interval: "−0.8 points [−1.9, +0.3]"."""
        text = f"{_points(self.value)} points"
        return text if self.interval is None else f"{text} [{', '.join(map(_points, self.interval))}]"


def _points(share: float) -> str:
    return f"{100 * share:+.1f}".replace("-", "−").replace("+0.0", "0.0").replace("−0.0", "0.0")


def paired_difference(mine: Mapping[str, Sequence[float]], others: Mapping[str, Sequence[float]]) -> Difference:
    """The mean difference of two models over the same questions, with a paired bootstrap.

    Each resample draws questions, and with each the outcomes of both models, within each task; the value is the plain
    mean over tasks of each task's mean, as that of a benchmark of several tasks is.

    Args:
        mine, others: task -> outcome of each question, in the same order.

    Raises:
        ValueError: other tasks, or other numbers of questions.
    """
    if mine.keys() != others.keys() or not mine:
        raise ValueError(f"outcomes of other tasks: {', '.join(mine)} and {', '.join(others)}")
    if not all(len(mine[task]) == len(others[task]) > 0 for task in mine):
        raise ValueError("outcomes of other numbers of questions")
    gains = [np.subtract(mine[task], others[task], dtype=np.float64) for task in mine]
    value = float(np.mean([gain.mean() for gain in gains]))
    interval = None
    if all(len(gain) > 1 for gain in gains):
        rng = np.random.default_rng(_SEED)
        total = np.zeros(_RESAMPLES)
        for gain in gains:
            total += rng.multinomial(len(gain), [1 / len(gain)] * len(gain), size=_RESAMPLES) @ gain / len(gain)
        low, high = np.percentile(total / len(gains), [2.5, 97.5])
        interval = float(low), float(high)
    return Difference(value, interval, sum(map(len, gains)))
