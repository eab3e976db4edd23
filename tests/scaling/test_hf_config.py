"""Scalings in the configs of models: every dialect in, the words of transformers out."""

from __future__ import annotations

import itertools
import json
import re
import warnings
from copy import deepcopy
from dataclasses import replace
from typing import Any

import pytest
import torch
from transformers import CONFIG_MAPPING, AutoConfig, LlamaConfig, MistralConfig, Olmo3Config, Phi3Config
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.hunyuan_v1_dense.modeling_hunyuan_v1_dense import HunYuanDenseV1RotaryEmbedding

from scaled_rope import METHODS, ConfigError, RopeScaling, compute_rope
from scaled_rope.scaling.hf_config import (
    FAMILY_PARTIAL,
    FAMILY_SCALING,
    FAMILY_THETA,
    NATIVE,
    NESTED_FAMILIES,
    RECORD_KEY,
    read_by_attention,
    text_config,
)
from scaled_rope.scaling.record import LayerPlan
from tests.helpers.optional import nested_parameters
from tests.helpers.records import BASE, LISTS, ROUND_TRIPS, one_line

LAYER_TYPES = ("full_attention", "sliding_attention")
LINEAR = {"rope_type": "linear", "factor": 4.0}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 1024}
NESTED = {"full_attention": YARN, "sliding_attention": {"rope_type": "default", "rope_theta": 123.0}}
OTHER_NAMES = {"abf", "ntk-by-parts"}  # where transformers has words, it has those of another method


def in_dialect(written: dict[str, Any], dialect: str) -> dict[str, Any]:
    """What `to_config` wrote, in the older dialect with `rope_theta` outside of the dictionary."""
    if dialect == "rope_parameters":
        return written
    older = {name: value for name, value in written.items() if name != "rope_theta"}
    return older | {"type": written["rope_type"]}


@pytest.mark.parametrize("scaling", ROUND_TRIPS, ids=lambda s: s.label)
@pytest.mark.parametrize("dialect", ["rope_parameters", "rope_scaling"])
def test_config_round_trip(scaling, dialect):
    """Both dialects, as a config.json and through a config object of transformers."""
    values = scaling.to_config()
    assert "rope_theta" in values and "type" not in values
    written = in_dialect(values, dialect)
    config = {
        "model_type": "llama",
        "hidden_size": 64,
        "num_attention_heads": 2,
        # Where transformers takes L from here it must be L.
        "max_position_embeddings": 4096 if scaling.method in ("dynamic-ntk", "abf") else 12345,
        dialect: json.loads(json.dumps(written)),
    }
    if dialect == "rope_scaling":
        config["rope_theta"] = values["rope_theta"]
    wanted = scaling
    if written["rope_type"] == "default":  # abf in the words of transformers
        wanted = RopeScaling("default", 1.0, 4096, scaling.params["theta"])
    assert RopeScaling.from_config(config) == wanted
    built = LlamaConfig(**deepcopy(config))
    assert RopeScaling.from_config(built) == wanted
    assert RopeScaling.from_config(built.to_dict()) == wanted
    assert RopeScaling.from_config(json.loads(built.to_json_string())) == wanted
    if dialect == "rope_parameters":
        assert RopeScaling.from_config(written) == replace(
            wanted, original_max_position_embeddings=written.get("original_max_position_embeddings")
        )


def test_the_text_part_is_the_decoder_where_there_are_two():
    assert text_config(LINEAR) is LINEAR
    plain = LlamaConfig()
    assert text_config(plain) is plain
    both = CONFIG_MAPPING["musicgen"]()
    assert text_config(both) is both.decoder
    with pytest.raises(ValueError, match="Multiple valid text configs"):
        both.get_text_config()  # as transformers itself answers


def test_every_method_is_among_the_round_trips():
    assert {scaling.method for scaling in ROUND_TRIPS} == {n for n, row in METHODS.items() if row.kind == "frequency"}
    for name, native in NATIVE.items():
        assert any(
            scaling.to_config().get("rope_type") == name and scaling.method in (native.method, *OTHER_NAMES)
            for scaling in [BASE, *ROUND_TRIPS]
        )


