"""Intervals."""

from __future__ import annotations

import pytest

from scaled_rope.evaluation.statistics import paired_difference, wilson_interval


def test_wilson_interval() -> None:
    # Published values for 8 of 10 and the closed form z²/(n+z²) for 0 of n.
    assert wilson_interval(8, 10) == pytest.approx([0.4902, 0.9433], abs=1e-4)
    assert wilson_interval(0, 10) == pytest.approx([0.0, 3.8415 / 13.8415], abs=1e-4)
    assert wilson_interval(10, 10) == pytest.approx([10 / 13.8415, 1.0], abs=1e-4)


def test_paired_difference() -> None:
    # 4 of 200 questions lost, 1 won: −1.5 points; pairs differ with variance (5/200 − 0.015²)/200.
    others = [1.0] * 100 + [0.0] * 100
    mine = [*others]
    mine[:4], mine[100] = [0.0] * 4, 1.0
    found = paired_difference({"a": mine}, {"a": others})
    assert (found.value, found.questions) == (pytest.approx(-0.015), 200) and found.interval is not None
    low, high = found.interval
    error = ((5 / 200 - 0.015**2) / 200) ** 0.5
    assert low == pytest.approx(-0.015 - 1.96 * error, abs=0.004) and high == pytest.approx(
        -0.015 + 1.96 * error, abs=0.004
    )
    assert found.points.startswith("−1.5 points [−") and not found.shown
    assert high - low < 2 * 1.96 * (2 * 0.25 / 200) ** 0.5 / 3  # that of two independent samples is far wider


def test_paired_difference_of_several_tasks_is_the_mean_over_tasks() -> None:
    found = paired_difference({"a": [1.0] * 90, "b": [0.0] * 10}, {"a": [1.0] * 90, "b": [1.0] * 10})
    assert found.value == -0.5 and found.interval == (-0.5, -0.5) and found.shown
    assert found.points == "−50.0 points [−50.0, −50.0]"
    assert paired_difference({"a": [1.0]}, {"a": [1.0]}).points == "0.0 points"
    others = {"b": [0.0, 0.0], "a": [1.0, 0.0]}  # in another order
    assert paired_difference({"a": [1.0, 1.0], "b": [0.0, 0.0]}, others).value == 0.25
    with pytest.raises(ValueError, match="other numbers of questions"):
        paired_difference({"a": [1.0]}, {"a": [1.0, 0.0]})
    with pytest.raises(ValueError, match="other tasks: a and b"):
        paired_difference({"a": [1.0]}, {"b": [1.0]})
