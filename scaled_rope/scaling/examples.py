"""A typical record of every method, for lists and figures of all of them."""

from __future__ import annotations

from scaled_rope.scaling.record import RopeScaling
from scaled_rope.scaling.registry import METHODS


def example(method: str, head_dim: int, theta: float, original: int, factor: float) -> RopeScaling:
    """A typical record of a method, for its figure. The lists of longrope are made up: slow from a search, here smooth.

    Raises:
        ConfigError: no such method, or numbers that it cannot use.
    """
    base = RopeScaling("default", original_max_position_embeddings=original, rope_theta=theta)
    if method == "longrope":
        count = head_dim // 2
        rise = [factor ** min(1.0, (d / (0.7 * count)) ** 2) for d in range(count)]
        lists = {"short_factor": [value**0.1 for value in rise], "long_factor": rise}
        return RopeScaling("longrope", factor, original, theta, params=lists)
    words = {
        "abf": f"abf,theta={theta * 100:.12g}",
        "dynamic-ntk": "dynamic-ntk",
        "proportional": "proportional,fraction=0.75",
    }
    takes_factor = "factor" in METHODS[method].fields and not METHODS[method].factor_optional
    return RopeScaling.from_spec(words.get(method, f"{method}:{factor:g}" if takes_factor else method), base)