@pytest.mark.parametrize("dialect", ["rope_parameters", "rope_scaling"])
def test_unscaled_round_trip(dialect):
    config = LlamaConfig(max_position_embeddings=4096, rope_parameters={"rope_theta": 50000.0, "rope_type": "default"})
    assert RopeScaling.from_config(config) == BASE
    assert BASE.to_config() == config.rope_parameters
    assert RopeScaling.from_config({dialect: in_dialect(BASE.to_config(), dialect), "rope_theta": 5e4}) == replace(
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
        ({"rope_type": "yarn", "factor": 2.0, "attn_factor": 1.5}, "attn_factor=1.5: SGLang multiplies 0.1·ln(s) + 1"),
        ({"rope_type": "yarn", "factor": 2.0, "attn_factor": "1"}, "did you mean 'attention_factor'"),
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
        ({"rope_scaling": ["yarn"]}, "rope_scaling=['yarn']: must be a dictionary"),
        ({"rope_scaling": 0}, "rope_scaling=0: must be a dictionary"),
        ({"rope_type": ["yarn"], "factor": 2.0}, "unknown rope_type ['yarn']"),
        ({"factor": 2.0}, "'factor'"),  # no type: nothing that a factor could be for
        ({"rope_type": "default", "type": "linear", "factor": 2.0}, "rope_type 'default': 'factor'"),
        ({"type": "yarn", "factor": 2.0, "finetuned": "yes"}, "finetuned='yes': must be true or false"),
        ({"type": "dynamic-yarn", "factor": "8"}, "factor='8'"),
        ({"type": "ntk-by-parts", "factor": 8, "mscale": 0.7}, "mscale=0.7: not for rope_type 'ntk-by-parts'"),
        ({"type": "dynamic-yarn", "factor": 8, "mscale": 0.7}, "mscale=0.7: not for rope_type 'dynamic-yarn'"),
        ({"rope_type": "yarn", "factor": 2.0, "mscale": "x"}, "mscale='x': must be a number"),
        ({"rope_type": "llama3", "factor": 2.0, "low_freq": 1}, "did you mean 'low_freq_factor'"),
        ({"rope_type": "longrope", "factor": 2.0, "original_max_position_embeddings": 8}, "short_factor is missing"),
        ({"model_type": ["llama"], "rope_scaling": LINEAR, "max_position_embeddings": "x"}, "embeddings='x'"),
        (7, "config of type int"),
    ],
)
def test_bad_configs(config, message):
    with pytest.raises(ConfigError) as error:
        RopeScaling.from_config(config)
    assert message in one_line(error)


TOP_LEVELS = [
    {},
    {"rope_theta": 77777.0},
    {"partial_rotary_factor": 0.5},
    {"rotary_emb_base": 33333.0, "rotary_pct": 0.5},
    {"rope_theta": 77777.0, "rotary_emb_base": 33333.0},
    {"rope_local_base_freq": 22222.0},
    {"original_max_position_embeddings": 512},
]
ROPES = [
    {},
    {"rope_parameters": None},
    {"rope_parameters": {}},
    {"rope_parameters": LINEAR | {"rope_theta": 55555.0}},
    {"rope_scaling": LINEAR},
    {"rope_scaling": {"type": "linear", "factor": 4.0}},
    {"rope_scaling": YARN},
    {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}},
    {"rope_scaling": {"rope_type": "dynamic", "factor": 4.0}},
    {"rope_parameters": LINEAR, "rope_scaling": YARN},
    {"rope_parameters": NESTED},
    {"rope_parameters": NESTED | {"truncate": False}},
    {"rope_parameters": NESTED | {"full_attention": YARN | {"truncate": False}}},
]


@nested_parameters
@pytest.mark.parametrize("family", FAMILY_THETA)
def test_what_families_leave_out_is_what_transformers_fills_in(family):
    """A config.json as it was written and the config that transformers makes of it are the same model."""
    compared = 0
    for top, rope in itertools.product(TOP_LEVELS, ROPES):
        raw = {
            "model_type": family,
            "max_position_embeddings": 4096,
            "hidden_size": 64,
            "num_attention_heads": 4,
            "num_hidden_layers": 6,
            **top,
            **rope,
        }
        if family in NESTED_FAMILIES and "rope_parameters" in rope and "rope_scaling" in rope:
            continue  # transformers ends in a KeyError
        if family == "phi3" and re.search("linear|yarn|dynamic", str(rope)):
            continue  # and here refuses all but default and longrope
        built = AutoConfig.for_model(family, **deepcopy({k: v for k, v in raw.items() if k != "model_type"}))
        types = set(getattr(built, "layer_types", None) or ())
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for layer_type in (None, *sorted(types & set(LAYER_TYPES))):
                if family in NESTED_FAMILIES and rope.get("rope_scaling", {}).get("type"):
                    # These classes keep "type" beside a rope_type "default" of their own.
                    with pytest.raises(ConfigError, match="rope_type 'default': 'factor'"):
                        RopeScaling.from_config(built)
                    continue
                assert RopeScaling.from_config(raw, layer_type) == RopeScaling.from_config(built, layer_type), raw
                compared += 1
    assert compared >= 20


