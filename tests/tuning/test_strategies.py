"""Strategies on fitness whose lowest point is known."""

from __future__ import annotations

import importlib
import itertools
import math
from collections.abc import Callable

import numpy as np
import pytest

from scaled_rope import RopeScaling
from scaled_rope.errors import ConfigError
from scaled_rope.scaling.frequencies import rope_values
from scaled_rope.tuning.divisors import Genome, Space, check
from scaled_rope.tuning.strategies import Evolution, Proposal, Strategy, YarnSpace, cma_es, coordinate, evolve, grid

HEAD_DIM = 64
BASE = RopeScaling("default", original_max_position_embeddings=256)
SPACE = Space(BASE, 2048, HEAD_DIM)
PLANTED = RopeScaling.from_spec("yarn:8,beta_fast=6,beta_slow=0.3,attention_factor=1.1", BASE)
WANTED = np.log(SPACE.of_scaling(PLANTED))


def miss(genome: Genome) -> float:
    """How far a candidate is from the planted divisors and, where it names one, attention factor."""
    factor = 1.1 if genome.attention_factor is None else genome.attention_factor
    return float(np.square(np.log(genome.divisors) - WANTED).sum() + 100 * (factor - 1.1) ** 2)


def follow(strategy: Strategy, count: int, fitness: Callable[[Genome], float] = miss) -> list[Proposal]:
    """The first proposals of a strategy."""
    made: list[Proposal] = []
    batch = next(strategy)
    while True:
        made += batch
        if len(made) >= count:
            return made[:count]
        try:
            batch = strategy.send([fitness(one.genome) for one in batch])
        except StopIteration:
            return made


def evolution(seed: int = 0, settings: Evolution | None = None, space: Space = SPACE) -> Strategy:
    return evolve(space, space.starts(), settings or Evolution(), None, seed)


def test_longrope_s_settings_make_about_1300_evaluations() -> None:
    made = follow(evolution(), 10_000)
    assert len(made) == Evolution().evaluations == 64 + 40 * 32
    assert len({one.genome for one in made}) == len(made)  # none twice
    for one in made:
        check(one.genome.divisors, 32, 10.0)
    kinds = [one.origin["kind"] for one in made]
    assert kinds[:3] == ["start"] * 3 and set(kinds[3:64]) == {"mutant"}
    assert kinds[64:96] == ["mutant"] * 16 + ["crossed"] * 16
    assert all(parent < index for index, one in enumerate(made) for parent in one.origin.get("parents", ()))


def test_evolution_gets_near_to_planted_divisors() -> None:
    made = [miss(one.genome) for one in follow(evolution(), 2000)]
    starts, found = min(made[:3]), min(made)
    assert found < 0.4 * starts, (starts, found)
    # Children of the best are what leads there: as many mutants of the starts alone do not.
    still = Evolution(population=len(made), rounds=0)
    assert found < 0.7 * min(miss(one.genome) for one in follow(evolution(settings=still), 2000))


def test_parents_are_the_best_so_far() -> None:
    made = follow(evolution(), 400)
    values = [miss(one.genome) for one in made]
    for index in range(64, 400):
        round_begin = 64 + (index - 64) // 32 * 32
        best = set(np.argsort(values[:round_begin], kind="stable")[:32].tolist())
        assert set(made[index].origin["parents"]) <= best


def test_an_attention_factor_is_found_too() -> None:
    space = Space(BASE, 2048, HEAD_DIM, attention=(0.9, 1.4))
    made = follow(evolution(space=space), 2000)
    best = min(made, key=lambda one: miss(one.genome)).genome
    assert best.attention_factor == pytest.approx(1.1, abs=0.02)
    assert made[0].genome.attention_factor == pytest.approx(math.sqrt(1 + math.log(8) / math.log(256)))


def test_seeds_repeat_and_differ() -> None:
    assert follow(evolution(3), 200) == follow(evolution(3), 200) != follow(evolution(4), 200)
    # The first descent begins with the paper's constants under any seed, those after it at random points.
    assert follow(coordinate(SPACE, 1), 600) != follow(coordinate(SPACE, 2), 600)


