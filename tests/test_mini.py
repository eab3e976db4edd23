"""The plan and the statistics of the miniature."""

from __future__ import annotations

import math
import statistics

import pytest

from scaled_rope.errors import ConfigError
from scaled_rope.mini import PARTS, ROOT, Run, by_run, spread, table


def test_a_new_value_is_predicted_as_by_hand() -> None:
    # t(2 degrees, 97.5 %) = 4.303, from tables; mean 2, sd 1: 2 ± 4.303·√(4/3)
    low, high = spread([1.0, 2.0, 3.0]).prediction
    assert (low, high) == pytest.approx((2 - 4.9687, 2 + 4.9687), abs=1e-3)
    with pytest.raises(ConfigError, match="prediction from 1"):
        _ = spread([1.0]).prediction


def test_the_prediction_covers_what_it_says() -> None:
    import numpy

    draws = numpy.random.default_rng(0).normal(size=(4000, 4))
    hits = [low <= new <= high for *seen, new in draws.tolist() for low, high in [spread(seen).prediction]]
    # A share of 0.95 over 4000 draws has a standard error of 0.0034; four of them.
    assert abs(statistics.fmean(hits) - 0.95) < 0.014
    assert math.isnan(spread([1.0]).sd)


def test_every_method_has_the_same_budget() -> None:
    for runs in PARTS.values():
        budgets: dict[str, set[tuple[int, int, float]]] = {}
        for run in runs:
            budgets.setdefault(run.scaling, set()).add((run.seed, run.steps, run.learning_rate))
        assert len(set(map(frozenset, budgets.values()))) == 1
        assert len({run.name for run in runs}) == len(runs)


def test_a_run_is_the_demo_with_its_own_values() -> None:
    recipe = Run("ntk:8", 3, 30, 1e-3).recipe()
    assert (recipe.scaling, recipe.seed, recipe.max_train_steps, recipe.warmup_steps) == ("ntk:8", 3, 30, 3)
    assert recipe.learning_rate == 1e-3 and recipe.output_dir.endswith("ntk-8-30-s3-lr0.001")


def test_a_table_counts_only_rows_of_its_runs() -> None:
    def row(model: str, value: float, carried: bool = True) -> dict[str, object]:
        fields = {"metric": "perplexity", "carried": carried, "length": 256}
        return {**fields, "model": model, "perplexity_bucket": value}

    runs = [Run("yarn:8", 1), Run("yarn:8", 2)]
    other = Run("yarn:8", 1, 30)
    rows = [row(runs[0].model, 10.0), row(runs[1].model, 12.0), row(other.model, 99.0), row("elsewhere/model", 99.0)]
    rows.append(row(runs[0].model, 99.0, carried=False))
    assert "| `yarn:8` | 2 | 11.0 ± 1.4 |" in table(rows, runs)
    assert by_run(rows, "perplexity_bucket")[runs[0].name] == {256: 10.0}
    assert str(ROOT) in runs[0].model
    with pytest.raises(ConfigError, match="no rows of the 2 runs"):
        table([], runs)
