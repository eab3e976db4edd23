"""The scaling record: validation, names, and dictionaries."""

from __future__ import annotations

import json
import pickle
import subprocess
import sys
from copy import deepcopy
from dataclasses import FrozenInstanceError, replace
from typing import Any

import pytest
from transformers import LlamaConfig, PreTrainedConfig

from scaled_rope import ConfigError, RopeScaling
from scaled_rope.scaling.hf_config import config_head_dim
from scaled_rope.scaling.record import RopeSettings
from scaled_rope.scaling.resolve import resolve_scaling
from tests.helpers.published_configs import LLAMA3
from tests.helpers.records import BASE, LISTS, ROUND_TRIPS, one_line


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"method": "yarm"}, "unknown method 'yarm'; did you mean 'yarn'?"),
        ({"method": "zzz"}, "known: abf, cope, default"),
        ({"method": ["yarn"]}, "unknown method"),
        ({"factor": 0.5}, "factor=0.5: must be a finite number at least 1"),
        ({"factor": float("nan")}, "factor=nan"),
        ({"factor": float("inf")}, "factor=inf"),
        ({"factor": "8"}, "factor='8'"),
        ({"factor": True}, "factor=True"),
        ({"factor": None}, "factor=None"),
        ({"original_max_position_embeddings": None}, "original_max_position_embeddings is missing"),
        ({"original_max_position_embeddings": 0}, "original_max_position_embeddings=0"),
        ({"original_max_position_embeddings": 4096.5}, "original_max_position_embeddings=4096.5"),
        ({"rope_theta": 1.0}, "rope_theta=1.0: must be a finite number above 1"),
        ({"rope_theta": -1e4}, "rope_theta"),
        (
            {"partial_rotary_factor": 0},
            "partial_rotary_factor=0: must be a finite number above 0 and at most 1",
        ),
        ({"partial_rotary_factor": 1.5}, "partial_rotary_factor=1.5"),
        ({"dynamic": "yes"}, "dynamic='yes': must be true or false"),
        ({"dynamic_step": 2.0}, "dynamic_step=2: is for dynamic scaling"),
        ({"dynamic": True, "dynamic_step": 1}, "dynamic_step=1: must be a finite number above 1"),
        ({"resonance": 1}, "resonance=1: must be true or false"),
        ({"attention_factor": 0.0}, "attention_factor=0.0"),
        ({"mscale": -1.0}, "mscale=-1.0"),
        ({"ramp": "rotation"}, "unknown ramp 'rotation'; did you mean 'rotations'?"),
        ({"truncate": 1}, "truncate=1"),
        ({"truncate": False, "ramp": "rotations"}, "truncate=False: ramp 'rotations'"),
        ({"beta_fast": 0.9}, "beta_fast=0.9: must be at least beta_slow=1"),
        ({"beta_slow": 40}, "beta_fast=32: must be at least beta_slow=40"),
        ({"extrapolation_factor": 1.5}, "extrapolation_factor=1.5"),
        ({"params": {"window": 1}}, "unknown parameter of method 'yarn' 'window'"),
        ({"params": 3}, "params=3"),
        (
            {"method": "linear", "ramp": "rotations"},
            "ramp='rotations': not for method 'linear', which takes dynamic",
        ),
        ({"method": "ntk-by-parts", "attention_factor": 1.1}, "attention_factor=1.1: not for method"),
        ({"method": "default"}, "factor=8.0: not for method 'default', which takes no such field"),
        (
            {"method": "default", "factor": 1, "dynamic": True},
            "dynamic=True: method 'default' has no dynamic form, it has no scale",
        ),
        ({"method": "dynamic-ntk", "dynamic": True}, "has no dynamic form, it is one already"),
        ({"factor": 1e10}, "factor=10000000000.0: must be a finite number at least 1 and at most 1e+09"),
        ({"factor": 10**400}, "factor=1000"),
        ({"rope_theta": 1e31}, "rope_theta=1e+31"),
        ({"attention_factor": 1e-9}, "attention_factor=1e-09: must be a finite number at least 1e-06"),
        ({"beta_slow": 1e-300}, "beta_slow=1e-300"),
        ({"original_max_position_embeddings": 2**53 + 1}, "at most 2^53"),
        ({"method": "abf"}, "theta is missing: method 'abf' needs it"),
        ({"method": "abf", "params": {"theta": 1.0}}, "theta=1.0: must be a finite number above 1"),
        ({"method": "abf", "params": {"theta": "1e6"}}, "theta='1e6'"),
        ({"method": "longrope"}, "short_factor is missing: method 'longrope' needs it"),
        ({"method": "longrope", "params": {"short_factor": [1.0]}}, "long_factor is missing"),
        (
            {"method": "longrope", "params": LISTS | {"long_factor": [1.0]}},
            "long_factor has 1 numbers: must have as many",
        ),
        ({"method": "longrope", "params": LISTS | {"long_factor": []}}, "long_factor=[]: must be a list"),
        ({"method": "longrope", "params": LISTS | {"long_factor": [1, 2, 0, 4]}}, "long_factor holds 0"),
        (
            {"method": "llama3", "params": {"low_freq_factor": 5.0}},
            "high_freq_factor=4: must be at least low_freq_factor=5",
        ),
        ({"method": "llama3", "params": {"low_freq": 4.0}}, "did you mean 'low_freq_factor'"),
        ({"method": "part-ntk", "params": {"linear_above": 1.5}}, "linear_above=1.5 must be below ntk_above=1.25"),
        ({"method": "ntk-mixed", "params": {"exponent": 0}}, "exponent=0: must be a finite number above 0"),
        (
            {"method": "proportional", "params": {"fraction": 1.5}},
            "fraction=1.5: must be a finite number above 0 and at",
        ),
        ({"method": "cope", "params": {"clip": 0}}, "clip=0: must be a whole number, at least 1"),
        ({"method": "hardclip", "params": {"clip": 2.0}}, "clip=2.0: must be a whole number"),
        ({"method": "cope", "params": {"clip": True}}, "clip=True"),
        ({"method": "cope", "beta_fast": 16.0}, "beta_fast=16.0: not for method 'cope', which takes factor"),
        ({"method": "llama3", "attention_factor": 1.1}, "attention_factor=1.1: not for method 'llama3'"),
        ({"method": "linear", "params": {"theta": 2.0}}, "unknown parameter of method 'linear' 'theta'"),
    ],
)
def test_bad_records_are_one_clear_line(fields, message):
    good = {"method": "yarn", "factor": 8.0, "original_max_position_embeddings": 4096}
    RopeScaling(**good)
    with pytest.raises(ConfigError) as error:
        RopeScaling(**(good | fields))
    assert message in one_line(error)


