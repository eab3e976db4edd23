"""Scalings that begin at the original length: the model's own frequencies up to L, another scaling's beyond it."""

from __future__ import annotations

import math

from scaled_rope.errors import ConfigError
from scaled_rope.scaling.frequencies import compute_rope, rope_values
from scaled_rope.scaling.record import RopeScaling


def original_up_to_l(scaling: RopeScaling, head_dim: int) -> RopeScaling:
    """A scaling whose frequencies are the model's own for sequences up to L, and those of `scaling` for longer ones.

    This is what LongRoPE2 (arXiv 2502.20082) trains: short windows as before, long ones rescaled. A static scaling
    becomes `longrope`, whose list for short sequences is all ones; attention factor and temperature are those of
    `scaling` for both. A scaling that follows the length by itself is returned as it is.

    head_dim: dimensions per head of the model.

    Raises:
        ConfigError: a method that changes attention instead of frequencies or stops some pairs altogether, no L, or a
            scaling that follows the length but is not the original at L.
    """
    if scaling.changes_attention:
        raise ConfigError(f"scaling {scaling.label!r} is not allowed here: it changes attention, not the frequencies")
    length = scaling.original_max_position_embeddings
    if length is None:
        raise ConfigError("original_max_position_embeddings is missing: L is where the frequencies are to change")
    own = RopeScaling("default", rope_theta=scaling.rope_theta, partial_rotary_factor=scaling.partial_rotary_factor)
    plain, _ = rope_values(own, head_dim)
    if scaling.is_length_dependent:
        at_l = compute_rope(scaling, head_dim, length)[0].tolist()
        if not all(math.isclose(mine, theirs, rel_tol=1e-6) for mine, theirs in zip(at_l, plain, strict=True)):
            raise ConfigError(
                f"scaling {scaling.label!r} is not allowed here: at L = {length} its frequencies are not the model's"
            )
        return scaling
    scaled, attention_factor = rope_values(scaling, head_dim)
    if min(scaled) <= 0:
        raise ConfigError(
            f"scaling {scaling.label!r} is not allowed here: {sum(value <= 0 for value in scaled)} of its"
            f" {len(scaled)} pairs stand still, and no divisor says so"
        )
    return RopeScaling(
        "longrope",
        max(1.0, scaling.factor),
        rope_theta=scaling.rope_theta,
        partial_rotary_factor=scaling.partial_rotary_factor,
        original_max_position_embeddings=length,
        attention_factor=attention_factor,
        attention_temperature=scaling.attention_temperature,
        temperature_slope=scaling.temperature_slope,
        params={
            "short_factor": [1.0] * len(plain),
            "long_factor": [mine / theirs for mine, theirs in zip(plain, scaled, strict=True)],
        },
    )
