"""Scaling records of every kind."""

from __future__ import annotations

import pytest

from scaled_rope import ConfigError, RopeScaling

LISTS = {"short_factor": [1.0, 1.5, 2.0, 2.0], "long_factor": [1.5, 4.0, 16.0, 32.0]}
BASE = RopeScaling("default", original_max_position_embeddings=4096, rope_theta=50000.0)
ROUND_TRIPS = [
    RopeScaling("linear", 4.0, 2048, 50000.0),
    RopeScaling("linear", 4.0, 2048, partial_rotary_factor=0.5),
    RopeScaling("yarn", 16.0, 4096),
    RopeScaling("yarn", 16.0, 4096, beta_fast=128.0, beta_slow=2.0, truncate=False),
    RopeScaling("yarn", 16.0, 4096, attention_factor=1.0),
    RopeScaling("yarn", 16.0, 4096, ramp="rotations", mscale=0.7),
    RopeScaling("yarn", 2.0, 4096, dynamic=True),
    RopeScaling("ntk", 2.0, 4096, 50000.0),
    RopeScaling("ntk", 1.0, 4096, dynamic=True),
    RopeScaling("linear", 1.0, 4096, dynamic=True, partial_rotary_factor=0.25),
    RopeScaling("ntk-by-parts", 8.0, 4096, extrapolation_factor=0.5),
    RopeScaling("part-ntk", 8.0, 4096),
    RopeScaling("part-ntk", 8.0, 4096, dynamic=True, params={"keep_above": 20.0}),
    RopeScaling("llama3", 8.0, 8192, 500000.0),
    RopeScaling("llama3", 32.0, 8192, params={"low_freq_factor": 2.0, "high_freq_factor": 8.0}),
    RopeScaling("llama3", 2.0, 8192, dynamic=True),
    RopeScaling("longrope", 32.0, 4096, params=LISTS),
    RopeScaling("longrope", 32.0, 4096, attention_factor=1.25, params=LISTS, partial_rotary_factor=0.75),
    RopeScaling("longrope", 32.0, 4096, params=LISTS, resonance=True),
    RopeScaling("abf", 1.0, 4096, params={"theta": 500000.0}),
    RopeScaling("abf", 32.0, 4096, params={"theta": 500000.0}, resonance=True),
    RopeScaling("dynamic-ntk", 4.0, 4096),
    RopeScaling("dynamic-ntk", 4.0, 4096, 50000.0, partial_rotary_factor=0.5),
    RopeScaling("ntk-mixed", 8.0, 4096),
    RopeScaling("ntk-mixed", 8.0, 4096, params={"exponent": 1.0}),
    RopeScaling("proportional", 1.0, 4096, params={"fraction": 0.25}),
    RopeScaling("proportional", 8.0, 4096),
    RopeScaling("proportional", 8.0, 4096, partial_rotary_factor=0.5, params={"fraction": 0.5}),
    RopeScaling("cope", 1.0, 4096),
    RopeScaling("cope", 8.0, 4096, params={"clip": 20, "theta": 500000.0}),
    RopeScaling("hardclip", 1.0, 4096, params={"clip": 3}),
    RopeScaling("drope", 8.0, 4096),
    RopeScaling("drope", 8.0, 4096, attention_temperature="constant", temperature_slope=0.25),
    RopeScaling("default", 1.0, 4096, resonance=True),
    RopeScaling("yarn", 16.0, 4096, resonance=True),
]


def one_line(error: pytest.ExceptionInfo[ConfigError]) -> str:
    assert "\n" not in str(error.value)
    return str(error.value)
