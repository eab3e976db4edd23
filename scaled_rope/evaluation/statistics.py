"""Shares of right answers, differences between models on the same questions, and their confidence intervals."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from scaled_rope.results import Row

PASSED = 0.8
"""The least accuracy at which the paper's table 5 counts a context length as passed."""
T95 = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262, 10: 2.228}
"""Two-sided 95 % points of Student's t, by degrees of freedom; with more of them resampling does as well."""

Values = npt.NDArray[np.float64]


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
SEED = 0
"""Seed of the resamples of a perplexity's units."""
_SEED = 42


def ratio_interval(above: Values, below: Values) -> tuple[float, float]:
    """The 95 % interval of Σ above / Σ below over units that were drawn at random, as documents: two arrays [units].

    Percentiles over resamples of the units, drawn with replacement. Of few units, which those would make far too sure
    (of three in a quarter of the cases), Student's interval of the ratio, by its residuals above - ratio · below.

    Raises:
        ValueError: fewer than two units.
    """
    count = len(above)
    if count < 2:
        raise ValueError(f"{count} units have no interval")
    if count - 1 in T95:
        ratio = above.sum() / below.sum()
        spread = math.sqrt(count / (count - 1) * ((above - ratio * below) ** 2).sum()) / abs(below.sum())
        return float(ratio - T95[count - 1] * spread), float(ratio + T95[count - 1] * spread)
    draws = np.random.default_rng(SEED).multinomial(count, [1 / count] * count, size=_RESAMPLES)
    low, high = np.percentile((draws @ above) / (draws @ below), [2.5, 97.5])
    return float(low), float(high)


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


def paired_difference(
    mine: Mapping[str, Sequence[float]], others: Mapping[str, Sequence[float]], shares: bool = True
) -> Difference:
    """The mean difference of two models over the same questions, with its paired interval.

    The value is the plain mean over tasks of each task's mean, as that of a benchmark of several tasks is. Resamples
    draw questions, and with each the outcomes of both models, within each task. Of few questions (`T95`) they would
    make far too sure; those get Student's interval. Outcomes of right and wrong can all be alike by chance, so that
    then each task is given one question more that one model alone gets right, and one that the other does (Bonett and
    Price 2012): five of five against none of five are not shown to differ, as by the sign test, and six of six are.

    Args:
        mine, others: task -> outcome of each question, in the same order.
        shares: whether outcomes are from 0 to 1, as right answers and probabilities; else they are losses.

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
        interval = _interval_of_few(gains, shares)
        if interval is None:
            rng = np.random.default_rng(_SEED)
            total = np.zeros(_RESAMPLES)
            for gain in gains:
                total += rng.multinomial(len(gain), [1 / len(gain)] * len(gain), size=_RESAMPLES) @ gain / len(gain)
            low, high = np.percentile(total / len(gains), [2.5, 97.5])
            interval = float(low), float(high)
    return Difference(value, interval, sum(map(len, gains)))


def _interval_of_few(gains: Sequence[Values], shares: bool) -> tuple[float, float] | None:
    """Student's interval of the mean over tasks; None where the tasks have more questions than `T95` is for."""
    counts = [len(gain) for gain in gains]
    if shares:
        gains = [np.append(gain, (1.0, -1.0)) for gain in gains]
        variances = [float(gain.var()) / len(gain) for gain in gains]
    else:
        variances = [float(gain.var(ddof=1)) / len(gain) for gain in gains]
    total = sum(variances)
    if not math.isfinite(total):
        return None
    # Degrees of freedom as Welch and Satterthwaite give them; at least those of the smallest task.
    parts = sum(variance**2 / (count - 1) for variance, count in zip(variances, counts, strict=True))
    freedom = math.floor(total**2 / parts + 1e-9) if parts else min(counts) - 1
    if freedom not in T95:
        return None
    mean = float(np.mean([gain.mean() for gain in gains]))
    half = T95[freedom] * math.sqrt(total) / len(gains)
    low, high = mean - half, mean + half
    return (max(-1.0, low), min(1.0, high)) if shares else (low, high)
