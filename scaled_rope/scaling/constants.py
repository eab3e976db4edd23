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
_PAPER = (32.0, 1.0)


def kept_pairs(scaling: RopeScaling, head_dim: int) -> tuple[int, int]:
    """The number of pairs of dimensions whose frequency a scaling leaves as it is, and that of all pairs.

    A dynamic scaling counts as its static form.

    Raises:
        ConfigError: as `compute_rope` does.
    """
    base = RopeScaling.from_spec("default", scaling)
    scaled, unscaled = (rope_values(one, head_dim)[0] for one in (scaling, base))
    kept = [math.isclose(one, other, rel_tol=1e-6) for one, other in zip(scaled, unscaled, strict=True)]
    return sum(kept), len(kept)


def constants_note(scaling: RopeScaling, head_dim: int) -> str | None:
    """A remark on a scaling whose constants are the paper's, for a model that they are not for; None where they fit."""
    if scaling.method not in ("yarn", "ntk-by-parts") or scaling.factor <= 1 or scaling.ramp_bounds != _PAPER:
        return None
    kept, pairs = kept_pairs(scaling, head_dim)
    if kept >= LEAST_KEPT * pairs:
        return None
    return (
        f"{scaling.label} leaves {kept} of {pairs} pairs unscaled, at the paper's L = 4096 a third: beta_fast=32 and "
        f"beta_slow=1 count turns within L = {scaling.original_max_position_embeddings}; "
        "`scaled-rope tune --beta-fast 4,8,16,32 --beta-slow 0.5,0.75,1` finds what fits"
    )
