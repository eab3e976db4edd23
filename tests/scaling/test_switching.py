"""Scalings that begin at the original length."""

from __future__ import annotations

import pytest
import torch

from scaled_rope.errors import ConfigError
from scaled_rope.scaling.frequencies import compute_rope
from scaled_rope.scaling.record import RopeScaling
from scaled_rope.scaling.switching import original_up_to_l
from scaled_rope.scaling.temperature import compute_temperature

BASE = RopeScaling("default", original_max_position_embeddings=256)
D = 64


def scaling(spec: str) -> RopeScaling:
    return RopeScaling.from_spec(spec, BASE)


@pytest.mark.parametrize(
    "spec", ["yarn:8", "linear:4", "ntk:8", "ntk-by-parts:8", "llama3:8", "yarn:8,attention_factor=1.3"]
)
def test_original_up_to_l_and_scaled_beyond(spec: str) -> None:
    static = scaling(spec)
    switching = original_up_to_l(static, D)
    plain, _ = compute_rope(BASE, D)
    scaled, factor = compute_rope(static, D)
    for length in (1, 255, 256):
        found, attention = compute_rope(switching, D, length)
        assert torch.equal(found, plain) and attention == factor
    for length in (257, 2048):
        found, attention = compute_rope(switching, D, length)
        torch.testing.assert_close(found, scaled, rtol=1e-6, atol=0)  # two roundings of float32: 1.2e-7
        assert attention == factor
    assert switching.max_position_embeddings == static.max_position_embeddings
    assert switching.is_native(D)  # transformers reads it


def test_an_attention_temperature_is_kept() -> None:
    static = scaling("yarn:8,attention_temperature=log,temperature_slope=0.2")
    positions = torch.arange(0, 3000, 500)
    expected = compute_temperature(static, positions)
    assert torch.equal(compute_temperature(original_up_to_l(static, D), positions), expected) and expected.max() > 1
    constant = scaling("yarn:8,attention_temperature=constant,temperature_slope=0.2")
    assert compute_temperature(original_up_to_l(constant, D), positions).min() > 1


@pytest.mark.parametrize("spec", ["dynamic-yarn", "dynamic-ntk"])
def test_one_that_follows_the_length_is_kept(spec: str) -> None:
    assert original_up_to_l(scaling(spec), D) == scaling(spec)


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ("rerope,window=64", "changes attention"),
        ("hardclip:8", "stand still"),
        ("dynamic-yarn,resonance=true", "at L = 256 its frequencies are not the model"),
    ],
)
def test_what_is_refused(spec: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        original_up_to_l(scaling(spec), D)


def test_without_a_length() -> None:
    with pytest.raises(ConfigError, match="original_max_position_embeddings is missing"):
        original_up_to_l(RopeScaling("linear", 4.0), D)
