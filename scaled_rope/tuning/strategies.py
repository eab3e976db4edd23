"""Ways to search a scaling: LongRoPE's evolution over divisors, and plainer rivals over the few numbers of YaRN.

A strategy is a generator. It yields a batch of proposals and is sent the fitness of each, lower being better; the one
who drives it decides when to stop. With one seed and the same answers it proposes the same, so that a search that was
interrupted is repeated from what was kept. Knows nothing of models.
"""

from __future__ import annotations

import importlib
import itertools
import math
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from scaled_rope.errors import ConfigError
from scaled_rope.results import Row
from scaled_rope.scaling.constants import PAPER_BETAS, beta_grids
from scaled_rope.scaling.formulas import longrope_attention_factor
from scaled_rope.scaling.record import RopeScaling
from scaled_rope.tuning.constants import factor_grid
from scaled_rope.tuning.divisors import Divisors, Genome, Space, cross, mutate

_TRIES = 50
"""Draws of a child that is new before its place stays empty."""


@dataclass(frozen=True)
class Proposal:
    """A candidate, and where it comes from."""

    genome: Genome
    origin: Row
    """"kind" and, by kind, "name", "parents" (numbers of evaluations) or "numbers"."""


Strategy = Generator[list[Proposal], list[float], None]


# ----------------------------------------------------------------------------------------------------------- evolution


@dataclass(frozen=True)
class Evolution:
    """LongRoPE's settings (arXiv 2402.13753): 64 candidates, then 40 rounds of 16 mutants and 16 crossed ones."""

    population: int = 64
    mutants: int = 16
    crossed: int = 16
    rounds: int = 40
    rate: float = 0.3
    """Probability that a mutant's divisor is drawn anew."""
    parents: int = 32
    """The best so far, from which children are drawn."""

    @property
    def evaluations(self) -> int:
        """The candidates of a whole search."""
        return self.population + self.rounds * (self.mutants + self.crossed)


def evolve(space: Space, starts: dict[str, Divisors], settings: Evolution, factor: float | None, seed: int) -> Strategy:
    """LongRoPE's evolutionary search.

    Args:
        starts: the first candidates by name; the population is filled with mutants of them.
        factor: the attention factor of the first candidates, see `Genome`.
    """
    rng = np.random.default_rng(seed)
    if space.attention is not None and factor is None:
        factor = longrope_attention_factor(space.factor, space.original)
    batch = [Proposal(Genome(divisors, factor), {"kind": "start", "name": name}) for name, divisors in starts.items()]
    seen = {one.genome for one in batch}
    first = list(batch)

    def add(draw: Callable[[], tuple[Genome, Row]], count: int) -> None:
        for _ in range(count):
            for _ in range(_TRIES):
                genome, origin = draw()
                if genome not in seen:
                    seen.add(genome)
                    batch.append(Proposal(genome, origin))
                    break

    def first_mutant() -> tuple[Genome, Row]:
        index = int(rng.integers(len(first)))
        return mutate(first[index].genome, space, settings.rate, rng), {"kind": "mutant", "parents": [index]}

    add(first_mutant, settings.population - len(batch))
    ranked: list[tuple[float, int, Genome]] = []
    for _ in range(settings.rounds + 1):
        found = yield batch
        ranked += [(fitness, len(ranked) + index, one.genome)
                   for index, (fitness, one) in enumerate(zip(found, batch, strict=True))]  # fmt: skip
        best = sorted(ranked, key=lambda one: one[:2])[: settings.parents]

        def mutant(best: Sequence[tuple[float, int, Genome]] = best) -> tuple[Genome, Row]:
            _, index, genome = best[int(rng.integers(len(best)))]
            return mutate(genome, space, settings.rate, rng), {"kind": "mutant", "parents": [index]}

        def child(best: Sequence[tuple[float, int, Genome]] = best) -> tuple[Genome, Row]:
            (_, one, mine), (_, other, others) = (best[int(place)] for place in rng.choice(len(best), 2, replace=False))
            return cross(mine, others, rng), {"kind": "crossed", "parents": [one, other]}

        batch = []
        add(mutant, settings.mutants)
        if len(best) > 1:
            add(child, settings.crossed)
        if not batch:
            return


# -------------------------------------------------------------------------------------------------- YaRN's few numbers


@dataclass(frozen=True)
class YarnSpace:
    """beta_fast, beta_slow, the attention factor and the base, each mapped to 0 … 1.

    The betas go in octaves over the values that `scaled-rope tune --constants` tries, the attention factor over its
    grid, and the base from the model's to s times it.
    """

    space: Space
    ends: tuple[tuple[float, float], ...] = field(init=False)

    def __post_init__(self) -> None:
        paper = self.paper
        octaves = [(math.log2(axis[0]), math.log2(axis[-1])) for axis in beta_grids(paper)]
        grid = factor_grid(paper)
        base = math.log2(paper.rope_theta)
        object.__setattr__(self, "ends", (*octaves, (grid[0], grid[-1]), (base, base + math.log2(self.space.factor))))

    @property
    def paper(self) -> RopeScaling:
        """YaRN with the paper's constants."""
        return replace(self.space.base, method="yarn", factor=self.space.factor)

    def start(self) -> list[float]:
        """The point of the paper's constants."""
        values = [*map(math.log2, PAPER_BETAS), self.paper.static_attention_factor, math.log2(self.paper.rope_theta)]
        return [(value - low) / (high - low) for value, (low, high) in zip(values, self.ends, strict=True)]

    def scaling(self, point: Sequence[float]) -> RopeScaling:
        """The scaling of a point; where the betas cross, beta_fast is beta_slow."""
        fast, slow, factor, base = (
            low + min(max(at, 0.0), 1.0) * (high - low) for at, (low, high) in zip(point, self.ends, strict=True)
        )
        fast, slow, theta = (float(f"{2**value:.6g}") for value in (max(fast, slow), slow, base))
        # Ends of the ramp that are rounded to whole pairs would make most steps do nothing.
        return replace(
            self.paper,
            beta_fast=fast,
            beta_slow=slow,
            attention_factor=round(factor, 5),
            rope_theta=theta,
            truncate=False,
        )

    def proposal(self, scaling: RopeScaling, kind: str) -> Proposal:
        """A scaling of YaRN as a candidate."""
        return self.of_divisors(scaling, self.space.of_scaling(scaling), kind)

    def of_divisors(self, scaling: RopeScaling, divisors: Divisors, kind: str) -> Proposal:
        """The same where its divisors are known."""
        fast, slow = scaling.ramp_bounds
        numbers = {"beta_fast": fast, "beta_slow": slow, "attention_factor": scaling.static_attention_factor}
        numbers["rope_theta"] = scaling.rope_theta
        genome = Genome(divisors, round(scaling.static_attention_factor, 6))
        return Proposal(genome, {"kind": kind, "numbers": numbers})

    def first(self) -> Proposal:
        """YaRN as it is."""
        one = self.proposal(self.paper, "start")
        return replace(one, origin={**one.origin, "name": self.paper.to_spec()})