def test_family_tables_hold_only_known_families():
    assert {*FAMILY_PARTIAL, *FAMILY_SCALING, *NESTED_FAMILIES} <= set(FAMILY_THETA)


def test_of_both_dialects_the_older_wins_as_in_transformers():
    config = {"rope_scaling": deepcopy(LINEAR), "rope_parameters": deepcopy(YARN), "max_position_embeddings": 2048}
    assert LlamaConfig(**deepcopy(config)).rope_parameters["rope_type"] == "linear"
    with pytest.warns(UserWarning, match="both present; rope_scaling counts"):
        assert RopeScaling.from_config(config) == RopeScaling("linear", 4.0, 2048)


@pytest.mark.parametrize(
    ("rope", "wanted"),
    [
        ({"type": "dynamic-yarn", "factor": 8.0}, RopeScaling("yarn", 1.0, 64, dynamic=True)),
        ({"type": "dynamic-yarn", "factor": 8.0, "finetuned": True}, RopeScaling("yarn", 8.0, 64, dynamic=True)),
        ({"type": "dynamic-yarn", "factor": 8, "finetuned": False}, RopeScaling("yarn", 1.0, 64, dynamic=True)),
        ({"type": "dynamic-linear", "factor": 2.0, "finetuned": True}, RopeScaling("linear", 2.0, 64, dynamic=True)),
        (
            {"type": "dynamic-yarn", "factor": 1.0, "attention_factor": 1.0, "beta_fast": 64},
            RopeScaling("yarn", 1.0, 64, dynamic=True, attention_factor=1.0, beta_fast=64.0),
        ),
        ({"type": "ntk-by-parts", "factor": 4.0}, RopeScaling("ntk-by-parts", 4.0, 64)),
        ({"type": "dynamic", "factor": 4.0}, RopeScaling("dynamic-ntk", 4.0, 64)),
        ({"type": "su", "factor": 4.0, **LISTS}, RopeScaling("longrope", 4.0, 64, params=LISTS)),
        ({"type": "su", **LISTS}, RopeScaling("longrope", 4.0, 64, params=LISTS)),  # factor: 256 / 64
        ({"rope_type": "longrope", "factor": None, **LISTS}, RopeScaling("longrope", 4.0, 64, params=LISTS)),
        ({"rope_type": "yarn", "factor": None}, RopeScaling("yarn", 4.0, 64)),
        (
            {"rope_type": "proportional", "partial_rotary_factor": 0.25},
            RopeScaling("proportional", 1.0, 64, params={"fraction": 0.25}),
        ),
        ({"rope_type": "yarn", "factor": 4.0, "beta_fast": None, "no_such_key": None}, RopeScaling("yarn", 4.0, 64)),
    ],
)
def test_published_dialects(rope, wanted):
    rope = {"original_max_position_embeddings": 64} | rope
    context = 64 if rope.get("type") == "dynamic" else 256
    scaling, notes = RopeScaling.read_config({"rope_scaling": rope, "max_position_embeddings": context})
    assert scaling == wanted
    # A factor that is not used is not passed over.
    unused = wanted.dynamic and wanted.factor != rope["factor"]
    assert [note.code for note in notes] == ["dynamic-factor"] * unused


def test_phi3_keeps_l_on_the_top_level():
    lists = {"short_factor": [1.0] * 8, "long_factor": [4.0] * 8}
    config = {
        "model_type": "phi3",
        "hidden_size": 64,
        "num_attention_heads": 4,
        "max_position_embeddings": 131072,
        "original_max_position_embeddings": 4096,
        "rope_scaling": {"type": "longrope", **lists},
    }
    wanted = RopeScaling("longrope", 32.0, 4096, params=lists)
    assert RopeScaling.from_config(config) == wanted
    built = Phi3Config(**deepcopy({key: value for key, value in config.items() if key != "model_type"}))
    assert RopeScaling.from_config(built) == wanted
    del config["original_max_position_embeddings"]
    assert RopeScaling.from_config(config) == wanted  # the class's default
    with pytest.warns(UserWarning, match="original_max_position_embeddings=64 in the RoPE dictionary is ignored"):
        config["rope_scaling"]["original_max_position_embeddings"] = 64
        assert RopeScaling.from_config(config) == wanted


