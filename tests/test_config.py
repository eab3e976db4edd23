"""The scaling record: validation, names, specs, and reading and writing the configs of models."""

from __future__ import annotations

import json
import pickle
import subprocess
import sys
import warnings
from copy import deepcopy
from dataclasses import FrozenInstanceError, replace

import pytest
import torch
from transformers import LlamaConfig, MistralConfig

from scaled_rope import METHODS, ConfigError, RopeScaling, compute_rope

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
]


def one_line(error: pytest.ExceptionInfo[ConfigError]) -> str:
    assert "\n" not in str(error.value)
    return str(error.value)


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
        ({"dynamic": True, "dynamic_step": 2.0}, "only continuous dynamic scaling is available"),
        ({"resonance": 1}, "resonance=1: must be true or false"),
        ({"attention_factor": 0.0}, "attention_factor=0.0"),
        ({"mscale": -1.0}, "mscale=-1.0"),
        ({"ramp": "rotation"}, "unknown ramp 'rotation'; did you mean 'rotations'?"),
        ({"truncate": 1}, "truncate=1"),
        ({"truncate": False, "ramp": "rotations"}, "truncate=False: ramp 'rotations'"),
        ({"beta_fast": 1.0}, "beta_fast=1: must be above beta_slow=1"),
        ({"beta_slow": 40}, "beta_fast=32: must be above beta_slow=40"),
        ({"extrapolation_factor": 1.5}, "extrapolation_factor=1.5"),
        ({"params": {"window": 1}}, "unknown parameter of method 'yarn' 'window'"),
        ({"params": 3}, "params=3"),
        (
            {"method": "linear", "ramp": "rotations"},
            "ramp='rotations': not for method 'linear', which takes dynamic",
        ),
        ({"method": "ntk-by-parts", "attention_factor": 1.1}, "attention_factor=1.1: not for method"),
        ({"method": "default"}, "factor=8.0: not for method 'default', which takes no such field"),
        ({"method": "default", "factor": 1, "dynamic": True}, "dynamic=True: not for method 'default'"),
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
        ("dynamic-none", "dynamic=True: not for method 'default'"),
    ],
)
def test_bad_specs(spec, message):
    with pytest.raises(ConfigError) as error:
        RopeScaling.from_spec(spec, BASE)
    assert message in one_line(error)


@pytest.mark.parametrize("scaling", [BASE, *ROUND_TRIPS], ids=lambda s: s.label)
def test_dictionary_round_trip(scaling):
    values = json.loads(json.dumps(scaling.to_dict()))
    assert RopeScaling.from_dict(values) == scaling
    with pytest.raises(ConfigError, match="did you mean 'factor'"):
        RopeScaling.from_dict(values | {"facter": 2.0})
    with pytest.raises(ConfigError, match="method is missing"):
        RopeScaling.from_dict({"factor": 2.0})


@pytest.mark.parametrize("scaling", ROUND_TRIPS, ids=lambda s: s.label)
@pytest.mark.parametrize("dialect", ["rope_parameters", "rope_scaling"])
def test_config_round_trip(scaling, dialect):
    """Both dialects, as a config.json and through a config object of transformers."""
    written = scaling.to_config(dialect)
    assert ("rope_theta" in written) == (dialect == "rope_parameters")
    assert ("type" in written) == (dialect == "rope_scaling")
    config = {
        "model_type": "llama",
        "hidden_size": 64,
        "num_attention_heads": 2,
        "max_position_embeddings": 12345,
        dialect: json.loads(json.dumps(written)),
    }
    if dialect == "rope_scaling":
        config["rope_theta"] = scaling.rope_theta
    assert RopeScaling.from_config(config) == scaling
    assert RopeScaling.from_config(LlamaConfig(**deepcopy(config))) == scaling
    if dialect == "rope_parameters":
        assert RopeScaling.from_config(written) == scaling


@pytest.mark.parametrize("dialect", ["rope_parameters", "rope_scaling"])
def test_unscaled_round_trip(dialect):
    config = LlamaConfig(max_position_embeddings=4096, rope_parameters={"rope_theta": 50000.0, "rope_type": "default"})
    assert RopeScaling.from_config(config) == BASE
    assert BASE.to_config() == config.rope_parameters
    assert RopeScaling.from_config({dialect: BASE.to_config(dialect), "rope_theta": 5e4}) == replace(
        BASE, original_max_position_embeddings=None
    )
    plain = {"max_position_embeddings": 4096, "rope_theta": 50000.0, "rope_scaling": None}
    assert RopeScaling.from_config(plain) == BASE


