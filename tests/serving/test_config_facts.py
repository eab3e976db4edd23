"""What is read from a config before it is judged."""

from __future__ import annotations

from typing import Any

import pytest

from scaled_rope import ConfigError, RopeScaling
from scaled_rope.serving.config_facts import ConfigFacts, known_keys, native_keys_of, read_facts
from tests.helpers.facts import LLAMA, UNSCALED, YARN

YARN_ROPE = {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 4096}
BY_TYPE = {"full_attention": YARN_ROPE, "sliding_attention": {"rope_type": "default"}}
TYPES = ["sliding_attention", "full_attention"] * 2


def test_the_two_views_and_the_scaling() -> None:
    config = LLAMA | {"rope_scaling": YARN_ROPE, "num_attention_heads": 8, "head_dim": None}
    facts = read_facts(config)
    assert facts.raw is config and facts.rope == YARN_ROPE
    assert facts.built.num_hidden_layers == 4 and facts.refusal == ""
    assert (facts.own, facts.scaling, facts.read_error, facts.ignored) == (YARN, YARN, None, {})
    assert (facts.model_type, facts.head_dim, facts.context, facts.shown) == ("llama", 64, 4096, None)
    assert len(facts.dimensions) == 32 and facts.dimensions_error == ""


def test_sizes_that_the_family_fills_in() -> None:
    facts = read_facts({"model_type": "llama"})
    assert facts.text == {"model_type": "llama"}
    assert (facts.complete["hidden_size"], facts.head_dim) == (4096, 128)
    assert read_facts({"model_type": "llamoid"}).complete == {"model_type": "llamoid"}


def test_the_text_part_of_a_larger_model() -> None:
    facts = read_facts({"model_type": "gemma3", "text_config": {"model_type": "gemma3_text", "num_hidden_layers": 6}})
    assert facts.model_type == "gemma3_text" and facts.text["num_hidden_layers"] == 6
    assert facts.complete["sliding_window"] == facts.window == 4096


def test_a_rope_dictionary_without_a_model() -> None:
    facts = read_facts(YARN_ROPE | {"xyzzy": 1})
    assert (facts.text, facts.model_type, facts.head_dim) == ({}, None, None)
    assert facts.own == YARN and facts.ignored == {"xyzzy": 1} and facts.dimensions == ()


def test_what_says_nothing_about_a_model() -> None:
    with pytest.raises(ConfigError, match="config 'here' says nothing about a model"):
        read_facts({"vocab_size": 3}, "here")


def test_what_cannot_be_read_is_kept() -> None:
    facts = read_facts(LLAMA | {"rope_scaling": "yarn"})
    assert facts.rope_error == "rope_scaling='yarn': must be a dictionary"
    assert facts.own is not None and facts.own.method == "default"
    facts = read_facts(LLAMA | {"rope_scaling": {"rope_type": "yarm"}})
    assert facts.own is None and str(facts.read_error).startswith("unknown rope_type 'yarm'")
    assert facts.scaling is None and facts.dimensions == ()
    facts = read_facts(LLAMA | {"rope_scaling": {"rope_type": "llama3"}})
    assert facts.built is None and "high_freq_factor" in facts.refusal
    facts = read_facts(LLAMA | {"head_dim": 63})
    assert "63" in facts.dimensions_error and facts.dimensions == ()


def test_another_scaling_is_read_relative_to_the_own_one() -> None:
    facts = read_facts(LLAMA | {"rope_scaling": YARN_ROPE}, spec="linear:checkpoint")
    assert facts.own == YARN and facts.scaling == RopeScaling("linear", 8.0, 4096)
    with pytest.raises(ConfigError, match="unknown method 'yarm'"):
        read_facts(LLAMA, spec="yarm:8")
    # Without an own scaling there is nothing that it could be relative to.
    assert read_facts(LLAMA | {"rope_scaling": {"rope_type": "yarm"}}, spec="yarn:8").scaling is None


@pytest.mark.parametrize(
    ("context", "length", "shown"), [(4096, None, 8192), (20000, None, 40000), (4096, 5000, 5000), (4096, 100, 100)]
)
def test_the_length_of_the_table(context: int, length: int | None, shown: int) -> None:
    facts = read_facts(LLAMA | {"max_position_embeddings": context}, spec="dynamic-yarn", length=length)
    assert facts.shown == shown