def test_where_the_original_length_is_read():
    def lengths(inside, outside, context, rope_type="yarn"):
        rope = {"rope_type": rope_type, "factor": 2.0}
        config = {"rope_parameters": rope | ({"original_max_position_embeddings": inside} if inside else {})}
        config |= {"original_max_position_embeddings": outside, "max_position_embeddings": context}
        scaling, notes = RopeScaling.read_config(config)
        return scaling.original_max_position_embeddings, [note.code for note in notes]

    assert lengths(64, None, 256) == (64, [])
    assert lengths(64, 64, 256) == (64, [])
    assert lengths(64, 32, 256) == (32, ["two-values"])
    assert lengths(None, 32, 256) == (32, [])
    assert lengths(None, None, 256) == (256, ["no-original"])
    assert lengths(64, None, 256, "dynamic") == (256, ["two-values"])  # as in transformers
    assert lengths(None, 64, 256, "dynamic") == (256, ["two-values"])
    assert lengths(256, None, 256, "dynamic") == (256, [])
    assert lengths(64, None, None, "dynamic") == (64, [])
    assert lengths(None, None, 256, "linear") == (256, [])


def test_what_stands_next_to_layer_types():
    config = {"model_type": "llama", "max_position_embeddings": 4096}
    for rope, wanted in (
        (NESTED | {"truncate": False}, RopeScaling("yarn", 4.0, 1024, truncate=False)),
        (NESTED | {"rope_theta": 5e4, "rope_type": "default"}, RopeScaling("yarn", 4.0, 1024, 5e4)),
        (NESTED | {"partial_rotary_factor": 0.5}, RopeScaling("yarn", 4.0, 1024, partial_rotary_factor=0.5)),
        (NESTED | {"factor": None}, RopeScaling("yarn", 4.0, 1024)),
    ):
        assert RopeScaling.from_config(config | {"rope_parameters": rope}) == wanted
    with pytest.raises(ConfigError, match="unknown key next to the layer types of rope_parameters: 'factor'"):
        RopeScaling.from_config(config | {"rope_parameters": NESTED | {"factor": 2.0}})
    # A key that happens to hold a dictionary does not turn the rest into nothing.
    with pytest.raises(ConfigError, match="'rope_type'"):
        RopeScaling.from_config(config | {"rope_parameters": LINEAR | {"extra": {}}})
    # Inside a layer type transformers does not see truncate; our own records do.
    inside = {"full_attention": YARN | {"truncate": False}}
    with pytest.warns(UserWarning, match="truncate=False inside 'full_attention' has no effect"):
        assert RopeScaling.from_config(config | {"rope_parameters": inside}) == RopeScaling("yarn", 4.0, 1024)
    record = RopeScaling("yarn", 4.0, 1024, truncate=False, ramp="dimension", resonance=True)
    assert RopeScaling.from_config({"full_attention": record.to_config()}) == record


@nested_parameters
def test_flat_parameters_where_transformers_wants_them_nested():
    config = {"model_type": "olmo3", "max_position_embeddings": 4096, "rope_parameters": deepcopy(LINEAR)}
    with pytest.warns(UserWarning, match="not nested per layer type: transformers drops it"):
        assert RopeScaling.from_config(config) == RopeScaling("default", 1.0, 4096, 5e5)
    theirs = Olmo3Config(**deepcopy(config)).rope_parameters["full_attention"]
    assert theirs["rope_type"] == "default" and "factor" not in theirs
    # In the older dialect it is for the full-attention layers.
    config = {"model_type": "olmo3", "max_position_embeddings": 4096, "rope_scaling": deepcopy(LINEAR)}
    assert RopeScaling.from_config(config) == RopeScaling("linear", 4.0, 4096, 5e5)
    assert RopeScaling.from_config(config, "sliding_attention") == RopeScaling("default", 1.0, 4096, 5e5)
    assert Olmo3Config(**deepcopy(config)).rope_parameters["full_attention"]["rope_type"] == "linear"


