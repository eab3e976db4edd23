"""The share of pairs that the constants of a scaling leave unscaled."""

from __future__ import annotations

import math

import pytest

from scaled_rope.scaling.constants import constants_note, kept_pairs
from scaled_rope.scaling.record import RopeScaling


def counted(length: int, theta: float, head_dim: int, fast: float) -> int:
    """Pairs that turn at least `fast` times within `length` tokens, from the definition."""
    waves = [2 * math.pi * theta ** (2 * pair / head_dim) for pair in range(head_dim // 2)]
    return sum(length / wave >= fast for wave in waves)


@pytest.mark.parametrize(
    ("length", "theta", "head_dim", "told"),
    [
        (4096, 10000.0, 128, False),  # the paper's Llama 2
        (8192, 100000.0, 64, False),  # SmolLM2
        (256, 10000.0, 64, True),  # the embedded model
        (2048, 10000.0, 64, False),
        (512, 1000000.0, 64, True),
    ],
)
def test_models(length: int, theta: float, head_dim: int, told: bool) -> None:
    scaling = RopeScaling("yarn", 8.0, length, theta)
    kept, pairs = kept_pairs(scaling, head_dim)
    # The ramp's end is rounded down to a pair, which is still unscaled: up to one more.
    assert pairs == head_dim // 2 and 0 <= kept - counted(length, theta, head_dim, 32.0) <= 1
    note = constants_note(scaling, head_dim)
    assert (note is not None) == told == (kept < 0.1 * pairs)
    if note:
        assert f"leaves {kept} of {pairs} pairs unscaled" in note and f"L = {length}" in note


@pytest.mark.parametrize("spec", ["linear:8", "ntk:8", "default", "yarn:1", "yarn:8,beta_fast=8,beta_slow=0.75"])
def test_others_are_left_alone(spec: str) -> None:
    """Methods without these constants, no scaling, and constants that somebody chose."""
    base = RopeScaling("default", original_max_position_embeddings=256)
    assert constants_note(RopeScaling.from_spec(spec, base), 64) is None


def test_the_dynamic_form_is_told_by_its_factor() -> None:
    base = RopeScaling("default", original_max_position_embeddings=256)
    assert constants_note(RopeScaling.from_spec("ntk-by-parts:8", base), 64) is not None
    assert constants_note(RopeScaling.from_spec("dynamic-yarn", base), 64) is None  # no factor that is sure to come