def test_only_methods_with_l_in_their_formula_need_it():
    for method in ("linear", "ntk"):
        RopeScaling(method, 2.0)
        with pytest.raises(ConfigError, match="original_max_position_embeddings is missing"):
            RopeScaling(method, dynamic=True)


def test_a_record_is_a_value():
    scaling = RopeScaling("yarn", 8, 4096, 10000)
    assert scaling == RopeScaling("yarn", 8.0, 4096) and hash(scaling) == hash(RopeScaling("yarn", 8.0, 4096))
    assert type(scaling.factor) is float and type(scaling.rope_theta) is float
    assert deepcopy(scaling) == scaling == pickle.loads(pickle.dumps(scaling))
    assert replace(scaling, factor=16).factor == 16.0
    assert repr(scaling) == "RopeScaling(method='yarn', factor=8.0, original_max_position_embeddings=4096)"
    with pytest.raises(FrozenInstanceError):
        scaling.factor = 2.0


def test_derived_properties():
    assert RopeScaling("yarn", 1.5, 4096).max_position_embeddings == 6144
    assert RopeScaling("linear", 2).max_position_embeddings is None
    assert RopeScaling("yarn", 1, 4096, dynamic=True).is_length_dependent
    assert not RopeScaling("yarn", 8, 4096).is_length_dependent
    assert RopeScaling("longrope", 4, 4096, params=LISTS).is_length_dependent
    assert RopeScaling("dynamic-ntk", 4, 4096).is_length_dependent
    assert RopeScaling("dynamic-ntk", 4, 4096).max_position_embeddings == 4096  # its factor is no length
    assert RopeScaling("cope", 4, 4096).max_position_embeddings == 16384
    longrope = RopeScaling("longrope", 16, 4096, params=LISTS)
    assert longrope.static_attention_factor == pytest.approx((1 + 4 / 12) ** 0.5)  # sqrt(1 + ln 2^4 / ln 2^12)
    assert RopeScaling("longrope", 16, 1, params=LISTS).static_attention_factor == 1.0
    assert RopeScaling("llama3", 16, 4096).static_attention_factor == 1.0