def test_a_text_model_inside_another():
    text = {"model_type": "llama", "rope_theta": 5e5, "max_position_embeddings": 64}
    assert RopeScaling.from_config({"model_type": "outer", "text_config": text}).rope_theta == 5e5
    outer = {"model_type": "outer", "rope_scaling": {"type": "linear", "factor": 2.0}, "rope_theta": 1e4}
    with pytest.warns(UserWarning, match="rope_scaling outside of text_config is read by nobody"):
        assert RopeScaling.from_config(outer | {"text_config": text}) == RopeScaling("default", 1.0, 64, 5e5)
    deeper = {"thinker_config": {"vision_config": {"rope_theta": 1.0}, "text_config": text}}
    assert RopeScaling.from_config(deeper).rope_theta == 5e5
    assert RopeScaling.from_config(outer).method == "linear"


YARN_RECORD = RopeScaling("yarn", 4.0, 1024)
SLIDING_RECORD = RopeScaling("default", 1.0, 4096, 123.0)


def test_layer_plan():
    config = {"model_type": "llama", "max_position_embeddings": 4096}
    assert LayerPlan.from_config(config) == LayerPlan()
    assert LayerPlan.from_config(config | {"rope_parameters": LINEAR}) == LayerPlan()
    nested = LayerPlan({"full_attention": YARN_RECORD, "sliding_attention": SLIDING_RECORD})
    assert LayerPlan.from_config(config | {"rope_parameters": NESTED}) == nested
    built = AutoConfig.for_model("gemma3_text", rope_parameters=deepcopy(NESTED), max_position_embeddings=4096)
    plan = LayerPlan.from_config(built)
    assert plan.layers["full_attention"] == replace(YARN_RECORD, rope_theta=1e6)
    assert plan.layers["sliding_attention"] == SLIDING_RECORD

    flat = config | {"rope_parameters": YARN_RECORD.to_config(rope_types=())}
    layers = {name: scaling.to_dict() for name, scaling in nested.layers.items()}
    carried = flat | {RECORD_KEY: {"layers": layers, "drop_layers": [3, 0]}}
    assert LayerPlan.from_config(carried) == LayerPlan(nested.layers, (3, 0))
    assert LayerPlan.from_config(flat | {RECORD_KEY: {"layers": {}, "drop_layers": [1]}}) == LayerPlan({}, (1,))
    assert LayerPlan.from_config(flat | {RECORD_KEY: YARN_RECORD.to_dict()}) == LayerPlan()
    assert RopeScaling.from_config(carried, "sliding_attention") == SLIDING_RECORD
    assert RopeScaling.from_config(carried) == YARN_RECORD
    # Someone else changed the scaling that all layers share in this file.
    stale = carried | {"rope_parameters": replace(YARN_RECORD, factor=8.0).to_config(rope_types=())}
    for name in LAYER_TYPES:
        with pytest.warns(UserWarning, match="was changed since then"):
            assert RopeScaling.from_config(stale, name).factor == 8.0

    # A layer type without any RoPE: the other one is the primary.
    alone = config | {"rope_parameters": {"full_attention": None, "sliding_attention": LINEAR}}
    with pytest.warns(UserWarning, match="was changed since then"):
        assert RopeScaling.from_config(alone | {RECORD_KEY: YARN_RECORD.to_dict()}).method == "linear"

    for record, message in (
        ("x", "scaled_rope='x': must be a dictionary"),
        ({"drop_layers": 3}, "drop_layers=3: must be a list"),
        ({"drop_layers": [-1]}, r"drop_layers=\[-1\]"),
        ({"layers": [1]}, r"layers=\[1\]: must be a dictionary"),
        ({"layers": {"full_attention": 7}}, "scaled_rope=7: must be a dictionary"),
        ({"layers": {"full_attention": {"method": "yarm"}}}, "did you mean 'yarn'"),
    ):
        with pytest.raises(ConfigError, match=message) as error:
            LayerPlan.from_config(carried | {RECORD_KEY: record})
        one_line(error)


