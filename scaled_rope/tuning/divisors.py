"""Divisors of frequencies, one per pair of dimensions: what LongRoPE's search moves, and the laws that they keep.

Pair d of D/2 has the unscaled frequency θ_d and gets θ_d / λ_d. As in LongRoPE (arXiv 2402.13753) the λ never fall from
one pair to the next, and lie between 1 and 1.25·s. LongRoPE also searches for a number of first tokens whose positions
stay unscaled. Here it is 0: no config names it and no server computes it, since a token's rotation would depend on
its place and not on distances alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from scaled_rope.errors import ConfigError
from scaled_rope.scaling.frequencies import rope_values
from scaled_rope.scaling.record import RopeScaling

Divisors = tuple[float, ...]
"""λ, one per pair [D/2], from the fastest pair to the slowest."""
HIGHEST = 1.25
"""The largest divisor over s."""
STEP = 0.01
"""Divisors that are drawn are multiples of this."""
BASES = ("linear", "ntk", "yarn")
"""The methods whose divisors a search begins with: PI, NTK-aware scaling and YaRN."""


@dataclass(frozen=True)
class Genome:
    """A candidate of the search."""

    divisors: Divisors
    attention_factor: float | None = None
    """√(1/t), which multiplies cos and sin; None: LongRoPE's √(1 + ln s / ln L)."""


@dataclass(frozen=True)
class Space:
    """Where a search may look.

    Attributes:
        base: the model as it was trained: method "default", with L.
        target: tokens to reach; s is this over L.
        head_dim: dimensions per head.
        attention: the lowest and highest attention factor where it is searched too; None: it is fixed.
        same_within: whether texts of up to L tokens get the divisors as well; else they are read unscaled.
    """

    base: RopeScaling
    target: int
    head_dim: int
    attention: tuple[float, float] | None = None
    same_within: bool = False
    unscaled: tuple[float, ...] = field(init=False)
    """θ [D/2]."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "unscaled", tuple(rope_values(self.base, self.head_dim)[0]))

    @property
    def original(self) -> int:
        """L in tokens."""
        length = self.base.original_max_position_embeddings
        assert length is not None  # the command has checked it
        return length

    @property
    def factor(self) -> float:
        """s, at least as large as the target needs after rounding."""
        factor = self.target / self.original
        return factor if int(factor * self.original) >= self.target else float(np.nextafter(factor, np.inf))

    @property
    def pairs(self) -> int:
        """D/2."""
        return len(self.unscaled)

    @property
    def highest(self) -> float:
        """The largest divisor."""
        return HIGHEST * self.factor

    def record(self, genome: Genome) -> RopeScaling:
        """The candidate as a `longrope` scaling.

        Raises:
            ConfigError: divisors that break the laws.
        """
        check(genome.divisors, self.pairs, self.highest)
        within = genome.divisors if self.same_within else (1.0,) * self.pairs
        lists = {"short_factor": list(within), "long_factor": list(genome.divisors)}
        longrope = replace(self.base, method="longrope", factor=self.factor, params=lists)
        return replace(longrope, attention_factor=genome.attention_factor)

    def of_scaling(self, scaling: RopeScaling) -> Divisors:
        """The divisors that a static scaling of frequencies amounts to, moved into the bounds where they are not.

        Raises:
            ConfigError: a scaling that changes attention, follows the length, or stops a pair that turns.
        """
        if scaling.changes_attention or scaling.is_length_dependent:
            raise ConfigError(
                f"--start {scaling.label} is not allowed; a static scaling of frequencies, such as yarn:8"
            )
        scaled = rope_values(scaling, self.head_dim)[0]
        if any(own and not other for own, other in zip(self.unscaled, scaled, strict=True)):
            raise ConfigError(f"--start {scaling.label} is not allowed; it stops pairs, which no divisor does")
        # Seven digits are what a float32 knows, and 8 is 8 then.
        ratios = [
            float(f"{own / other:.7g}") if other else 1.0 for own, other in zip(self.unscaled, scaled, strict=True)
        ]
        return constrained(ratios, self.highest)

    def starts(self, also: Sequence[str] = ()) -> dict[str, Divisors]:
        """The divisors of PI, NTK-aware scaling and YaRN, and of the scalings that the user names, by spec.

        Raises:
            ConfigError: as `of_scaling`, or no spec.
        """
        specs = [*(f"{name}:{self.factor:.17g}" for name in BASES), *also]
        return {spec: self.of_scaling(RopeScaling.from_spec(spec, self.base)) for spec in specs}


# ---------------------------------------------------------------------------------------------------------------- laws


def check(divisors: Sequence[float], pairs: int, highest: float) -> None:
    """Refuse divisors that break the laws.

    Raises:
        ConfigError: another number than one per pair, one that is out of bounds, or one below that of the pair before.
    """
    if len(divisors) != pairs:
        raise ConfigError(f"{len(divisors)} divisors: must be {pairs}, one per pair of dimensions")
    for index, value in enumerate(divisors):
        if not 1 <= value <= highest:
            raise ConfigError(f"divisor {value:g} of pair {index}: must be at least 1 and at most {highest:g}")
        if index and value < divisors[index - 1]:
            raise ConfigError(
                f"divisor {value:g} of pair {index}: must be at least {divisors[index - 1]:g}, the one before"
            )


def constrained(values: Sequence[float], highest: float) -> Divisors:
    """The values moved into the bounds, each at least as large as the one before."""
    return tuple(np.maximum.accumulate(np.clip(np.asarray(values, dtype=np.float64), 1.0, highest)).tolist())


def _between(low: float, high: float, rng: np.random.Generator) -> float:
    """A multiple of `STEP` from low to high, or an end where none lies between."""
    return min(max(round(float(rng.uniform(low, high)) / STEP) * STEP, low), high)


def mutate(genome: Genome, space: Space, rate: float, rng: np.random.Generator) -> Genome:
    """Draw each divisor anew with probability `rate`, between those of its two neighbours; the ends have the bounds.

    An attention factor that is searched is drawn anew with the same probability, up to a tenth of its range away.
    """
    divisors = list(genome.divisors)
    for index in range(len(divisors)):
        if rng.random() < rate:
            low = divisors[index - 1] if index else 1.0
            high = divisors[index + 1] if index + 1 < len(divisors) else space.highest
            divisors[index] = round(_between(low, high, rng), 10) if low < high else low
    factor = genome.attention_factor
    if space.attention is not None and factor is not None and rng.random() < rate:
        low, high = space.attention
        reach = (high - low) / 10
        factor = round(min(max(factor + float(rng.uniform(-reach, reach)), low), high), 4)
    # Rounding to ten digits may pass a neighbour by less than that.
    return Genome(constrained(divisors, space.highest), factor)


def cross(one: Genome, other: Genome, rng: np.random.Generator) -> Genome:
    """A child that has each divisor from one of two parents, chosen among those that are not below the one before.

    The parent that gave the last divisor always qualifies, so that no child has to be thrown away.
    """
    divisors: list[float] = []
    for pair in zip(one.divisors, other.divisors, strict=True):
        able = [value for value in pair if not divisors or value >= divisors[-1]]
        divisors.append(able[int(rng.integers(len(able)))])
    factor = (one, other)[int(rng.integers(2))].attention_factor
    return Genome(tuple(divisors), factor)