def test_labels_tell_records_apart():
    records = [
        *ROUND_TRIPS,
        RopeScaling("ntk", 2.0, 4096, dynamic=True),
        RopeScaling("dynamic-ntk", 2.0, 4096),
        RopeScaling("longrope", 4.0, 64, params={"short_factor": [1.0] * 48, "long_factor": [2.0] * 48}),
        RopeScaling("longrope", 4.0, 64, params={"short_factor": [1.0] * 48, "long_factor": [2.0] * 47 + [3.0]}),
        RopeScaling("linear", 4.0000001),
        RopeScaling("linear", 4.0),
        RopeScaling("yarn", 8.0, 64, beta_fast=16.00000001),
        RopeScaling("yarn", 8.0, 64, beta_fast=16.0),
    ]
    # What a label leaves out describes the model; and dynamic-ntk with factor 1 is the dynamic form of ntk.
    seen: dict[str, RopeScaling] = {}
    for scaling in records:
        model = {"rope_theta": 1e4, "original_max_position_embeddings": 64, "partial_rotary_factor": 1.0}
        same = seen.setdefault(scaling.label, replace(scaling, **model))
        assert same == replace(scaling, **model), scaling.label
        assert len(scaling.label) < 100


@pytest.mark.parametrize("scaling", [BASE, *ROUND_TRIPS], ids=lambda s: s.label)
def test_dictionary_round_trip(scaling):
    values = json.loads(json.dumps(scaling.to_dict()))
    assert RopeScaling.from_dict(values) == scaling
    with pytest.raises(ConfigError, match="did you mean 'factor'"):
        RopeScaling.from_dict(values | {"facter": 2.0})
    with pytest.raises(ConfigError, match="method is missing"):
        RopeScaling.from_dict({"factor": 2.0})


@pytest.mark.parametrize(
    ("config", "wanted"),
    [
        ({"head_dim": 48, "hidden_size": 64, "num_attention_heads": 4}, 48),
        ({"hidden_size": 64, "num_attention_heads": 4}, 16),
        ({"hidden_size": 64}, None),
        ({"hidden_size": 64, "num_attention_heads": 0}, None),
        ({"head_dim": "x"}, None),
        ({"hidden_size": "64", "num_attention_heads": [4]}, None),
        (LlamaConfig(hidden_size=64, num_attention_heads=4), 16),
    ],
)
def test_head_dim_of_a_config(config: dict[str, Any] | PreTrainedConfig, wanted: int | None):
    assert config_head_dim(config) == wanted