def load_cmaes() -> Any:
    """The library that has CMA-ES.

    Raises:
        ConfigError: it is not installed.
    """
    try:
        return importlib.import_module("cmaes")
    except ImportError:
        raise ConfigError(
            "--strategy cma-es needs the package cmaes: pip install 'scaled-rope[search]', or --strategy coordinate"
        ) from None


def cma_es(space: Space, seed: int) -> Strategy:
    """CMA-ES over YaRN's four numbers, from the paper's constants; where it has converged, again from a random point.

    Raises:
        ConfigError: the library is missing.
    """
    library, yarn = load_cmaes(), YarnSpace(space)
    yield [yarn.first()]
    rng = np.random.default_rng(seed)
    mean = np.asarray(yarn.start())
    for run in itertools.count():
        optimizer = library.CMA(
            mean=mean, sigma=0.2, bounds=np.asarray([[0.0, 1.0]] * len(mean)), seed=seed + 1000 * run
        )
        while not optimizer.should_stop():
            points = [optimizer.ask() for _ in range(optimizer.population_size)]
            found = yield [yarn.proposal(yarn.scaling(point), "cma-es") for point in points]
            optimizer.tell(list(zip(points, found, strict=True)))
        mean = rng.random(len(mean))


_FIRST_STEP, _LEAST_STEP = 0.25, 1 / 256
"""Steps of `coordinate`, as shares of the range of each number."""


def coordinate(space: Space, seed: int) -> Strategy:
    """A step along each of YaRN's four numbers in both directions; the best is taken, or else the step halved.

    It begins with the paper's constants, and again at a random point where the step has become too small.
    """
    yarn, rng = YarnSpace(space), np.random.default_rng(seed)
    point, proposal = yarn.start(), yarn.first()
    while True:
        (lowest,) = yield [proposal]
        reach = _FIRST_STEP
        while reach >= _LEAST_STEP:
            points = []
            for index, sign in itertools.product(range(len(point)), (-1, 1)):
                moved = min(max(point[index] + sign * reach, 0.0), 1.0)
                if moved != point[index]:
                    points.append([moved if place == index else own for place, own in enumerate(point)])
            found = yield [yarn.proposal(yarn.scaling(one), "coordinate") for one in points]
            if min(found) < lowest:
                lowest, point = min(found), points[found.index(min(found))]
            else:
                reach /= 2
        point = rng.random(len(point)).tolist()
        proposal = yarn.proposal(yarn.scaling(point), "coordinate")


def grid(space: Space, budget: int, seed: int) -> Strategy:
    """YaRN as it is, and every combination of betas and attention factor, as fine as the budget allows.

    The order is random. Combinations that compute the same are one candidate. The base is the model's.

    Raises:
        ConfigError: the budget is below the coarsest grid, of two values each.
    """
    yarn, sizes = YarnSpace(space), [2, 2]
    points, grew = _grid(yarn, *sizes), True
    if len(points) > budget:
        raise ConfigError(
            f"--evaluations {budget} is not allowed with --strategy grid; at least {len(points)}, the coarsest grid"
        )
    while grew:
        grew = False
        for axis in (1, 0):  # the attention factor, then the betas
            finer = [size + (place == axis) for place, size in enumerate(sizes)]
            found = _grid(yarn, *finer)
            if len(found) <= budget:
                points, sizes, grew = found, finer, True
    order = np.random.default_rng(seed).permutation(len(points) - 1) + 1
    return _at_once([points[0], *(points[index] for index in order)])


def _at_once(proposals: list[Proposal]) -> Strategy:
    yield proposals


def _grid(yarn: YarnSpace, betas: int, factors: int) -> list[Proposal]:
    """YaRN as it is, and the grid of so many values of either beta and of the attention factor."""
    base = yarn.start()[-1]
    ramps: dict[Divisors, list[float]] = {}
    for fast, slow in itertools.product(np.linspace(0, 1, betas).tolist(), repeat=2):
        ramps.setdefault(yarn.space.of_scaling(yarn.scaling([fast, slow, 0.0, base])), [fast, slow])
    found = [yarn.first()]
    for factor in np.linspace(0, 1, factors).tolist():
        for divisors, (fast, slow) in ramps.items():
            one = yarn.scaling([fast, slow, factor, base])
            found.append(yarn.of_divisors(one, divisors, "grid"))
    return [one for index, one in enumerate(found) if not index or one.genome != found[0].genome]