@pytest.mark.parametrize(
    "scaling",
    [
        RopeScaling("ntk", 8.0, 1024),
        RopeScaling("ntk-by-parts", 8.0, 1024),
        RopeScaling("abf", 8.0, 1024, params={"theta": 5e5}),
    ],
    ids=lambda s: s.label,
)
def test_a_record_beside_words_of_another_method(scaling):
    """NTK-aware is written as a larger base; what it was is kept beside, and counts while it is still true."""
    config: dict[str, Any] = {
        "model_type": "llama",
        "head_dim": 64,
        "max_position_embeddings": 8192,
        "rope_parameters": scaling.to_config(head_dim=64),
    }
    assert RopeScaling.from_config(config) != scaling
    carried = config | {RECORD_KEY: scaling.to_dict()}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert RopeScaling.from_config(carried) == scaling
        built = LlamaConfig(**deepcopy(carried))
        assert RopeScaling.from_config(built) == scaling
        assert RopeScaling.from_config(json.loads(built.to_json_string())) == scaling
    for changed in (
        carried | {"rope_parameters": LINEAR},
        carried | {"rope_parameters": config["rope_parameters"] | {"rope_theta": 4e4}},
        carried | {"rope_parameters": RopeScaling("cope", 1.0, 1024).to_config()},
    ):
        with pytest.warns(UserWarning, match="scaled_rope says .* was changed since then"):
            again = RopeScaling.from_config(changed)
        assert again == RopeScaling.from_config({k: v for k, v in changed.items() if k != RECORD_KEY})


MROPE = {"mrope_section": [16, 24, 24], "mrope_interleaved": True}


@pytest.mark.parametrize("dialect", ["rope_scaling", "rope_parameters"])
@pytest.mark.parametrize("rope_type", ["mrope", "default"])
def test_axes_of_multimodal_models_are_no_part_of_the_scaling(rope_type: str, dialect: str) -> None:
    config = {"model_type": "qwen2_5_vl_text", "max_position_embeddings": 32768, "rope_theta": 1e6}
    read, notes = RopeScaling.read_config(config | {dialect: {"type": rope_type, **MROPE}})
    assert read == RopeScaling("default", 1.0, 32768, 1e6)
    assert [note.code for note in notes if note.level == "info"] == ["attention-key", "attention-key"]
    assert not [note for note in notes if note.level == "warning"]


def test_axes_beside_a_scaling_leave_it_alone_and_are_kept() -> None:
    rope = {"rope_type": "yarn", "rope_theta": 1e6, "factor": 4.0, "original_max_position_embeddings": 32768, **MROPE}
    config = {"model_type": "qwen3_vl_text", "max_position_embeddings": 131072, "rope_parameters": rope}
    assert RopeScaling.from_config(config) == RopeScaling("yarn", 4.0, 32768, 1e6)
    assert read_by_attention(rope) == MROPE
    assert read_by_attention(rope | {"llama_4_scaling_beta": 0.1}) == {
        **MROPE,
        "llama_4_scaling_beta": 0.1,
        "original_max_position_embeddings": 32768,
    }


@pytest.mark.parametrize("alpha", [1000.0, 11])
def test_alpha_of_hunyuan_is_a_larger_base(alpha: float) -> None:
    rope = {"type": "dynamic", "alpha": alpha, "factor": 1.0, "beta_fast": 32, "mscale": 1.0}
    config = {"model_type": "hunyuan_v1_dense", "max_position_embeddings": 32768, "head_dim": 128, "rope_scaling": rope}
    read, notes = RopeScaling.read_config(config)
    assert read.label == f"abf (theta={alpha ** (128 / 126) * 1e4!r})" and not read.is_length_dependent
    built = AutoConfig.for_model("hunyuan_v1_dense", **{k: deepcopy(v) for k, v in config.items() if k != "model_type"})
    theirs = HunYuanDenseV1RotaryEmbedding(built)
    assert torch.allclose(compute_rope(read, 128)[0], theirs.inv_freq, rtol=1e-5, atol=0)
    assert {note.code for note in notes} >= {"alpha"}
    assert RopeScaling.from_config(built) == read


def test_alpha_is_refused_where_it_says_nothing() -> None:
    rope = {"type": "dynamic", "alpha": 0.5, "factor": 1.0}
    config = {"model_type": "hunyuan_v1_dense", "max_position_embeddings": 32768, "rope_scaling": rope}
    with pytest.raises(ConfigError, match=r"alpha=0.5: must be a finite number, at least 1"):
        RopeScaling.from_config(config)
    rope["alpha"] = 2.0
    with pytest.raises(ConfigError, match=r"alpha=2.0: needs the model's head_dim"):
        RopeScaling.from_config(config)
    with pytest.raises(ConfigError, match="unknown key.*'alpha'"):
        RopeScaling.from_config(config | {"model_type": "llama"})


