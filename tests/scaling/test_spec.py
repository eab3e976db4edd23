"""The text form of a scaling, read and written."""

from __future__ import annotations

import pytest

from scaled_rope import ConfigError, RopeScaling
from tests.helpers.records import BASE, one_line


@pytest.mark.parametrize(
    ("spec", "wanted", "label"),
    [
        ("yarn:8", {"method": "yarn", "factor": 8.0}, "yarn x8"),
        ("dynamic-yarn", {"method": "yarn", "dynamic": True}, "dynamic-yarn"),
        ("dynamic-linear:2", {"method": "linear", "dynamic": True, "factor": 2.0}, "dynamic-linear x2"),
        ("dynamic-ntk-by-parts", {"method": "ntk-by-parts", "dynamic": True}, "dynamic-ntk-by-parts"),
        ("default", {"method": "default"}, "unscaled"),
        ("none", {"method": "default"}, "unscaled"),
        (
            "yarn:8, ramp=rotations, attention_factor=1.0",
            {"method": "yarn", "factor": 8.0, "ramp": "rotations", "attention_factor": 1.0},
            "yarn x8 (attention_factor=1, ramp=rotations)",
        ),
        (
            "yarn,factor=1.5,truncate=false,original_max_position_embeddings=8192,rope_theta=1e6",
            {
                "method": "yarn",
                "factor": 1.5,
                "truncate": False,
                "original_max_position_embeddings": 8192,
                "rope_theta": 1e6,
            },
            "yarn x1.5 (truncate=False)",
        ),
        ("part-ntk:4", {"method": "part-ntk", "factor": 4.0}, "part-ntk x4"),
        ("dynamic-part-ntk", {"method": "part-ntk", "dynamic": True}, "dynamic-part-ntk"),
        (
            "part-ntk:4,linear_above=0.5,keep_above=20",
            {"method": "part-ntk", "factor": 4.0, "params": {"linear_above": 0.5, "keep_above": 20.0}},
            "part-ntk x4 (linear_above=0.5, keep_above=20)",
        ),
        ("llama3:8", {"method": "llama3", "factor": 8.0}, "llama3 x8"),
        (
            "llama3:8,high_freq_factor=8,resonance=true",
            {"method": "llama3", "factor": 8.0, "resonance": True, "params": {"high_freq_factor": 8.0}},
            "llama3 x8 (resonance=True, high_freq_factor=8)",
        ),
        (
            "longrope:4,short_factor=1+1.5,long_factor=1.5+1e+2",
            {"method": "longrope", "factor": 4.0, "params": {"short_factor": [1, 1.5], "long_factor": [1.5, 100]}},
            "longrope x4 (short_factor=1+1.5, long_factor=1.5+100)",
        ),
        ("abf,theta=5e5", {"method": "abf", "params": {"theta": 5e5}}, "abf (theta=500000)"),
        ("abf:8,theta=5e+5", {"method": "abf", "factor": 8.0, "params": {"theta": 5e5}}, "abf x8 (theta=500000)"),
        ("dynamic-ntk:2", {"method": "dynamic-ntk", "factor": 2.0}, "dynamic-ntk x2"),
        ("dynamic-ntk", {"method": "dynamic-ntk"}, "dynamic-ntk"),
        ("ntk:2,dynamic=true", {"method": "ntk", "factor": 2.0, "dynamic": True}, "ntk x2 (dynamic=True)"),
        (
            "ntk-mixed:8,exponent=1",
            {"method": "ntk-mixed", "factor": 8.0, "params": {"exponent": 1.0}},
            "ntk-mixed x8 (exponent=1)",
        ),
        (
            "proportional,fraction=0.25",
            {"method": "proportional", "params": {"fraction": 0.25}},
            "proportional (fraction=0.25)",
        ),
        ("proportional:8", {"method": "proportional", "factor": 8.0}, "proportional x8"),
        ("cope", {"method": "cope"}, "cope"),
        ("cope,clip=20", {"method": "cope", "params": {"clip": 20}}, "cope (clip=20)"),
        (
            "cope:2,clip=20,theta=1e6",
            {"method": "cope", "factor": 2.0, "params": {"clip": 20, "theta": 1e6}},
            "cope x2 (clip=20, theta=1e+06)",
        ),
        ("hardclip,clip=3", {"method": "hardclip", "params": {"clip": 3}}, "hardclip (clip=3)"),
        ("default,resonance=true", {"method": "default", "resonance": True}, "unscaled (resonance=True)"),
    ],
)
def test_specs_and_labels(spec, wanted, label):
    scaling = RopeScaling.from_spec(spec, BASE)
    given = {"original_max_position_embeddings": 4096, "rope_theta": 50000.0}
    assert scaling == RopeScaling(**(given | wanted))
    assert scaling.label == label


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("", "unknown method ''"),
        ("yarnn:8", "did you mean 'yarn'"),
        ("yarn", "factor is missing"),
        ("yarn:", "factor='': must be a number"),
        ("yarn:eight", "factor='eight': must be a number"),
        ("yarn:0.5", "factor=0.5"),
        ("yarn:8,rampe=rotations", "did you mean 'ramp'"),
        ("yarn:8,method=ntk", "unknown scaling field 'method'"),
        ("yarn:8,truncate=maybe", "truncate='maybe': must be true or false"),
        ("default:2", "factor=2.0: not for method 'default'"),
        ("dynamic-none", "dynamic=True: method 'default' has no dynamic form"),
        ("dynamic-dynamic-ntk", "method 'dynamic-ntk' has no dynamic form, it is one already"),
        ("yarn:8,factor=4", "factor is given twice"),
        ("cope,clip=3,clip=4", "clip is given twice"),
        ("dynamic-yarn:8,dynamic=false", "scaling 'dynamic-yarn:8,dynamic=false': dynamic is given twice"),
        ("dynamic-yarn,dynamic=true", "dynamic is given twice"),
        ("abf", "theta is missing"),
        ("longrope,short_factor=1+2,long_factor=1+2", "factor is missing; write for example 'longrope:8'"),
        (
            "longrope:4,short_factor=1+x,long_factor=1+2",
            "short_factor='1+x': must be a number, several as 1+1.5+2, or true or false",
        ),
        ("longrope:4,short_factor=1,long_factor=1", "short_factor=1: must be a list"),
        ("cope,clip=2.5", "clip=2.5: must be a whole number"),
        ("cope,clop=2", "did you mean 'clip'"),
        ("yarn:8,clip=2", "unknown scaling field 'clip'"),
        ("yarn:8,params=1", "unknown scaling field 'params'"),
    ],
)
def test_bad_specs(spec, message):
    with pytest.raises(ConfigError) as error:
        RopeScaling.from_spec(spec, BASE)
    assert message in one_line(error)


@pytest.mark.parametrize(
    "spec",
    [
        "yarn:4,attention_factor=1.12",
        "yarn:2.5,beta_fast=16,mscale=0.9",
        "yarn:8,truncate=false,ramp=dimension",
        "llama3:8,low_freq_factor=2",
        "longrope:4,attention_factor=1.1,short_factor=1+1+1,long_factor=1+1.25+4",
    ],
)
def test_specs_are_read_back(spec: str) -> None:
    own = RopeScaling("default", original_max_position_embeddings=128, rope_theta=5e5)
    scaling = RopeScaling.from_spec(spec, own)
    assert RopeScaling.from_spec(scaling.to_spec(), own) == scaling
    assert set(scaling.to_spec().split(",")) == set(spec.split(","))


def test_a_record_of_another_length_than_the_model_says_so() -> None:
    model = RopeScaling("default", original_max_position_embeddings=256)
    scaling = RopeScaling("yarn", 4.0, 128)
    assert scaling.to_spec(model) == "yarn:4,original_max_position_embeddings=128"
    assert RopeScaling.from_spec(scaling.to_spec(model), model) == scaling
    assert RopeScaling("yarn", 4.0, 256).to_spec(model) == "yarn:4"