def test_a_published_yarn_checkpoint():
    scaling = RopeScaling("yarn", 16.0, 4096)
    published = {"type": "yarn", "factor": 16.0, "original_max_position_embeddings": 4096, "finetuned": True}
    config = {"max_position_embeddings": 65536, "rope_theta": 10000.0, "rope_scaling": published}
    assert RopeScaling.from_config(config) == scaling
    assert RopeScaling.from_config(published) == scaling
    assert RopeScaling.from_config(LlamaConfig(**deepcopy(config))) == scaling
    # The code released with the Mistral models has other constants, which their configs don't carry.
    mistral = MistralConfig(**deepcopy(config))
    with pytest.warns(UserWarning, match="beta_fast=128, beta_slow=2"):
        assert RopeScaling.from_config(mistral) == replace(scaling, beta_fast=128.0, beta_slow=2.0, mscale=0.7)


def test_what_transformers_can_express_is_written_in_its_words():
    yarn = RopeScaling("yarn", 16, 4096, mscale=0.7).to_config()
    assert yarn == {
        "rope_type": "yarn",
        "rope_theta": 10000.0,
        "factor": 16.0,
        "original_max_position_embeddings": 4096,
        "attention_factor": pytest.approx(1 + 0.07 * 2.772588722239781),
    }
    by_parts = RopeScaling("ntk-by-parts", 16, 4096)
    assert by_parts.to_config() == yarn | {"attention_factor": 1.0}
    # Reading that back gives YaRN with attention factor 1: the same numbers under the other name.
    again = RopeScaling.from_config(by_parts.to_config())
    assert torch.equal(compute_rope(again, 128)[0], compute_rope(by_parts, 128)[0])
    assert compute_rope(again, 128)[1] == 1.0

    ntk = RopeScaling("ntk", 2.0, 4096)
    assert not ntk.is_native() and ntk.is_native(head_dim=128)
    assert ntk.to_config(head_dim=128) == {
        "rope_type": "default",
        "rope_theta": pytest.approx(20221, abs=0.5),
    }
    # The old dialect leaves rope_theta to the top level, so b' cannot be said in it.
    assert ntk.to_config("rope_scaling", head_dim=128)["rope_type"] == "scaled-rope"
    half = replace(ntk, partial_rotary_factor=0.5).to_config(head_dim=256)
    assert half["rope_theta"] == ntk.to_config(head_dim=128)["rope_theta"]


def test_what_transformers_cannot_express_has_a_type_of_its_own():
    for scaling in ROUND_TRIPS:
        custom = scaling.to_config()["rope_type"] == "scaled-rope"
        assert custom == (not scaling.is_native())
    assert RopeScaling("yarn", 16.0, 4096, ramp="dimension", extrapolation_factor=1.0).is_native()
    assert RopeScaling("yarn", 2.0, 4096, dynamic=True).to_config() == {
        "rope_type": "scaled-rope",
        "rope_theta": 10000.0,
        "method": "yarn",
        "factor": 2.0,
        "original_max_position_embeddings": 4096,
        "dynamic": True,
    }


def test_missing_values_follow_transformers():
    yarn = {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e6}
    config = {"max_position_embeddings": 8192, "rope_parameters": yarn}
    assert RopeScaling.from_config(config).original_max_position_embeddings == 8192
    assert RopeScaling.from_config(config | {"original_max_position_embeddings": 2048}).max_position_embeddings == 8192
    ratio = yarn | {"factor": None, "original_max_position_embeddings": 1024}
    assert RopeScaling.from_config(config | {"rope_parameters": ratio}).factor == 8.0
    assert RopeScaling.from_config({"rope_parameters": yarn, "max_position_embeddings": 512}).rope_theta == 1e6
    assert RopeScaling.from_config({"max_position_embeddings": 512}).rope_theta == 10000.0


