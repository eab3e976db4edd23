"""The short list, and which candidates share passes."""

from __future__ import annotations

import math

import pytest

from scaled_rope import ConfigError, RopeScaling
from scaled_rope.advice.candidates import Passes, dpe_probe, factor_for, identity, sharper, short_list
from scaled_rope.attention.methods import attention_regions
from tests.helpers.advice import HEAD_DIM, OWN, TARGET, L

EMBEDDED = RopeScaling("default", original_max_position_embeddings=256)


def test_the_list_depends_on_the_model_and_the_target() -> None:
    specs = [one.spec for one in short_list(EMBEDDED, 256, 2048, 64)]
    assert specs[0] == "yarn:8" and specs[1] == "dynamic-yarn"
    assert {"ntk-by-parts:8", "ntk:8", "ntk:16", "llama3:8", "linear:8", "dynamic-ntk"} <= set(specs)
    assert "yarn:8,beta_fast=8,beta_slow=0.25" in specs  # the paper's constants leave one pair of 32 unscaled here
    assert {"dual-chunk,chunk=192", "rerope,window=128", "self-extend,group=11,window=64"} <= set(specs)
    assert len([spec for spec in specs if "attention_factor" in spec]) == 2
    assert not any("longrope" in spec for spec in specs)
    large = [one.spec for one in short_list(RopeScaling("default", 1, 8192, 1e5), 8192, 16384, 64)]
    assert large[0] == "yarn:2" and not any("beta" in spec for spec in large)  # there the constants fit


@pytest.mark.parametrize("target", [300, 512, 2048, 6000])
def test_self_extend_stays_within_the_trained_length(target: int) -> None:
    import torch

    listed = [one.scaling for one in short_list(EMBEDDED, 256, target, 64) if one.scaling.method == "self-extend"]
    assert listed
    for scaling in listed:
        far = attention_regions(scaling).near_to_far[-1]
        positions = torch.arange(target)
        assert int((far.query(positions) - far.key(positions)[0]).max()) <= 256


def test_what_computes_the_same_is_tried_once_and_the_users_come_first() -> None:
    also = ["longrope:8,short_factor=" + "+".join(["1"] * 8) + ",long_factor=" + "+".join(["2"] * 8), "yarn:8"]
    found = short_list(OWN, L, TARGET, HEAD_DIM, also)
    assert [one.spec for one in found[:2]] == also
    assert [one.spec for one in found].count("yarn:8") == 1
    assert [one.spec for one in short_list(OWN, L, TARGET, HEAD_DIM, ["linear:8", "default"], only=True)] == [
        "linear:8"
    ]
    keys = [identity(one.scaling, TARGET, HEAD_DIM) for one in found if not one.scaling.is_length_dependent]
    assert len(set(keys)) == len(keys)
    with pytest.raises(ConfigError, match="unknown method 'yan'"):
        short_list(OWN, L, TARGET, HEAD_DIM, ["yan:8"])


def test_a_model_with_a_scaling_is_tried_under_its_own() -> None:
    own = RopeScaling("yarn", 8, 256, beta_fast=8.0)
    found = short_list(own, 2048, 4096, 64)
    assert [one.spec for one in found] == ["checkpoint:16", "dynamic-yarn:8,beta_fast=8"]
    assert found[0].scaling == RopeScaling("yarn", 16, 256, beta_fast=8.0)
    assert found[1].scaling.dynamic and found[1].scaling.factor == 8
    rerope = RopeScaling.from_spec("rerope,window=128", EMBEDDED)
    assert short_list(rerope, 256, 4096, 64) == []


def test_a_factor_that_does_not_say_the_length_grows_with_it() -> None:
    """Llama 3.1 works to 131072 tokens at a factor of 8 and L = 8192: twice as many take 16, and 16 is not dynamic."""
    own = RopeScaling("llama3", 8, 8192)
    assert [one.spec for one in short_list(own, 131072, 262144, 64)] == ["checkpoint:16"]