def test_a_longer_context_is_shown() -> None:
    rope = {"rope_type": "dynamic-yarn", "factor": 1.0, "original_max_position_embeddings": 4096}
    assert read_facts(LLAMA | {"max_position_embeddings": 20000, "rope_scaling": rope}).shown == 20000


def test_layer_types() -> None:
    config = LLAMA | {"model_type": "olmo3", "layer_types": TYPES, "rope_parameters": BY_TYPE}
    facts = read_facts(config)
    assert facts.nested == ["full_attention", "sliding_attention"] and facts.layer_types == TYPES
    assert facts.entry == YARN_ROPE and facts.rope_type == "yarn"
    assert {name: one.method for name, one in facts.layers.items()} == {
        "sliding_attention": "default",
        "full_attention": "yarn",
    }
    near = read_facts(config, layer_type="sliding_attention")
    assert near.rope_type == "default" and near.own is not None and near.own.method == "default"
    with pytest.raises(ConfigError, match="layer_type='full': must be one of full_attention, sliding_attention"):
        read_facts(config, layer_type="full")
    with pytest.raises(ConfigError, match="tells no layer types apart"):
        read_facts(LLAMA, layer_type="full_attention")
    broken = config | {"rope_parameters": BY_TYPE | {"sliding_attention": {"rope_type": "yarm"}}}
    assert read_facts(broken).layer_errors["sliding_attention"].startswith("unknown rope_type 'yarm'")
    assert read_facts(broken).layers == {}


def test_layers_without_rope() -> None:
    dropped = read_facts(LLAMA | {"scaled_rope": {"drop_layers": [3, 1]}})
    assert (dropped.dropped, dropped.without_rope) == ((3, 1), (1, 3))
    by_design = read_facts(LLAMA | {"model_type": "smollm3", "num_hidden_layers": 8})
    assert (by_design.dropped, by_design.without_rope) == ((), (3, 7))
    assert read_facts(LLAMA | {"scaled_rope": {"drop_layers": "all"}}).without_rope == ()


@pytest.mark.parametrize(
    ("rope", "complete", "written"),
    [
        ({}, {}, False),
        ({"original_max_position_embeddings": 64}, {}, True),
        ({}, {"original_max_position_embeddings": 64}, True),
        ({"original_max_position_embeddings": None}, {}, False),
    ],
)
def test_whether_the_original_length_is_written(rope: Any, complete: Any, written: bool) -> None:
    assert ConfigFacts(rope=rope, complete=complete).original_is_written == written


def test_values_of_other_types_count_as_nothing() -> None:
    facts = ConfigFacts(
        rope={"full_attention": {"factor": 2}},
        layer_type="sliding_attention",
        complete={"max_position_embeddings": "4096", "sliding_window": 4096.5, "layer_types": ["a", 3, None]},
    )
    assert (facts.entry, facts.rope_type, facts.context, facts.window) == ({}, "default", None, None)
    assert facts.layer_types == ["a"]
    assert ConfigFacts(complete={"sliding_window": 64, "use_sliding_window": False}).window is None


def test_the_keys_of_a_rope_type() -> None:
    assert native_keys_of("dynamic-linear") == native_keys_of("linear") == ("factor",)
    assert native_keys_of("ntk-by-parts") == native_keys_of("dynamic-yarn") == native_keys_of("yarn")
    keys = known_keys(ConfigFacts(rope={"type": "su"}))
    assert keys is not None and {"long_factor", "rope_theta", "finetuned"} <= keys
    for rope_type in ("scaled-rope", "yarm", ["yarn"], None):
        assert known_keys(ConfigFacts(rope={"rope_type": rope_type})) is None
    beta = "llama_4_scaling_beta"  # read by the attention of few families
    assert beta in (known_keys(ConfigFacts(rope=YARN_ROPE, model_type="ministral3")) or ())
    assert beta not in (known_keys(ConfigFacts(rope=YARN_ROPE, model_type="llama")) or ())


def test_ignored_keys_are_not_handed_to_the_reader() -> None:
    rope = YARN_ROPE | {"beta_fats": 64, "nested": {"a": 1}}
    facts = read_facts(LLAMA | {"rope_scaling": YARN_ROPE | {"beta_fats": 64}})
    assert facts.ignored == {"beta_fats": 64} and facts.own == YARN
    assert read_facts(LLAMA | {"rope_scaling": rope | {"rope_type": "yarm"}}).ignored == {}
    sections = read_facts(LLAMA | {"rope_scaling": {"type": "default", "mrope_section": [16]}})
    assert sections.ignored == {} and sections.own == UNSCALED
