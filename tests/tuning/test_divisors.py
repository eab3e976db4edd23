"""The laws of divisors: bounds, order, what mutation and crossing may do, and the records that they become."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from scaled_rope import RopeScaling
from scaled_rope.errors import ConfigError
from scaled_rope.scaling.frequencies import compute_rope, rope_values
from scaled_rope.tuning.divisors import Genome, Space, check, constrained, cross, mutate

HEAD_DIM = 64
BASE = RopeScaling("default", original_max_position_embeddings=256)
SPACE = Space(BASE, 2048, HEAD_DIM)
genomes = st.lists(st.floats(0.5, 12), min_size=32, max_size=32).map(
    lambda values: Genome(constrained(sorted(values), SPACE.highest))
)
seeds = st.integers(0, 2**32)


def law(genome: Genome) -> None:
    check(genome.divisors, 32, 10.0)


def test_the_space_of_the_embedded_model() -> None:
    assert (SPACE.original, SPACE.factor, SPACE.pairs, SPACE.highest) == (256, 8.0, 32, 10.0)
    odd = Space(BASE, 3001, HEAD_DIM)
    assert odd.record(Genome((1.0,) * 32)).max_position_embeddings == 3001


def test_the_starts_are_what_the_methods_compute() -> None:
    starts = SPACE.starts(["yarn:8,beta_fast=8,beta_slow=0.75"])
    assert list(starts) == ["linear:8", "ntk:8", "yarn:8", "yarn:8,beta_fast=8,beta_slow=0.75"]
    assert starts["linear:8"] == (8.0,) * 32 and starts["yarn:8"][0] == 1 and starts["yarn:8"][-1] == 8
    for spec, divisors in starts.items():
        law(Genome(divisors))
        wanted, _ = rope_values(RopeScaling.from_spec(spec, BASE), HEAD_DIM)
        found, factor = compute_rope(SPACE.record(Genome(divisors)), HEAD_DIM, 2048)
        # Half of the seventh digit of a divisor, and the rounding of two frequencies to float32.
        assert found.tolist() == pytest.approx(wanted, rel=5e-7 + 2 * 6e-8)
        assert factor == pytest.approx(math.sqrt(1 + math.log(8) / math.log(256)))


@pytest.mark.parametrize(
    ("spec", "complaint"),
    [
        ("dynamic-yarn", "a static scaling of frequencies"),
        ("rerope,window=64", "a static scaling of frequencies"),
        ("hardclip", "it stops pairs"),
    ],
)
def test_starts_that_no_divisors_stand_for_are_refused(spec: str, complaint: str) -> None:
    with pytest.raises(ConfigError, match=complaint):
        SPACE.starts([spec])


def test_a_factor_of_one_is_the_identity() -> None:
    same = Space(BASE, 256, HEAD_DIM)
    for divisors in same.starts().values():
        assert divisors == (1.0,) * 32
        for length in (100, 256, 300):
            found, factor = compute_rope(same.record(Genome(divisors)), HEAD_DIM, length)
            assert found.tolist() == rope_values(BASE, HEAD_DIM)[0] and factor == 1


@pytest.mark.parametrize(
    ("divisors", "complaint"),
    [
        ([1.0] * 31, "31 divisors: must be 32"),
        ([0.9, *[1.0] * 31], "divisor 0.9 of pair 0: must be at least 1 and at most 10"),
        ([*[1.0] * 31, 10.5], "divisor 10.5 of pair 31"),
        ([1.0, 3.0, *[2.0] * 30], "divisor 2 of pair 2: must be at least 3, the one before"),
    ],
)
def test_what_breaks_the_laws_is_refused(divisors: list[float], complaint: str) -> None:
    with pytest.raises(ConfigError, match=complaint):
        SPACE.record(Genome(tuple(divisors)))


@given(st.lists(st.floats(-5, 20), min_size=1, max_size=40))
def test_constrained_keeps_the_laws_and_changes_nothing_that_does(values: list[float]) -> None:
    found = constrained(values, 10)
    check(found, len(values), 10)
    assert constrained(found, 10) == found


@given(genomes, seeds)
def test_mutants_keep_the_laws_and_stay_between_neighbours(genome: Genome, seed: int) -> None:
    mutant = mutate(genome, SPACE, 0.3, np.random.default_rng(seed))
    law(mutant)
    old, new = genome.divisors, mutant.divisors
    for index, value in enumerate(new):
        low, high = old[index - 1] if index else 1.0, old[index + 1] if index < 31 else 10.0
        # The neighbour before has been drawn already, no higher than its own upper neighbour was.
        assert min(low, new[index - 1] if index else 1.0) <= value <= high + 1e-9
    assert mutant.attention_factor is None


def test_the_rate_is_that_of_each_divisor() -> None:
    genome = Genome(tuple(np.linspace(1.001, 9.999, 32).tolist()))
    rng = np.random.default_rng(0)
    changed = [
        sum(a != b for a, b in zip(genome.divisors, mutate(genome, SPACE, 0.3, rng).divisors, strict=True))
        for _ in range(400)
    ]
    # 32 · 0.3 = 9.6, a standard deviation of 2.6, of the mean of 400 of 0.13
    assert np.mean(changed) == pytest.approx(9.6, abs=0.6)
    assert mutate(genome, SPACE, 1e-9, rng) == genome


@given(genomes, genomes, seeds)
def test_children_have_each_divisor_from_a_parent(one: Genome, other: Genome, seed: int) -> None:
    child = cross(one, other, np.random.default_rng(seed))
    law(child)
    assert all(value in pair for value, *pair in zip(child.divisors, one.divisors, other.divisors, strict=True))
    assert cross(one, one, np.random.default_rng(seed)) == one


def test_an_attention_factor_is_searched_within_its_bounds() -> None:
    space = Space(BASE, 2048, HEAD_DIM, attention=(0.9, 1.4))
    rng, genome = np.random.default_rng(0), Genome((2.0,) * 32, 1.38)
    found = {mutate(genome, space, 1.0, rng).attention_factor for _ in range(100)}
    assert len(found) > 20 and max(f for f in found if f) == 1.4 and min(f for f in found if f) >= 1.33
    assert space.record(genome).static_attention_factor == 1.38
    assert {cross(genome, Genome((2.0,) * 32, 1.1), rng).attention_factor for _ in range(20)} == {1.38, 1.1}


def test_the_record_within_the_trained_length() -> None:
    genome = Genome(SPACE.starts()["yarn:8"])
    plain = rope_values(BASE, HEAD_DIM)[0]
    assert compute_rope(SPACE.record(genome), HEAD_DIM, 256)[0].tolist() == plain
    same = Space(BASE, 2048, HEAD_DIM, same_within=True).record(genome)
    within, beyond = (compute_rope(same, HEAD_DIM, length)[0].tolist() for length in (256, 2048))
    assert within == beyond != plain
    assert RopeScaling.from_dict(same.to_dict()) == same == RopeScaling.from_spec(same.to_spec(), BASE)
    assert RopeScaling.from_config(same.to_config()) == same
