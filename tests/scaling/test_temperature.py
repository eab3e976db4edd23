"""Attention temperature: the formulas against float64 Python, transformers, and laws; records and specs."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from transformers.models.ministral3.modeling_ministral3 import get_llama_4_attn_scale

from scaled_rope import METHODS, RopeScaling
from scaled_rope.errors import ConfigError
from scaled_rope.scaling.frequencies import at_length
from scaled_rope.scaling.record import native_type
from scaled_rope.scaling.temperature import compute_temperature, follows_position
from tests.helpers import reference
from tests.helpers.method_variants import ALL, make, name_of

L = 24
BASE = RopeScaling("default", original_max_position_embeddings=L)
KINDS = [
    "linear:4,attention_temperature=constant,temperature_slope=0.3",
    "linear:4,attention_temperature=log",
    "linear:4,attention_temperature=log,temperature_slope=0.7",
    "default,attention_temperature=llama4",
    "rerope,window=8,attention_temperature=ministral,temperature_slope=0.25",
]


def record(spec: str) -> RopeScaling:
    return RopeScaling.from_spec(spec, BASE)


@pytest.mark.parametrize("spec", KINDS)
@pytest.mark.parametrize("window", [None, 5, 60])
def test_equals_the_definition(spec: str, window: int | None) -> None:
    scaling = record(spec)
    found = compute_temperature(scaling, torch.arange(200), window=window)
    kind, slope = scaling.attention_temperature, scaling.temperature_slope
    wanted = [reference.temperature(kind, i, L, slope, scaling.factor, window) for i in range(200)]
    assert found.dtype == torch.float64
    torch.testing.assert_close(found, torch.tensor(wanted, dtype=torch.float64), rtol=1e-14, atol=0)


def test_equals_transformers() -> None:
    positions = torch.arange(400)
    scaling = record("default,attention_temperature=ministral,temperature_slope=0.2")
    theirs = get_llama_4_attn_scale(positions[None], 0.2, L)[0, 0, :, 0]
    torch.testing.assert_close(compute_temperature(scaling, positions).float(), theirs.float())
    # The line of Llama 4's attention, which is no function of its own there.
    theirs = torch.log1p(torch.floor((positions.float() + 1.0) / L)) * 0.1 + 1.0
    found = compute_temperature(record("default,attention_temperature=llama4"), positions)
    torch.testing.assert_close(found.float(), theirs)


def test_log_is_the_quotient_of_logarithms() -> None:
    found = compute_temperature(record("default,attention_temperature=log"), torch.arange(100))
    wanted = [max(1.0, math.log(i + 1) / math.log(L)) if i else 1.0 for i in range(100)]
    torch.testing.assert_close(found, torch.tensor(wanted, dtype=torch.float64))


@pytest.mark.parametrize("spec", KINDS)
def test_changes_nothing_within_the_trained_length(spec: str) -> None:
    scaling = record(spec)
    if scaling.attention_temperature == "constant":  # follows s, not the position
        scaling = at_length(replace(scaling, factor=1.0, dynamic=True), L)
        assert not scaling.dynamic and scaling.factor == 1
    within = L - 1 if scaling.attention_temperature == "llama4" else L  # its i + 1 reaches L one token earlier
    found = compute_temperature(scaling, torch.arange(-3, within))
    assert torch.equal(found, torch.ones(3 + within, dtype=torch.float64))
    if scaling.attention_temperature != "constant":
        assert compute_temperature(scaling, torch.tensor([L + 1])) > 1


@pytest.mark.parametrize("spec", KINDS)
def test_slope_0_and_no_temperature_are_1(spec: str) -> None:
    for scaling in (replace(record(spec), temperature_slope=0.0), BASE):
        assert torch.equal(compute_temperature(scaling, torch.arange(99)), torch.ones(99, dtype=torch.float64))


def test_constant_follows_the_scale_in_effect() -> None:
    dynamic = record("dynamic-yarn,attention_temperature=constant,temperature_slope=0.5")
    lengths = torch.tensor([L // 2, 2 * L, 5 * L])
    found = compute_temperature(dynamic, torch.arange(3).expand(3, 3), lengths)
    wanted = torch.tensor([1, 1 + 0.5 * math.log(2), 1 + 0.5 * math.log(5)], dtype=torch.float64)
    torch.testing.assert_close(found, wanted[:, None].expand(3, 3))
    static = at_length(dynamic, 5 * L)
    assert not static.dynamic and torch.equal(compute_temperature(static, torch.arange(3)), found[2])
    assert follows_position(record(KINDS[1])) and not follows_position(dynamic)


@pytest.mark.parametrize("variant", ALL, ids=name_of)
@pytest.mark.parametrize("temperature", ["log", "llama4", "ministral"])
def test_goes_with_every_method_and_in_every_form(variant: dict, temperature: str) -> None:
    plain = make(variant, 64, 4.0)
    scaling = replace(plain, attention_temperature=temperature, temperature_slope=0.375)
    assert RopeScaling.from_dict(scaling.to_dict()) == scaling != plain
    config = scaling.to_config(head_dim=64)
    assert config["rope_type"] == "scaled-rope" and native_type(scaling, 64) is None  # nobody else would compute it
    assert RopeScaling.from_config(config) == scaling
    assert f"attention_temperature={temperature}, temperature_slope=0.375" in scaling.label
    if "params" not in variant and "factor" in METHODS[plain.method].fields:  # made-up lists are not for a spec
        lent = replace(BASE, original_max_position_embeddings=plain.original_max_position_embeddings)
        assert RopeScaling.from_spec(scaling.to_spec(), lent) == scaling


def test_logn_is_another_name_of_log() -> None:
    for spec in ("rerope,window=8", "leaky-rerope,window=8,k=4"):
        older, newer = record(f"{spec},logn=true"), record(f"{spec},attention_temperature=log")
        assert older == newer == record(f"{spec},logn=true,attention_temperature=log")
        assert older.to_dict() == newer.to_dict() and "logn" not in older.params
        assert record(f"{spec},logn=false") == record(f"{spec},attention_temperature=none") == record(spec)


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ("yarn:4,attention_temperature=logs", "unknown attention_temperature 'logs'; did you mean 'log'"),
        ("yarn:4,temperature_slope=0.1", "temperature_slope=0.1: belongs to an attention_temperature"),
        ("yarn:4,attention_temperature=log,temperature_slope=-1", "temperature_slope=-1.0: must be a finite number at"),
        ("yarn:4,attention_temperature=constant", "temperature_slope is missing: attention_temperature 'constant'"),
        ("default,attention_temperature=constant,temperature_slope=1", "method 'default' has no factor s"),
        ("dynamic-ntk:4,attention_temperature=constant,temperature_slope=1", "method 'dynamic-ntk' has no factor s"),
        (
            "drope,attention_temperature=constant,temperature_slope=0.9",
            "factor=1: attention_temperature 'constant' is 1 +",
        ),
        ("yarn:1,attention_temperature=constant,temperature_slope=0.9", "must be above 1, as in 'yarn:8'"),
        ("rerope,window=8,logn=true,attention_temperature=ministral", "logn=True: is attention_temperature 'log', not"),
    ],
)
def test_what_cannot_be_is_refused(spec: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said) as error:
        record(spec)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "spec", ["drope,temperature_slope=0", "dynamic-yarn,temperature_slope=0.4", "drope:2,temperature_slope=0.4"]
)
def test_a_constant_that_is_1_may_grow_or_be_meant(spec: str) -> None:
    """Slope 0 is a search's method without a temperature; under a dynamic form s is 1 for short texts alone."""
    scaling = record(f"{spec},attention_temperature=constant")
    assert RopeScaling.from_config(scaling.to_config()) == scaling


def test_the_trained_length_is_needed() -> None:
    with pytest.raises(ConfigError, match="original_max_position_embeddings is missing: attention_temperature 'log'"):
        RopeScaling("linear", 2.0, attention_temperature="log")
    with pytest.raises(ConfigError, match="original_max_position_embeddings=1: must be at least 2"):
        RopeScaling("linear", 2.0, 1, attention_temperature="log")
