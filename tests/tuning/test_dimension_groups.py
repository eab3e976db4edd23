"""DPE's probe finds what is known of constructed models."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence

import pytest
import torch

from scaled_rope import RopeScaling
from scaled_rope.attention.methods import attention_regions
from scaled_rope.attention.regions import region_attention
from scaled_rope.tuning.dimension_groups import Grouping, GroupProbe

OWN = RopeScaling("default", original_max_position_embeddings=64)


def test_the_paper_s_own_probe() -> None:
    """From 8192 to 131072 tokens with head_dim 128, as in the paper's code."""
    probe = GroupProbe.of(8192, 131072, 64)
    assert (probe.groups, probe.window, probe.reference) == (8, 1024, 32)
    assert probe.sizes == (1, 2, 4, 8, 16, 32, 64, 128)
    groupings = probe.groupings()
    assert groupings[0] == (32,) * 8 and len(groupings) == len(set(groupings)) == 1 + 8 * 7
    assert all(sum(size != 32 for size in one) <= 1 for one in groupings)
    assert probe.spec((4, 4, 2, 16, 32, 32, 16, 128)) == "dpe,groups=4+4+2+16+32+32+16+128,window=1024"


@pytest.mark.parametrize(("original", "target", "pairs"), [(64, 100, 2), (64, 512, 3), (8, 9, 32), (256, 2000, 32)])
def test_every_grouping_is_a_scaling_and_the_reference_stays_within_the_trained_length(
    original: int, target: int, pairs: int
) -> None:
    probe = GroupProbe.of(original, target, pairs)
    own = RopeScaling("default", original_max_position_embeddings=original)
    assert probe.groups == min(8, pairs) and probe.reference in probe.sizes and probe.sizes[0] == 1
    assert probe.effective_length(probe.sizes[-1], target) <= 2 * original
    for grouping in probe.groupings():
        assert RopeScaling.from_spec(probe.spec(grouping), own).params["groups"] == list(grouping)
    assert probe.effective_length(probe.reference, target) <= original
    with pytest.raises(ValueError, match="no probe"):
        GroupProbe.of(original, original, pairs)


def furthest(probe: GroupProbe, grouping: Grouping, target: int) -> list[int]:
    """The largest relative position that each group sees, from the regions that attention is computed with."""
    scaling = RopeScaling.from_spec(probe.spec(grouping), OWN)
    far = attention_regions(scaling).near_to_far[-1]
    positions = torch.arange(target)
    found: list[int] = (far.query(positions)[-1] - far.key(positions)[0]).tolist()
    return found


def known_model(probe: GroupProbe, lengths: Sequence[int], target: int) -> tuple[Grouping, Grouping]:
    """What the probe finds of a model that knows the distances up to `lengths`, group by group, and what is right.

    Each group beyond its length takes away from the score, and so does every halving of the number of positions.
    """

    def score(grouping: Grouping) -> float:
        beyond = sum(far > known for far, known in zip(furthest(probe, grouping, target), lengths, strict=True))
        return math.exp(-beyond - 0.05 * sum(math.log2(size) for size in grouping))

    right = []
    for group, known in enumerate(lengths):
        reach = {size: furthest(probe, probe.with_size(group, size), target)[group] for size in probe.sizes}
        right.append(min(size for size in probe.sizes if reach[size] <= known))
    return probe.find(score), tuple(right)


def test_the_smallest_size_within_a_known_effective_length_is_found() -> None:
    probe, rng = GroupProbe.of(64, 512, 16), random.Random(0)
    for _ in range(20):
        lengths = [rng.randint(16, 600) for _ in range(probe.groups)]
        found, right = known_model(probe, lengths, 512)
        assert found == right
    assert known_model(probe, [512] * 8, 512)[0] == (1,) * 8
    assert known_model(probe, [64] * 8, 512)[0] == (16,) * 8  # 8 sees 65 tokens of 64


def test_equal_scores_leave_the_reference_and_its_neighbours() -> None:
    probe = GroupProbe.of(64, 512, 16)
    assert probe.find(lambda grouping: 1.0) == (probe.reference,) * 8
    # 8 and 32 are as far from 16: the smaller one
    assert probe.find(lambda grouping: float(bool({8, 32} & set(grouping)))) == (8,) * 8


def test_a_head_that_looks_to_known_distances() -> None:
    """Real attention in which each of two groups, one pair each, finds a fact best at a distance of its own.

    The first token is the fact; all other keys are 0. The query's phase in a pair of frequency θ is -θ·E, so the pair
    gives the fact a score of 8·cos(θ(d - E)) at distance d. A period is longer than the text, so that E is the one
    distance at which the group is strongest, and its right g is the one under which the fact comes nearest to E.
    """
    target, original, lengths = 256, 64, (24.0, 120.0)
    probe = GroupProbe.of(original, target, len(lengths))
    inv_freq = torch.tensor([2 * math.pi / 500, 2 * math.pi / 900], dtype=torch.float64)
    keys = torch.zeros(1, 1, target, 4, dtype=torch.float64)
    values = torch.zeros(1, 1, target, 1, dtype=torch.float64)
    keys[0, 0, 0, :2], values[0, 0, 0] = 8.0, 1.0  # dimensions are paired (i, i + 2)
    phase = -inv_freq * torch.tensor(lengths)
    query = torch.cat([phase.cos(), phase.sin()]).expand(1, 1, 1, 4)

    def score(grouping: Grouping) -> float:
        """The share of attention that the last token gives to the fact."""
        regions = attention_regions(RopeScaling.from_spec(probe.spec(grouping), OWN))
        return float(region_attention(query, keys, values, inv_freq, regions, 1.0)[0, 0, -1, 0])

    def distance(size: int) -> int:
        return (target - 1) // size + probe.window - probe.window // size

    for grouping in probe.groupings():
        at = torch.tensor([distance(size) for size in grouping], dtype=torch.float64)
        total = float((8 * (inv_freq * at + phase).cos()).sum())
        # one softmax in float64 of numbers below 100
        assert score(grouping) == pytest.approx(math.exp(total) / (math.exp(total) + target - 1), rel=1e-12)
    nearest = [min(probe.sizes, key=lambda size: abs(distance(size) - length)) for length in lengths]
    assert list(probe.find(score)) == nearest == [16, 2]
