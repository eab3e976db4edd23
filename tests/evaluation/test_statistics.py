"""Intervals."""

from __future__ import annotations

import pytest

from scaled_rope.evaluation.statistics import wilson_interval


def test_wilson_interval() -> None:
    # Published values for 8 of 10 and the closed form z²/(n+z²) for 0 of n.
    assert wilson_interval(8, 10) == pytest.approx([0.4902, 0.9433], abs=1e-4)
    assert wilson_interval(0, 10) == pytest.approx([0.0, 3.8415 / 13.8415], abs=1e-4)
    assert wilson_interval(10, 10) == pytest.approx([10 / 13.8415, 1.0], abs=1e-4)