@pytest.mark.parametrize("name", ["cma-es", "coordinate"])
def test_yarn_s_numbers_are_found(name: str) -> None:
    if name == "cma-es":
        pytest.importorskip("cmaes")
    made = follow(cma_es(SPACE, 0) if name == "cma-es" else coordinate(SPACE, 0), 300)
    assert made[0].origin["name"] == "yarn:8" and made[0].genome.divisors == SPACE.starts()["yarn:8"]
    values = [miss(one.genome) for one in made]
    assert min(values) < 0.05 * values[0]
    best = made[int(np.argmin(values))]
    assert best.origin["numbers"]["attention_factor"] == pytest.approx(1.1, abs=0.03)
    assert {one.origin["kind"] for one in made[1:]} == {name}
    for one in made:
        check(one.genome.divisors, 32, 10.0)


def test_cma_es_repeats_and_goes_on_after_it_has_converged() -> None:
    pytest.importorskip("cmaes")
    assert follow(cma_es(SPACE, 5), 120) == follow(cma_es(SPACE, 5), 120) != follow(cma_es(SPACE, 6), 120)
    flat = follow(cma_es(SPACE, 0), 3000, lambda genome: 1.0)  # it stops soon where nothing differs
    assert len(flat) == 3000


def test_a_missing_library_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    real = importlib.import_module

    def missing(name: str, *more: str) -> object:
        if name == "cmaes":
            raise ImportError(name)
        return real(name, *more)

    monkeypatch.setattr(importlib, "import_module", missing)
    with pytest.raises(ConfigError, match=r"needs the package cmaes: pip install 'scaled-rope\[search\]'"):
        next(cma_es(SPACE, 0))


def test_a_grid_that_is_coarser_than_the_coarsest_is_refused() -> None:
    """It would be YaRN as it is and nothing else."""
    with pytest.raises(ConfigError, match="--evaluations 8 is not allowed with --strategy grid; at least 9"):
        grid(SPACE, 8, 0)


@pytest.mark.parametrize("budget", [9, 20, 60, 400])
def test_a_grid_is_as_fine_as_the_budget_allows(budget: int) -> None:
    made = follow(grid(SPACE, budget, 0), 10_000)
    assert 9 <= len(made) <= budget and len({one.genome for one in made}) == len(made)
    assert made[0].origin["name"] == "yarn:8"
    assert {one.origin["numbers"]["rope_theta"] for one in made} == {BASE.rope_theta}
    if budget == 400:
        assert len(made) > 200
        factors = {one.origin["numbers"]["attention_factor"] for one in made}
        assert min(factors) == 0.9 and len(factors) >= 7
        assert follow(grid(SPACE, budget, 1), 10_000) != made  # another order
        assert {one.genome for one in follow(grid(SPACE, budget, 1), 10_000)} == {one.genome for one in made}


def test_points_are_scalings_of_yarn() -> None:
    yarn = YarnSpace(SPACE)
    one = yarn.scaling(yarn.start())
    assert (one.ramp_bounds, one.rope_theta) == ((32, 1), 10_000)
    assert one.static_attention_factor == pytest.approx(yarn.paper.static_attention_factor, abs=1e-5)
    for point in itertools.product((0, 1), repeat=4):
        scaling = yarn.scaling(point)
        fast, slow = scaling.ramp_bounds
        assert fast >= slow and 1e4 <= scaling.rope_theta <= 8e4 + 1
        proposal = yarn.proposal(scaling, "grid")
        record = SPACE.record(proposal.genome)
        assert record.static_attention_factor == pytest.approx(scaling.static_attention_factor, abs=1e-6)
        if point[3] == 0:  # with another base the slowest pairs may pass the bound of the divisors
            divided = [own / by for own, by in zip(SPACE.unscaled, proposal.genome.divisors, strict=True)]
            assert divided == pytest.approx(rope_values(scaling, HEAD_DIM)[0], rel=1e-6)
