"""Fitness, the trace, and the budget, on planted losses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from scaled_rope import RopeScaling
from scaled_rope.errors import ConfigError
from scaled_rope.evaluation.passkey_prompts import PasskeyPrompt
from scaled_rope.results import read_rows
from scaled_rope.tuning.divisor_trials import (
    Evaluated,
    Material,
    Measure,
    Measured,
    Trace,
    choose_windows,
    drive,
    measure_on,
)
from scaled_rope.tuning.divisors import Space
from scaled_rope.tuning.measurement import ScoredWindow
from scaled_rope.tuning.strategies import Evolution, Strategy, evolve

SPACE = Space(RopeScaling("default", original_max_position_embeddings=64), 256, 16)
SMALL = Evolution(population=8, mutants=3, crossed=3, rounds=5, parents=4)
SETTINGS = {"seed": 0, "model_fingerprint": "m"}


def windows(count: int, length: int = 256) -> list[ScoredWindow]:
    rng = np.random.default_rng(0)
    return [ScoredWindow(index // 3, index % 3, rng.integers(0, 99, length)) for index in range(count)]


PROMPTS = {
    length: [PasskeyPrompt([index] * (length - 4), [1] * 4, 100_000 + index, 0.5, length, 9) for index in range(2)]
    for length in (128, 256)
}


def distance(scaling: RopeScaling) -> float:
    return float(np.square(np.asarray(scaling.params["long_factor"]) - np.linspace(1, 4, 8)).mean())


def score(scaling: RopeScaling, tokens: npt.NDArray[Any]) -> npt.NDArray[Any]:
    found = 2 + np.sin(tokens[1:].astype(np.float64))
    found[63:] += distance(scaling)  # positions 64 and later
    return np.asarray(found)


def ask(scaling: RopeScaling, prompt: PasskeyPrompt) -> tuple[float, bool]:
    nats = 4 * distance(scaling) * (1 + prompt.key % 2)
    return nats, nats < 0.5


def strategy(seed: int = 0) -> Strategy:
    return evolve(SPACE, SPACE.starts(), SMALL, None, seed)


def search(path: Path, budget: int, measure: Measure, settings: dict[str, Any] | None = None) -> list[Evaluated]:
    trace = Trace(path, settings or SETTINGS, {"seed": 0})
    return drive(strategy(), lambda one: SPACE.record(one.genome), trace, measure, budget)


MEASURE = measure_on(Material(windows(2), PROMPTS), 64, score, ask)


def test_fitness() -> None:
    scaling = SPACE.record(next(strategy())[0].genome)
    found = MEASURE(scaling)
    text = [float((2 + np.sin(one.tokens[64:])).mean()) for one in windows(2)]
    assert found.loss == pytest.approx(np.mean(text) + distance(scaling))
    assert found.needles == pytest.approx(1.5 * distance(scaling))  # of four tokens each, once and twice
    assert found.fitness == pytest.approx(found.loss + found.needles)
    assert found.right == {128: 0, 256: 0}
    assert Measured.of_row(json.loads(json.dumps(found.fields()))) == found
    alone = measure_on(Material(windows(2), {}), 64, score, ask)(scaling)
    assert (alone.needles, alone.fitness) == (None, alone.loss)
    needles = measure_on(Material([], PROMPTS), 64, score, ask)(scaling)
    assert (needles.loss, needles.fitness) == (None, needles.needles)


def test_losses_that_are_not_finite_are_an_error() -> None:
    broken = measure_on(Material(windows(1), {}), 64, lambda scaling, tokens: np.full(255, np.nan), ask)
    with pytest.raises(ConfigError, match="losses that are not finite"):
        broken(SPACE.record(next(strategy())[0].genome))


def test_material_counts_what_it_reads() -> None:
    material = Material(windows(3), PROMPTS)
    assert (material.passes, material.tokens) == (7, 3 * 256 + 2 * (128 + 256))
    assert material.fingerprint() == Material(windows(3), PROMPTS).fingerprint()
    assert (
        material.fingerprint() != Material(windows(2), PROMPTS).fingerprint() != Material(windows(2), {}).fingerprint()
    )


def test_windows_are_of_many_documents_and_follow_from_the_seed() -> None:
    some = windows(12)  # three of each of four documents
    chosen = choose_windows(some, 4, 0)
    assert {one.document for one in chosen} == {0, 1, 2, 3}
    assert [(one.document, one.start) for one in choose_windows(some, 6, 0)][:4] == [
        (one.document, one.start) for one in chosen
    ]
    draws = {tuple((one.document, one.start) for one in choose_windows(some, 4, seed)) for seed in range(5)}
    assert len(draws) > 1
    assert len(choose_windows(some, 99, 0)) == 12


def test_notes_stay_with_the_trace(tmp_path: Path) -> None:
    path = tmp_path / "trace.jsonl"
    trace = Trace(path, SETTINGS, {"seed": 0})
    assert trace.notes is None
    trace.notes = ["this means nothing"]
    drive(strategy(), lambda one: SPACE.record(one.genome), trace, MEASURE, 2)
    assert read_rows(path)[0]["notes"] == Trace(path, SETTINGS, {"seed": 0}).notes == ["this means nothing"]
    head, *rows = path.read_text().splitlines()
    older = json.loads(head)
    del older["notes"]
    path.write_text("\n".join([json.dumps(older), *rows]) + "\n")
    assert Trace(path, SETTINGS, {"seed": 0}).notes is None  # of a version that did not keep them


@pytest.mark.parametrize("budget", [1, 3, 10, 1000])
def test_the_budget_is_kept(tmp_path: Path, budget: int) -> None:
    calls = 0

    def counting(scaling: RopeScaling) -> Measured:
        nonlocal calls
        calls += 1
        return MEASURE(scaling)

    made = search(tmp_path / "trace.jsonl", budget, counting)
    assert len(made) == calls == min(budget, SMALL.evaluations)
    rows = read_rows(tmp_path / "trace.jsonl")
    assert len(rows) == 1 + calls and [row["evaluation"] for row in rows[1:]] == list(range(calls))


def test_every_row_says_what_was_tried_and_found(tmp_path: Path) -> None:
    made = search(tmp_path / "trace.jsonl", 20, MEASURE)
    head, *rows = read_rows(tmp_path / "trace.jsonl")
    assert head["settings"] == SETTINGS
    for one, row in zip(made, rows, strict=True):
        assert RopeScaling.from_dict(row["scaling"]) == one.scaling and row["fitness"] == one.fitness
        assert row["generation"] == one.generation and row["origin"] == one.origin
        assert row["fitness"] == MEASURE(one.scaling).fitness and row["provenance"] == {"seed": 0}


@pytest.mark.parametrize("cut", [1, 9, 17])
def test_an_interrupted_search_ends_like_one_that_never_stopped(tmp_path: Path, cut: int) -> None:
    calls = 0

    def dying(scaling: RopeScaling) -> Measured:
        nonlocal calls
        calls += 1
        if calls == cut + 1:
            raise KeyboardInterrupt
        return MEASURE(scaling)

    whole = search(tmp_path / "whole.jsonl", 1000, MEASURE)
    with pytest.raises(KeyboardInterrupt):
        search(tmp_path / "cut.jsonl", 1000, dying)
    with open(tmp_path / "cut.jsonl", "a") as file:
        file.write('{"metric": "search_evalu')  # killed while it wrote
    again = search(tmp_path / "cut.jsonl", 1000, dying)
    assert again == whole and calls == len(whole) + 1

    def stripped(name: str) -> list[dict[str, Any]]:
        return [{**row, "seconds": 0} for row in read_rows(tmp_path / name)]

    assert stripped("cut.jsonl") == stripped("whole.jsonl")
    # A finished search measures nothing, and a smaller budget gives the beginning of it.
    assert search(tmp_path / "whole.jsonl", 12, dying) == whole[:12] and calls == len(whole) + 1


def test_another_search_is_refused_by_name(tmp_path: Path) -> None:
    path = tmp_path / "out" / "trace.jsonl"
    search(path, 5, MEASURE)
    with pytest.raises(ConfigError, match=r"holds another search, with seed 0 and not 1; name another folder"):
        search(path, 5, MEASURE, SETTINGS | {"seed": 1})
    other = tmp_path / "rows.jsonl"
    other.write_text('{"metric": "perplexity"}\n')
    with pytest.raises(ConfigError, match="is no trace of a search"):
        search(other, 5, MEASURE)
    rows = path.read_text().splitlines()
    path.write_text("\n".join([*rows[:2], *rows[3:]]) + "\n")  # evaluation 1 is missing
    with pytest.raises(ConfigError, match="its evaluation 1 is not the one that this search makes"):
        search(path, 5, MEASURE)