def test_an_attention_factor_follows_the_length_as_well() -> None:
    own = RopeScaling("yarn", 4, 256, attention_factor=RopeScaling("yarn", 4, 256, mscale=0.7).static_attention_factor)
    static, following = short_list(own, 1024, 2048, 64)
    assert static.spec == "checkpoint:8" and following.spec == "dynamic-yarn:4,mscale=0.7"
    assert static.scaling.static_attention_factor == pytest.approx(1 + 0.07 * math.log(8))
    assert identity(static.scaling, 2048, 64) == identity(following.scaling, 2048, 64)
    assert identity(own, 1024, 64) == identity(following.scaling, 1024, 64)
    below = short_list(RopeScaling("yarn", 4, 256, attention_factor=0.9), 1024, 2048, 64)
    assert below[1].spec == "dynamic-yarn:4,attention_factor=0.9"  # no mscale gives less than 1


def test_temperatures_are_near_their_own_and_only_where_there_is_none() -> None:
    found = {one.spec: sharper(one, 2048) for one in short_list(EMBEDDED, 256, 2048, 64)}
    assert [spec for spec, some in found.items() if not some] == [
        spec for spec in found if spec.startswith(("yarn", "dynamic-yarn"))
    ]
    slope = 1 / math.log(256)
    for spec, some in found.items():
        if some:
            half, whole = some
            assert whole.spec == f"{spec},attention_temperature=log"
            assert whole.scaling.effective_temperature_slope == pytest.approx(slope)
            assert half.scaling.effective_temperature_slope == pytest.approx(slope / 2, abs=5e-5)  # four decimals
            assert half.scaling.method == whole.scaling.method == spec.partition(":")[0].partition(",")[0]
            assert sharper(whole, 2048) == []
    (rerope,) = [some[1].scaling for spec, some in found.items() if spec.startswith("rerope")]
    assert rerope == RopeScaling.from_spec("rerope,window=128,logn=true", EMBEDDED)  # its source's own form


def test_which_models_are_probed_for_groups() -> None:
    probe = dpe_probe(EMBEDDED, 256, 2048, 64)
    assert probe is not None and (probe.groups, probe.window, probe.reference) == (8, 32, 16)
    assert dpe_probe(EMBEDDED, 256, 2048, 6).groups == 3  # type: ignore[union-attr]
    assert dpe_probe(EMBEDDED, 256, 2048, 2) is dpe_probe(EMBEDDED, 7, 2048, 64) is None
    assert dpe_probe(RopeScaling("yarn", 8, 256), 2048, 4096, 64) is None


def test_equal_scalings_share_passes() -> None:
    dynamic = RopeScaling.from_spec("dynamic-yarn", OWN)
    yarn = RopeScaling.from_spec("yarn:8", OWN)
    passes = Passes([OWN, yarn, dynamic], [64, 128, 256, 512], HEAD_DIM)
    assert passes.at(dynamic, 512) is passes.at(yarn, 512) is passes.at(yarn, 64) == yarn
    assert passes.at(dynamic, 64) == OWN and passes.at(dynamic, 128) == RopeScaling.from_spec("yarn:2", OWN)
    assert passes.longest(yarn) == 512 and passes.longest(passes.at(dynamic, 128)) == 128
    stepped = RopeScaling.from_spec("dynamic-yarn:1,dynamic_step=2", OWN)
    passes.add([stepped])
    assert passes.at(stepped, 512) is passes.at(yarn, 512)  # one that comes later joins those that there are


def test_factors() -> None:
    assert [factor_for(*one) for one in ((2048, 256), (600, 256), (1000, 300))] == ["8", "2.34375", "3.3334"]
    assert RopeScaling.from_spec(f"yarn:{factor_for(1000, 300)}", RopeScaling("default", 1, 300)).factor * 300 >= 1000
