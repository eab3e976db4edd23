"""Effective lengths whose values are known."""

from __future__ import annotations

import numpy as np
import pytest

from scaled_rope.errors import ConfigError
from scaled_rope.evaluation.effective_length import effective_length


def samples(right: int, n: int = 10) -> list[float]:
    return [1.0] * right + [0.0] * (n - right)


def test_the_longest_length_that_keeps_nine_tenths() -> None:
    # Means at 64: (1.0 + 0.6) / 2 = 0.8, of which 0.72 is to be kept; 128: 0.75, 256: 0.72 (just), 512: 0.71.
    outcomes = {
        64: {"a": samples(10), "b": samples(6)},
        128: {"a": samples(9), "b": samples(6)},
        256: {"a": samples(100, 100), "b": samples(44, 100)},
        512: {"a": samples(100, 100), "b": samples(42, 100)},
        32: {"a": samples(1), "b": samples(1)},
    }
    found = effective_length(outcomes, 64)
    assert found is not None and found.length == 256 and found.tasks == ("a", "b")
    assert found.scores == pytest.approx({32: 0.1, 64: 0.8, 128: 0.75, 256: 0.72, 512: 0.71})
    assert found.kept == pytest.approx({64: 1.0, 128: 0.9375, 256: 0.9, 512: 0.8875})
    assert found.measured_to == 512 and found.incomplete == {}
    assert found.above(70.0) is None  # 32 tokens are below
    assert effective_length({one: outcomes[one] for one in (64, 128, 256, 512)}, 64).above(71.5) == 256  # type: ignore[union-attr]


def test_a_length_that_fails_ends_it() -> None:
    found = effective_length({64: {"a": samples(10)}, 128: {"a": samples(5)}, 256: {"a": samples(10)}}, 64)
    assert found is not None and found.length == 64 and found.interval == (64, 64)


def test_only_the_same_tasks_are_compared() -> None:
    outcomes = {
        64: {"a": samples(10), "b": samples(10)},
        128: {"a": samples(10), "c": samples(10)},
        256: {"a": samples(10), "b": samples(9), "c": samples(0)},
    }
    found = effective_length(outcomes, 64)
    assert found is not None and found.length == 256
    assert found.incomplete == {128: ("b",)} and found.scores == {64: 1.0, 256: 0.95}


def test_nothing_to_compare_with() -> None:
    assert effective_length({128: {"a": samples(10)}}, 64) is None and effective_length({}, 64) is None
    found = effective_length({64: {"a": samples(0)}, 128: {"a": samples(10)}}, 64)
    assert found is not None and (found.length, found.interval, found.kept) == (None, None, {})
    with pytest.raises(ConfigError, match="task 'a' at 64 tokens: there are no samples"):
        effective_length({64: {"a": []}}, 64)
    alone = effective_length({64: {"a": [1.0]}, 128: {"a": [1.0]}}, 64)
    assert alone is not None and alone.length == 128 and alone.interval is None and alone.intervals == {}


def test_intervals() -> None:
    """The standard error of a ratio of independent means, by the delta method."""
    rng = np.random.default_rng(1)
    outcomes = {
        length: {task: (rng.random(400) < share).astype(float).tolist() for task, share in (("a", 0.9), ("b", 0.5))}
        for length in (64, 128)
    }
    found = effective_length(outcomes, 64)
    assert found is not None
    low, high = found.intervals[128]
    relative = 0.0
    for length in (64, 128):
        variance = sum(np.var(values) / 400 for values in outcomes[length].values()) / 4
        relative += variance / found.scores[length] ** 2
    width = 2 * 1.96 * found.kept[128] * np.sqrt(relative)
    assert high - low == pytest.approx(width, rel=0.1)  # 2000 resamples give a percentile to about 4 % of the width
    assert found.interval == (128, 128)  # 0.9 is far below the interval
    # Certain outcomes leave nothing to chance; a score in the middle may be on either side.
    mixed = effective_length({64: {"a": samples(20, 20)}, 128: {"a": samples(18, 20)}}, 64)
    assert mixed is not None and mixed.length == 128 and mixed.interval == (64, 128)