def test_config_module_needs_no_torch():
    """The record must load where torch does not; the package itself imports torch, so load the file alone."""
    code = (
        "import sys, types\n"
        "package = types.ModuleType('scaled_rope')\n"
        f"package.__path__ = [{str(__import__('scaled_rope').__path__[0])!r}]\n"
        "sys.modules['scaled_rope'] = package\n"
        "import scaled_rope.scaling.record\n"
        "assert 'torch' not in sys.modules and 'transformers' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


UNSCALED = RopeScaling("default", original_max_position_embeddings=32)
TUNED = RopeScaling("yarn", factor=4.0, original_max_position_embeddings=32, beta_fast=16.0)


@pytest.mark.parametrize(
    ("spec", "own", "expected"),
    [
        ("checkpoint", TUNED, TUNED),
        ("checkpoint:16", TUNED, {**TUNED.to_dict(), "factor": 16.0}),
        ("default", TUNED, UNSCALED.to_dict()),
        ("yarn:2", TUNED, {"method": "yarn", "factor": 2.0, "original_max_position_embeddings": 32}),
        (
            "dynamic-yarn:checkpoint",
            TUNED,
            {"method": "yarn", "factor": 4.0, "dynamic": True, "original_max_position_embeddings": 32},
        ),
        ("linear:checkpoint", TUNED, {"method": "linear", "factor": 4.0, "original_max_position_embeddings": 32}),
    ],
)
def test_what_a_spec_means(spec: str, own: RopeScaling, expected: RopeScaling | dict[str, object]) -> None:
    wanted = expected if isinstance(expected, RopeScaling) else RopeScaling.from_dict(expected)
    assert resolve_scaling(spec, own) == wanted


@pytest.mark.parametrize("spec", ["checkpoint:x", "checkpoint:2,truncate=false"])
def test_bad_checkpoint_spec(spec: str) -> None:
    with pytest.raises(ConfigError, match="checkpoint"):
        resolve_scaling(spec, TUNED)


def test_another_factor_takes_the_attention_factor_along() -> None:
    """What a config says as a number is 1 + c·ln s at its own s."""
    own = RopeScaling(
        "yarn", 4.0, 32, attention_factor=RopeScaling("yarn", 4.0, 32, mscale=0.7).static_attention_factor
    )
    for factor in (1.0, 2.0, 8.0):
        found = resolve_scaling(f"checkpoint:{factor:g}", own)
        expected = RopeScaling("yarn", factor, 32, mscale=0.7)
        assert found.static_attention_factor == pytest.approx(expected.static_attention_factor, rel=1e-12)
        assert replace(found, attention_factor=None, mscale=0.7) == expected
    assert resolve_scaling("checkpoint:4", own) == own
    below = resolve_scaling("checkpoint:16", replace(own, attention_factor=0.95))
    assert below.attention_factor == pytest.approx(0.9)
    with pytest.raises(ConfigError, match=r"0\.4 at factor 4, would be -0\.2 at 16 by YaRN's law: name it"):
        resolve_scaling("checkpoint:16", replace(own, attention_factor=0.4))
    assert resolve_scaling("checkpoint:8", replace(own, attention_factor=1.0)).attention_factor == 1  # NTK-by-parts
    follows = replace(own, dynamic=True)
    assert resolve_scaling("checkpoint:8", follows) == replace(follows, factor=8.0)  # one number for all lengths
    assert resolve_scaling("checkpoint:8", replace(own, attention_factor=None)).attention_factor is None


def test_a_factor_for_which_a_checkpoint_has_no_numbers() -> None:
    lists = {"short_factor": [1.0, 1.0], "long_factor": [2.0, 4.0]}
    longrope = RopeScaling("longrope", 32.0, 4096, params=lists)
    assert resolve_scaling("checkpoint:32", longrope) == longrope
    said = "scaling 'checkpoint:64' is not allowed; the checkpoint's lists of divisors are for its own factor, 32"
    with pytest.raises(ConfigError, match=said):
        resolve_scaling("checkpoint:64", longrope)
    with pytest.raises(ConfigError, match=r"1\.2 at factor 1, does not say the one at 8: name it, as in yarn:8,"):
        resolve_scaling("checkpoint:8", RopeScaling("yarn", 1.0, 32, attention_factor=1.2))


def test_a_factor_that_does_not_say_the_length() -> None:
    """Llama 3.1 is for 131072 tokens at a factor of 8 and L = 8192."""
    settings = RopeSettings(LLAMA3)
    own = settings.scaling
    assert own.max_position_embeddings == 65536 and settings.length_for(own) == 131072
    assert settings.length_for(replace(own, original_max_position_embeddings=4096)) == 131072  # L corrected
    assert settings.length_for(resolve_scaling("checkpoint:16", own)) == 262144
    assert settings.length_for(resolve_scaling("llama3:4,high_freq_factor=8", own)) == 32768  # not what it carries
    assert settings.length_for(resolve_scaling("yarn:4", own)) == 32768
    assert settings.length_for(resolve_scaling("dynamic-ntk:2", own)) == 8192
    assert RopeSettings(LLAMA3 | {"max_position_embeddings": None}).length_for(own) == 65536
    base = RopeSettings({"max_position_embeddings": 8192})
    assert base.length_for(resolve_scaling("llama3:8", base.scaling)) == 65536
    assert base.length_for(RopeScaling("linear", 8)) is None