def test_mscales_of_longrope() -> None:
    long = {"type": "longrope", **LISTS, "short_mscale": 1.25, "long_mscale": 1.25}
    config = {"model_type": "phimoe", "rope_theta": 1e4, "max_position_embeddings": 131072, "rope_scaling": long}
    config["original_max_position_embeddings"] = 4096
    assert RopeScaling.from_config(config).attention_factor == 1.25
    # Other families take it from attention_factor, and vLLM and SGLang from the two mscales.
    with pytest.raises(ConfigError, match="unknown key.*short_mscale"):
        RopeScaling.from_config(config | {"model_type": "phi3"})
    long["attention_factor"] = 1.25
    assert RopeScaling.from_config(config | {"model_type": "phi3"}).attention_factor == 1.25
    long["attention_factor"] = 1.5
    with pytest.warns(UserWarning, match="attention_factor=1.5 is ignored"):
        assert RopeScaling.from_config(config).attention_factor == 1.25
    long["long_mscale"] = 1.5
    with pytest.raises(ConfigError, match=r"short_mscale=1.25 and long_mscale=1.5: .* must be equal"):
        RopeScaling.from_config(config)


def test_rotary_dim_of_minimax() -> None:
    config = {"model_type": "minimax_m2", "head_dim": 128, "rotary_dim": 64, "rope_theta": 5e6}
    assert RopeScaling.from_config(config).partial_rotary_factor == 0.5
    assert RopeScaling.from_config(config | {"partial_rotary_factor": 0.25}).partial_rotary_factor == 0.25
    assert RopeScaling.from_config(config | {"model_type": "llama"}).partial_rotary_factor == 1.0


def test_equal_betas_are_the_narrowest_ramp() -> None:
    rope = {
        "type": "yarn",
        "factor": 32.0,
        "original_max_position_embeddings": 4096,
        "beta_fast": 1.0,
        "beta_slow": 1.0,
    }
    config = {"max_position_embeddings": 131072, "rope_theta": 5e4, "head_dim": 64, "hidden_size": 64}
    read = RopeScaling.from_config(config | {"model_type": "llama", "rope_scaling": rope})
    built = LlamaConfig(**config, num_attention_heads=1, rope_parameters={**rope, "rope_theta": 5e4})
    for truncate in (True, False):  # with the ends as they are the ramp is 0.001 wide
        built.rope_parameters["truncate"] = truncate
        theirs, factor = ROPE_INIT_FUNCTIONS["yarn"](built, "cpu")
        ours, our_factor = compute_rope(replace(read, truncate=truncate), 64)
        assert torch.allclose(ours, theirs, rtol=1e-6, atol=0) and factor == pytest.approx(our_factor)


def test_whole_numbers_written_as_floats_are_whole() -> None:
    rope = {"type": "yarn", "factor": 2.0, "original_max_position_embeddings": 1200.0}
    config = {"model_type": "llama", "max_position_embeddings": 2400.0}
    assert RopeScaling.from_config(config | {"rope_scaling": rope}) == RopeScaling("yarn", 2.0, 1200)
    assert RopeScaling.from_config(config).original_max_position_embeddings == 2400
    with pytest.raises(ConfigError, match=r"original_max_position_embeddings=1200\.5"):
        RopeScaling.from_config(config | {"rope_scaling": rope | {"original_max_position_embeddings": 1200.5}})


def test_rope_of_two_dimensions_says_so() -> None:
    with pytest.raises(ConfigError, match="rope_type 'axial' is of two dimensions, for images"):
        RopeScaling.from_config({"model_type": "pixtral", "rope_parameters": {"rope_type": "axial"}})


@pytest.mark.parametrize(("attn", "whole"), [(1.0, None), (0.8782488562869419, 1.0), (1.1, 1.1 * 1.138629436111989)])
def test_attn_factor_that_says_what_other_keys_say(attn: float, whole: float | None) -> None:
    rope = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768, "attn_factor": attn}
    read = RopeScaling.from_config({"rope_parameters": rope | ({} if whole is None else {"attention_factor": whole})})
    assert read == RopeScaling("yarn", 4.0, 32768, attention_factor=whole)