@pytest.mark.parametrize(("mscale", "mscale_all_dim"), [(0.707, 0.707), (1.0, 0.5), (None, None)])
def test_both_mscales_count_as_their_ratio(mscale, mscale_all_dim):
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    yarn = {"rope_type": "yarn", "factor": 40.0, "original_max_position_embeddings": 4096, "rope_theta": 1e4}
    if mscale is not None:
        yarn |= {"mscale": mscale, "mscale_all_dim": mscale_all_dim}
    config = LlamaConfig(head_dim=64, rope_parameters=dict(yarn))
    _, theirs = ROPE_INIT_FUNCTIONS["yarn"](config, "cpu")
    assert compute_rope(RopeScaling.from_config(config), 64)[1] == pytest.approx(theirs, rel=1e-12)


@pytest.mark.parametrize("name", ["mscale", "mscale_all_dim"])
def test_one_mscale_alone_is_ignored_with_a_warning(name):
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 4096}
    with pytest.warns(UserWarning, match=f"{name} is ignored without"):
        scaling = RopeScaling.from_config(yarn | {name: 0.7})
    assert scaling == RopeScaling("yarn", 4.0, 4096)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # an explicit factor leaves nothing to ignore
        assert RopeScaling.from_config(yarn | {name: 0.7, "attention_factor": 1.2}).attention_factor == 1.2


def test_parameters_per_layer_type():
    nested = {
        "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
        "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
    }
    config = {"rope_parameters": nested, "max_position_embeddings": 4096}
    assert RopeScaling.from_config(config, "full_attention") == RopeScaling("linear", 8.0, 4096, 1e6)
    assert RopeScaling.from_config(config, "sliding_attention") == RopeScaling("default", 1.0, 4096)
    assert RopeScaling.from_config(config) == RopeScaling.from_config(config, "full_attention")
    with pytest.raises(ConfigError, match="known: full_attention, sliding_attention"):
        RopeScaling.from_config(config, "full")


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"rope_type": "yarm", "factor": 2.0}, "unknown rope_type 'yarm'; did you mean 'yarn'"),
        ({"rope_type": "lama3", "factor": 2.0}, "unknown rope_type 'lama3'; did you mean 'llama3'"),
        ({"rope_type": "default", "mrope_section": [8, 12, 12]}, "mrope_section: multimodal"),
        ({"rope_type": "yarn", "factor": 2.0, "attn_factor": 1.0}, "did you mean 'attention_factor'"),
        ({"rope_type": "linear", "factor": 2.0, "beta_fast": 32}, "'linear': 'beta_fast'"),
        ({"rope_type": "linear"}, "factor is missing"),
        ({"rope_type": "linear", "factor": None}, "factor=None"),
        (
            {"rope_parameters": {"rope_type": "linear", "factor": None}, "max_position_embeddings": 64},
            "factor=None",
        ),
        ({"rope_type": "yarn", "factor": 0.5, "original_max_position_embeddings": 64}, "factor=0.5"),
        ({"rope_type": "yarn", "factor": 2.0}, "original_max_position_embeddings is missing"),
        ({"rope_type": "scaled-rope", "method": "yarn", "facter": 2.0}, "unknown scaling field 'facter'"),
        ({"rope_type": "scaled-rope", "factor": 2.0}, "method is missing"),
        ({"rope_parameters": "yarn"}, "rope_parameters='yarn': must be a dictionary"),
        (7, "config of type int"),
    ],
)
def test_bad_configs(config, message):
    with pytest.raises(ConfigError) as error:
        RopeScaling.from_config(config)
    assert message in one_line(error)


def test_unknown_dialect():
    with pytest.raises(ConfigError, match="unknown dialect"):
        BASE.to_config("yaml")


def test_config_module_needs_no_torch():
    """The record must load where torch does not; the package itself imports torch, so load the file alone."""
    code = (
        "import sys, types\n"
        "package = types.ModuleType('scaled_rope')\n"
        f"package.__path__ = [{str(__import__('scaled_rope').__path__[0])!r}]\n"
        "sys.modules['scaled_rope'] = package\n"
        "import scaled_rope.config\n"
        "assert 'torch' not in sys.modules and 'transformers' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_every_field_of_a_row_exists():
    for row in METHODS.values():
        assert row.fields <= set(RopeScaling.__dataclass_fields__)
