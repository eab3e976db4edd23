"""Formulas on plain numbers, against the equations worked out by hand."""

from __future__ import annotations

import math

import pytest
import torch

from scaled_rope.errors import ConfigError
from scaled_rope.scaling.formulas import (
    attention_factor_of,
    dynamic_ntk_scale,
    longrope_attention_factor,
    ntk_theta,
)


def test_ntk_base_puts_the_lowest_frequency_at_its_interpolated_value() -> None:
    theta = ntk_theta(10000.0, 8.0, 128)
    assert theta == pytest.approx(10000 * 8 ** (128 / 126))
    assert theta ** -(126 / 128) == pytest.approx(10000 ** -(126 / 128) / 8)
    assert torch.allclose(
        ntk_theta(10000.0, torch.tensor([1.0, 8.0]).double(), 128), torch.tensor([1e4, theta]).double()
    )
    with pytest.raises(ConfigError, match="at least 4"):
        ntk_theta(10000.0, 8.0, 2)


def test_attention_factors() -> None:
    assert attention_factor_of(math.log(16), 1.0) == pytest.approx(1.2772588722)
    assert attention_factor_of(0.0, 0.7) == 1
    assert longrope_attention_factor(32, 4096) == pytest.approx(math.sqrt(1 + math.log(32) / math.log(4096)))
    assert longrope_attention_factor(1, 4096) == longrope_attention_factor(4, 1) == 1


def test_the_scale_of_transformers_dynamic_type() -> None:
    assert dynamic_ntk_scale(2.0, 1.0) == 1 and dynamic_ntk_scale(2.0, 3.0) == 5
