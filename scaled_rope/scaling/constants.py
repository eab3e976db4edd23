"""Whether YaRN's constants fit a model: β counts rotations within L, so their effect depends on L, head_dim and theta.

At the paper's L = 4096 with heads of 128 dimensions a third of the pairs turns more than 32 times within L, and stays
unscaled. At L = 256 with heads of 64 it is one pair of 32, and nearly everything is interpolated.
"""

from __future__ import annotations

import math

from scaled_rope.scaling.frequencies import rope_values
from scaled_rope.scaling.record import RopeScaling

LEAST_KEPT = 0.1
"""The share of pairs that has to stay unscaled for the paper's constants to do here what they do in the paper."""
PAPER_BETAS = (32.0, 1.0)
"""The paper's beta_fast and beta_slow, in rotations within L."""
_PAPER_MODEL = (4096, 10000.0)
"""L and theta of the models that they were found on."""


def kept_pairs(scaling: RopeScaling, head_dim: int) -> tuple[int, int]:
    """The number of pairs of dimensions whose frequency a scaling leaves as it is, and that of all pairs.

    A dynamic scaling counts as its static form.

    Raises:
        ConfigError: as `compute_rope` does.
    """
    ratios = _ratios(scaling, head_dim)
    return sum(math.isclose(ratio, 1.0, rel_tol=1e-6) for ratio in ratios), len(ratios)


def interpolated_pairs(scaling: RopeScaling, head_dim: int) -> int:
    """The number of pairs of dimensions whose frequency a scaling divides by its whole factor.

    Raises:
        ConfigError: as `compute_rope` does.
    """
    return sum(math.isclose(ratio * scaling.factor, 1.0, rel_tol=1e-6) for ratio in _ratios(scaling, head_dim))


def _ratios(scaling: RopeScaling, head_dim: int) -> list[float]:
    """Each pair's frequency under a scaling over its unscaled one; pairs that don't turn at all count as kept."""
    base = RopeScaling.from_spec("default", scaling)
    scaled, unscaled = (rope_values(one, head_dim)[0] for one in (scaling, base))
    return [one / other if other else 1.0 for one, other in zip(scaled, unscaled, strict=True)]


def rotations_at(share: float, length: int, theta: float) -> float:
    """How often the pair after a share of all pairs, 0 to 1 from the fastest, turns within `length` tokens."""
    return length / (2 * math.pi) * math.exp(-share * math.log(theta))


def share_at(rotations: float, length: int, theta: float) -> float:
    """The share of pairs that turn more than `rotations` times within `length` tokens; inverse of `rotations_at`."""
    return math.log(length / (2 * math.pi * rotations), theta)


def beta_grids(scaling: RopeScaling) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Values of beta_fast and of beta_slow to try on a model, ascending.

    The paper's 32 and 1 can be read as rotations, or as the shares of pairs that turn so often within the paper's own
    L = 4096 (theta = 1e4): 33 % more than 32 times, 30 % less than once. Either grid goes in octaves from the one
    reading to the other and an octave beyond the rotations; where the two agree, an octave to both sides.

    scaling: says L and theta of the model.
    """
    length, theta = scaling.original_max_position_embeddings, scaling.rope_theta
    assert length is not None  # "yarn" needs the original length
    grids = []
    for rotations in PAPER_BETAS:
        as_share = rotations_at(share_at(rotations, *_PAPER_MODEL), length, theta)
        octaves = round(math.log2(as_share / rotations))
        grids.append(tuple(rotations * 2.0**k for k in range(min(octaves, -1), max(octaves, 1) + 1)))
    return grids[0], grids[1]


def constants_note(scaling: RopeScaling, head_dim: int) -> str | None:
    """A remark on a scaling whose constants are the paper's, for a model that they are not for; None where they fit."""
    if scaling.method not in ("yarn", "ntk-by-parts") or scaling.factor <= 1 or scaling.ramp_bounds != PAPER_BETAS:
        return None
    kept, pairs = kept_pairs(scaling, head_dim)
    if kept >= LEAST_KEPT * pairs:
        return None
    return (
        f"{scaling.label} leaves {kept} of {pairs} pairs unscaled, at the paper's L = 4096 a third: beta_fast=32 and "
        f"beta_slow=1 count turns within L = {scaling.original_max_position_embeddings}; "
        "`scaled-rope tune --constants` finds what fits"
    )
