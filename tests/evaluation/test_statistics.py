"""Intervals."""

from __future__ import annotations

import numpy as np
import pytest

from scaled_rope.evaluation.statistics import paired_difference, ratio_interval, wilson_interval


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
    assert found.value == -0.5 and found.shown and found.interval is not None
    # Of b there are ten questions only. With one more each way its mean is −10/12 and its variance 1 − (10/12)².
    (low, high), error = found.interval, ((1 - (10 / 12) ** 2) / 12 + 2 / 92 / 92) ** 0.5 / 2
    assert (low + high) / 2 == pytest.approx(-10 / 24) and (high - low) / 2 == pytest.approx(2.262 * error)
    assert found.points == "−50.0 points [−59.8, −23.5]"
    assert paired_difference({"a": [1.0]}, {"a": [1.0]}).points == "0.0 points"
    others = {"b": [0.0, 0.0], "a": [1.0, 0.0]}  # in another order
    assert paired_difference({"a": [1.0, 1.0], "b": [0.0, 0.0]}, others).value == 0.25
    with pytest.raises(ValueError, match="other numbers of questions"):
        paired_difference({"a": [1.0]}, {"a": [1.0, 0.0]})
    with pytest.raises(ValueError, match="other tasks: a and b"):
        paired_difference({"a": [1.0]}, {"b": [1.0]})


@pytest.mark.parametrize(("n", "shown"), [(2, False), (5, False), (6, True), (11, True), (12, True), (50, True)])
def test_answers_that_are_all_alike_decide_nothing_when_they_are_few(n: int, shown: bool) -> None:
    """As the sign test has it: five of five against none are chance with p = 0.06, six of six with 0.03."""
    found = paired_difference({"a": [1.0] * n}, {"a": [0.0] * n})
    assert found.value == 1.0 and found.shown is shown and found.interval is not None and found.interval[1] <= 1.0
    same = paired_difference({"a": [1.0] * n}, {"a": [1.0] * n})
    assert same.value == 0.0 and not same.shown and same.interval is not None


@pytest.mark.parametrize(("n", "tasks"), [(2, 1), (3, 1), (5, 1), (11, 1), (2, 2), (3, 2), (5, 2)])
def test_losses_of_equal_models_are_told_apart_in_five_percent(n: int, tasks: int) -> None:
    rng, said = np.random.default_rng(n), 0
    for _ in range(400):
        base = {str(task): rng.normal(3.0, 0.6, n) for task in range(tasks)}
        other = {name: values + rng.normal(0, 0.05, n) for name, values in base.items()}
        said += paired_difference(other, base, shares=False).shown
    assert said / 400 < 0.085  # 400 draws have a standard error of 1.1 %


def test_a_ratio_needs_two_units_and_knows_what_is_not_finite() -> None:
    with pytest.raises(ValueError, match="1 units have no interval"):
        ratio_interval(np.ones(1), np.ones(1))
    low, high = ratio_interval(np.array([1.0, 3.0, 2.0]), np.array([1.0, 1.0, 1.0]))
    assert (low + high) / 2 == pytest.approx(2.0) and (high - low) / 2 == pytest.approx(4.303 * (1 / 3) ** 0.5)
    found = paired_difference({"a": [1.0, float("inf")]}, {"a": [1.0, float("inf")]}, shares=False)
    assert not found.shown
