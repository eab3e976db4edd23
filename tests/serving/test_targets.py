"""The table of targets, and the formulas that several of them share."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch

from scaled_rope import RopeScaling, compute_rope
from scaled_rope.serving.targets import arithmetic, servers
from scaled_rope.serving.targets.common import ServedModel
from scaled_rope.serving.targets.registry import TARGETS
from tests.helpers.facts import YARN

DIM = 64


def rope_of(scaling: RopeScaling) -> dict[str, Any]:
    return scaling.to_config(head_dim=DIM)


def close(theirs: list[float], scaling: RopeScaling) -> bool:
    ours, _ = compute_rope(scaling, DIM)
    return torch.allclose(torch.tensor(theirs, dtype=torch.float64), ours.double(), rtol=1e-6, atol=0)


def test_each_target_is_complete() -> None:
    names = ["transformers", "vllm", "sglang", "llama.cpp", "mlx", "exllamav3", "ollama", "trl", "verl"]
    assert list(TARGETS) == names
    for name, target in TARGETS.items():
        assert target.name == name and target.title and target.version and target.config_place
        # Only the program that can follow the length of a sequence gives no reason why not.
        assert bool(target.static) == (name != "transformers")
        assert ("{flags}" in target.command) == (name in ("vllm", "sglang", "llama.cpp"))
        # Each says which release it is about, and whether that was run.
        assert target.basis.startswith(("run: ", "read from the source of ")) and "run" in target.basis
        assert bool(target.package) == bool(target.package_version) == (name not in ("transformers", "ollama"))


def test_a_length_says_the_attention_factor_where_there_is_no_other_word() -> None:
    class Config:
        rope_parameters: dict[str, Any] = {}

    rope = servers.table_with_length(ServedModel(YARN, Config(), DIM, 32768))
    original = rope["original_max_position_embeddings"]
    factor = math.sqrt(1 + math.log(32768 / original) / math.log(original))
    assert factor == pytest.approx(1.2079441541679836, rel=1e-9)
    plain = ServedModel(dataclasses.replace(YARN, attention_factor=1.0), Config(), DIM, 32768)
    assert servers.table_with_length(plain)["original_max_position_embeddings"] == 32768


@pytest.mark.parametrize("ramp", [{}, {"beta_fast": 64.0, "beta_slow": 2.0}, {"truncate": False}])
def test_the_servers_yarn_is_ours(ramp: dict[str, Any]) -> None:
    scaling = RopeScaling("yarn", 8.0, 4096, **ramp)
    assert close(servers.yarn_frequencies(rope_of(scaling), DIM), scaling)
    unblended = servers.yarn_frequencies(rope_of(scaling) | {"extrapolation_factor": 0.0}, DIM)
    assert close(unblended, RopeScaling("linear", 8.0, 4096))


@pytest.mark.parametrize(
    "scaling",
    [
        RopeScaling("default"),
        RopeScaling("linear", 4.0),
        RopeScaling("llama3", 8.0, 8192, params={"low_freq_factor": 1.0, "high_freq_factor": 4.0}),
        RopeScaling("llama3", 8.0, 8192, params={"low_freq_factor": 1.0, "high_freq_factor": 1.0}),
    ],
)
def test_the_servers_plain_types_are_ours(scaling: RopeScaling) -> None:
    assert close(servers.plain_frequencies(rope_of(scaling), DIM), scaling)


def test_two_mscales_count_as_a_quotient() -> None:
    pair = servers.mscale_pair({"factor": 40.0, "mscale": 0.7, "mscale_all_dim": 1.0})
    assert pair == pytest.approx((1 + 0.07 * math.log(40)) / (1 + 0.1 * math.log(40)))
    assert servers.mscale_pair({"factor": 40.0, "mscale": 0.7}) is None
    assert servers.mscale_pair({"factor": 40.0, "mscale": 0.7, "mscale_all_dim": 0}) is None


def test_longrope_takes_one_of_two_lists() -> None:
    rope = {"rope_theta": 1e4, "original_max_position_embeddings": 64, "short_factor": [1.0] * 4}
    rope |= {"long_factor": [2.0] * 4, "long_mscale": 1.5}
    own = arithmetic.powers(1e4, 8)
    assert servers.longrope_numbers(rope, 8, False, 64) == (own, 1.0)
    # Without an mscale the factor follows from both lengths.
    assert servers.longrope_numbers(rope, 8, False, 4096)[1] == pytest.approx(
        math.sqrt(1 + math.log(64) / math.log(64))
    )
    assert servers.longrope_numbers(rope, 8, True, 4096) == ([value / 2 for value in own], 1.5)


def test_a_table_says_the_attention_factor_in_the_servers_words() -> None:
    class Config:
        rope_parameters: dict[str, Any] = {}

    rope = servers.table_with_mscales(ServedModel(YARN, Config(), DIM, 32768))
    assert rope["short_mscale"] == rope["long_mscale"] == rope["attention_factor"] == pytest.approx(1.2079441541679836)
    assert servers.longrope_numbers(rope, DIM, True, 32768)[1] == rope["attention_factor"]
    assert close(servers.longrope_numbers(rope, DIM, True, 32768)[0], YARN)


def test_the_ends_of_the_ramp_are_rounded_outwards_and_clamped() -> None:
    low, high = arithmetic.correction_range(DIM, 1e4, 4096, 32, 1, truncate=False)
    assert arithmetic.correction_range(DIM, 1e4, 4096, 32, 1, truncate=True) == (math.floor(low), math.ceil(high))
    assert arithmetic.correction_range(DIM, 1e4, 4, 32, 1, truncate=False)[0] == 0
    assert arithmetic.correction_range(DIM, 1e4, 1e12, 32, 1e-9, truncate=False)[1] == DIM - 1


def test_a_blend_keeps_what_is_below_the_ramp() -> None:
    own = [1.0, 0.5, 0.25, 0.125]
    assert arithmetic.blend(own, 4.0, 1, 2) == [1.0, 0.5, 0.25 * (0.5 + 0.5 / 4), 0.03125]
    assert arithmetic.blend(own, 4.0, 1, 2, kept=0.0) == [value / 4 for value in own]


def test_yarns_attention_factor() -> None:
    assert arithmetic.yarn_attention(0.5) == arithmetic.yarn_attention(1.0) == 1.0
    assert arithmetic.yarn_attention(math.e) == pytest.approx(1.1)
