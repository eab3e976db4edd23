"""Shares of right answers and their confidence intervals."""

from __future__ import annotations

import math
from collections.abc import Sequence

from scaled_rope.results import Row

PASSED = 0.8
"""The least accuracy at which the paper's table 5 counts a context length as passed."""


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
