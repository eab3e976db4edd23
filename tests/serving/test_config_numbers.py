"""The numbers at the head of a report."""

from __future__ import annotations

from typing import Any

import pytest

from scaled_rope import RopeScaling
from scaled_rope.serving.config_facts import ConfigFacts, read_facts
from scaled_rope.serving.config_numbers import lengths_in_effect, native_rope_type, numbers_in_effect
from tests.helpers.facts import LLAMA, UNSCALED, YARN

YARN_ROPE = {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 4096, "beta_fast": 64}


def said(facts: ConfigFacts, *codes: str) -> dict[str, tuple[Any, str]]:
    return {number.name: (number.value, number.origin) for number in numbers_in_effect(facts, codes)}


def test_values_and_where_they_are_from() -> None:
    numbers = said(read_facts(LLAMA | {"rope_scaling": YARN_ROPE}))
    assert numbers["method"][0] == "yarn" and numbers["rope_type"] == ("yarn", "config")
    assert numbers["factor"] == (8.0, "config")
    assert numbers["original_max_position_embeddings"] == (4096, "config")
    assert numbers["rope_theta"] == (10000.0, "config") and numbers["head_dim"] == (128, "derived")
    assert numbers["partial_rotary_factor"] == (1.0, "default") and numbers["rotated dimensions"] == (128, "derived")
    assert numbers["beta_fast"] == (64.0, "set") and numbers["beta_slow"] == (1.0, "default")
    assert numbers["truncate"] == (True, "default") and numbers["ramp"] == ("dimension", "default")
    value, origin = numbers["attention factor √(1/t)"]
    assert value == pytest.approx(1.2079441541679836) and origin == "derived; t = 0.6853"
    assert numbers["finetuned"] == (False, "default") and "layer type" not in numbers


def test_a_scaling_that_was_asked_for_is_the_specs() -> None:
    numbers = said(read_facts(LLAMA | {"rope_scaling": YARN_ROPE}, spec="yarn:4,ramp=rotations,attention_factor=1.5"))
    assert numbers["factor"] == (4.0, "spec") and numbers["ramp"] == ("rotations", "set")
    assert numbers["attention factor √(1/t)"] == (1.5, "set; t = 0.4444")
    assert not numbers.keys() & {"rope_type", "finetuned", "truncate", "mscale"}


def test_a_dynamic_scaling_is_shown_at_a_length() -> None:
    numbers = said(read_facts(LLAMA, spec="dynamic-yarn", length=16384))
    assert numbers["dynamic"] == (True, "shown at 16384 tokens")
    assert numbers["attention factor √(1/t)"][0] == pytest.approx(1.138629436111989)  # 0.1·ln 4 + 1


def test_layer_types_and_parameters_of_a_method_are_named() -> None:
    rope = {"full_attention": YARN_ROPE, "sliding_attention": {"rope_type": "default"}}
    facts = read_facts(LLAMA | {"model_type": "olmo3", "layer_types": ["full_attention"] * 4, "rope_parameters": rope})
    assert said(facts)["layer type"] == ("full_attention", "")
    numbers = said(read_facts(LLAMA, spec="proportional:2,fraction=0.5"))
    assert numbers["fraction"] == (0.5, "set")
    rope = {"rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 4096}
    numbers = said(read_facts(LLAMA | {"rope_scaling": rope | {"low_freq_factor": 1.0, "high_freq_factor": 4.0}}))
    assert numbers["low_freq_factor"] == (1.0, "config") and numbers["high_freq_factor"] == (4.0, "config")


@pytest.mark.parametrize("code", ["unknown-original", "factor-twice"])
def test_a_doubtful_original_length_is_called_so(code: str) -> None:
    facts = ConfigFacts(scaling=YARN)
    name = "original_max_position_embeddings"
    assert said(facts)[name] == (4096, "from max_position_embeddings")
    assert said(facts, code)[name] == (4096, "from max_position_embeddings, may be the extended length")
    assert said(ConfigFacts(scaling=RopeScaling("default")), code)[name] == (None, "not said")


def test_nothing_is_in_effect_where_no_scaling_can_be_read() -> None:
    facts = ConfigFacts(complete={"max_position_embeddings": 64, "sliding_window": 32})
    assert said(facts) == {} and native_rope_type(facts) is None
    lengths = {"original": None, "extended": None, "max_position_embeddings": 64, "sliding_window": 32, "shown": None}
    assert lengths_in_effect(facts, ()) == lengths


@pytest.mark.parametrize(
    ("scaling", "codes", "extended"),
    [
        (YARN, (), 32768),
        (YARN, ("unknown-original",), None),
        (UNSCALED, (), None),
        (RopeScaling("llama3", 8.0, 4096, params={"low_freq_factor": 1.0, "high_freq_factor": 4.0}), (), None),
    ],
)
def test_the_extended_length(scaling: RopeScaling, codes: tuple[str, ...], extended: int | None) -> None:
    assert lengths_in_effect(ConfigFacts(scaling=scaling), codes)["extended"] == extended


def test_phi3_has_fewer_rope_types() -> None:
    assert native_rope_type(ConfigFacts(scaling=YARN, head_dim=64, model_type="llama")) == "yarn"
    assert native_rope_type(ConfigFacts(scaling=YARN, head_dim=64, model_type="phi3")) is None
    assert native_rope_type(ConfigFacts(scaling=UNSCALED, head_dim=64, model_type="phi3")) == "default"
