"""Budget, costs, and what a unit measures."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from scaled_rope import RopeScaling
from scaled_rope.advice.candidates import Candidate
from scaled_rope.advice.trials import Budget, Costs, OutOfTime, Unit, refused
from scaled_rope.errors import ConfigError
from scaled_rope.evaluation.controls import Control
from scaled_rope.results import read_rows
from tests.helpers.advice import OWN, TARGET, Clock, L, Scripted, halving, windows

YARN = RopeScaling.from_spec("yarn:8", OWN)
RETURNED = RopeScaling.from_spec("dual-chunk,chunk=48", OWN)


def test_costs_are_measured_or_taken_from_what_is_near() -> None:
    costs = Costs(lambda length: float(length))
    assert costs.of(YARN, 100) == 100 and costs.of(RETURNED, 100) == 200
    assert costs.of_control(Control(64, 16), 512) == 29 * 64
    costs.add(OWN, 100, 50)
    assert costs.of(YARN, 100) == 50 and costs.of(YARN, 200) == 100  # frequencies cost nothing
    assert costs.of(RETURNED, 200) == 200
    costs.add(RETURNED, 100, 75)
    assert costs.of(RETURNED, 200) == 150
    costs.add(None, 512, 7)
    assert costs.of_control(Control(64, 16), 512) == 7


def test_what_earlier_runs_measured_is_charged_once(tmp_path: Path) -> None:
    model = Scripted()
    first = halving(tmp_path, model, 5).trials
    unit = Unit(windows(1)[0], {})
    first.measure(Candidate("yarn:8", YARN), unit, True, first.nothing_yet(Candidate("yarn:8", YARN)))
    assert first.store.budget.spent == pytest.approx(1.0)
    again = halving(tmp_path, model, 5).trials
    for _ in range(2):
        again.measure(Candidate("yarn:8", YARN), unit, True, again.nothing_yet(Candidate("yarn:8", YARN)))
    assert len(model.read) == 1 and again.store.budget.spent == pytest.approx(1.0)
    assert read_rows(tmp_path / "rows.jsonl")[0]["seconds"] == 1.0


def test_a_pass_is_timed_without_what_comes_before_it(tmp_path: Path) -> None:
    """Bringing a scaling into the model costs of the budget and is no cost of the scaling."""
    model = Scripted()
    model.patching = 3.0
    for _ in range(2):  # from the row, too
        trials = halving(tmp_path, model, 5).trials
        found = trials.nothing_yet(Candidate("yarn:8", YARN))
        trials.measure(found.candidate, Unit(windows(1)[0], {}), True, found)
        assert found.seconds == [1.0] and trials.store.budget.spent == pytest.approx(4.0)
    (row,) = read_rows(tmp_path / "rows.jsonl")
    assert (row["seconds"], row["pass_seconds"]) == (4.0, 1.0)


def test_a_pass_that_would_not_fit_is_not_begun(tmp_path: Path) -> None:
    model = Scripted()
    trials = halving(tmp_path, model, 1 / 120).trials  # half a second
    with pytest.raises(OutOfTime):
        trials.measure(
            Candidate("yarn:8", YARN), Unit(windows(1)[0], {}), True, trials.nothing_yet(Candidate("yarn:8", YARN))
        )
    assert model.read == []


def test_a_scaling_that_follows_the_length_is_read_at_each(tmp_path: Path) -> None:
    model = Scripted()
    trials = halving(tmp_path, model, 5).trials
    dynamic = Candidate("dynamic-yarn", RopeScaling.from_spec("dynamic-yarn", OWN))
    found = trials.nothing_yet(dynamic)
    trials.measure(dynamic, Unit(windows(1)[0], {}), True, found)
    assert model.read == [("unscaled", 512), ("yarn x2", 128), ("yarn x4", 256), ("yarn x8", 512)]
    static = trials.nothing_yet(Candidate("yarn:8", YARN))
    trials.measure(static.candidate, Unit(windows(1)[0], {}), True, static)
    assert len(model.read) == 4  # the pass at 512 is there
    assert not np.isnan(found.nats[0]).any() and found.nats[0][8:] == pytest.approx(static.nats[0][8:])
    assert found.nats[0][0] == pytest.approx(static.nats[0][0] - 0.01, abs=1e-4)  # unscaled within L
    assert found.weights.sum() == TARGET - 1 and found.first * 16 == L


def test_the_share_of_a_budget_that_is_kept() -> None:
    clock = Clock()
    budget = Budget(60, clock, reserve=6)
    clock.now += 10
    budget.replayed += 4
    assert budget.spent == 14 and budget.left == 40


def test_whose_fault_an_error_is() -> None:
    assert refused(ConfigError("no such family")) == "no such family"
    assert refused(torch.OutOfMemoryError("x")) == "out of memory"
    assert refused(ValueError("a mistake of ours, which ConfigError is a kind of")) is None
