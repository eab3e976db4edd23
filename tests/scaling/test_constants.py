"""The share of pairs that the constants of a scaling leave unscaled."""

from __future__ import annotations

import math
import re

import pytest

from scaled_rope.scaling.constants import (
    beta_grids,
    constants_note,
    interpolated_pairs,
    kept_pairs,
    rotations_at,
    share_at,
)
from scaled_rope.scaling.record import RopeScaling
from tests.helpers import ROOT


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


@pytest.mark.parametrize(("length", "theta", "head_dim"), [(4096, 10000.0, 128), (256, 10000.0, 64)])
def test_pairs_are_unscaled_interpolated_or_between(length: int, theta: float, head_dim: int) -> None:
    for fast, slow in ((32.0, 1.0), (8.0, 0.5)):
        scaling = RopeScaling("yarn", 8.0, length, theta, beta_fast=fast, beta_slow=slow)
        kept, pairs = kept_pairs(scaling, head_dim)
        interpolated = interpolated_pairs(scaling, head_dim)
        # The ramp's lower end is rounded up to a pair, which is already interpolated: up to one less.
        assert 0 <= pairs - counted(length, theta, head_dim, slow) - interpolated <= 1
        assert kept + interpolated < pairs
    assert interpolated_pairs(RopeScaling("linear", 8.0, length, theta), head_dim) == pairs


def test_grids_reach_from_the_paper_s_rotations_to_its_shares() -> None:
    def grids(length: int, theta: float) -> tuple[tuple[float, ...], tuple[float, ...]]:
        return beta_grids(RopeScaling("yarn", 8.0, length, theta))

    assert grids(4096, 1e4) == ((16, 32, 64), (0.5, 1, 2))  # the paper's own model: both readings agree
    assert grids(256, 1e4) == ((2, 4, 8, 16, 32, 64), (0.0625, 0.125, 0.25, 0.5, 1, 2))
    assert grids(131072, 1e6) == (
        (16, 32, 64, 128, 256),
        (0.5, 1, 2),
    )  # a pair at the same place turns more often
    share = share_at(32.0, 4096, 1e4)
    assert share == pytest.approx(counted(4096, 1e4, 2048, 32.0) / 1024, abs=1e-3)
    assert rotations_at(share, 4096, 1e4) == pytest.approx(32, rel=1e-12)


def test_the_table_of_the_documentation() -> None:
    text = (ROOT / "docs" / "methods.md").read_text()
    found = re.findall(r"\| (\d+), (\d+), (\de\d) \| [^|]+ \| (\d+) of (\d+) \| (\d+) of \d+ \|", text)
    assert len(found) == 5
    for length, head_dim, theta, fast, pairs, slow in found:
        model = int(length), float(theta), int(head_dim)
        assert int(pairs) == int(head_dim) // 2
        assert (int(fast), int(slow)) == (counted(*model, 32), counted(*model, 1))
