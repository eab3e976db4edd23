"""Keys that nothing reads."""

from __future__ import annotations

from typing import Any

import pytest
from transformers import LlamaConfig

from scaled_rope import RopeScaling
from scaled_rope.serving.checks_keys import (
    keys_unknown_to_the_rope_type,
    misspelt_top_level_keys,
    rope_keys_outside_the_text_part,
)
from scaled_rope.serving.config_facts import read_facts
from tests.helpers.facts import LLAMA, found, only


@pytest.mark.parametrize(
    ("key", "meant"),
    [("rope_scalling", "rope_scaling"), ("rope_parameter", "rope_parameters"), ("rope_thetas", "rope_theta")],
)
def test_a_misspelt_top_level_key_is_found_with_what_was_meant(key: str, meant: str) -> None:
    written = {key: 1}
    finding = only(misspelt_top_level_keys, raw=written, text=written)
    assert (finding.code, finding.level) == ("misspelt-key", "error")
    assert repr(key) in finding.text and finding.remedy == f"Probably meant: {meant!r}."


def test_a_misspelt_key_is_found_in_the_whole_config_and_in_its_text_part() -> None:
    raw = {"rope_scalling": {}, "text_config": {"rope_thetas": 1e4}}
    assert len(found(misspelt_top_level_keys, raw=raw, path=("text_config",), text=raw["text_config"])) == 2


@pytest.mark.parametrize(
    "written",
    [
        {"rope_scaling": {}},
        {"rope_scalling": None},
        {"rope_scalling": {}, "rope_scaling": {}},  # what was meant is there
        {"hidden_size": 64, "scale": 2},
    ],
)
def test_other_top_level_keys_are_left_alone(written: dict[str, Any]) -> None:
    assert found(misspelt_top_level_keys, raw=written, text=written) == []


def test_a_key_of_the_family_is_not_misspelt() -> None:
    class Family(LlamaConfig):
        rope_thetas: float = 1.0

    written = {"rope_thetas": 1.0}
    assert found(misspelt_top_level_keys, raw=written, text=written, built=LlamaConfig()) == ["error misspelt-key"]
    assert found(misspelt_top_level_keys, raw=written, text=written, built=Family()) == []


@pytest.mark.parametrize(
    ("key", "value", "said", "remedy"),
    [
        ("beta_fats", 64, "error unknown-key", "Probably meant: 'beta_fast'."),
        ("low_freq_factor", 1.0, "error unknown-key", "It belongs to rope_type 'llama3'."),
        ("xyzzy", 1, "error unknown-key", "Keys of this rope_type: attention_factor, beta_fast, "),
        ("attn_factor", "1.2", "error foreign-key", "Delete it; SGLang multiplies"),
        ("short_mscale", 1.2, "error foreign-key", "Delete it; vLLM and SGLang multiply"),
        ("attn_factor", 1.0, "info foreign-key", "Delete it: this value changes nothing."),
        ("apply_yarn_scaling", True, "info foreign-key", "Delete it: this value"),
    ],
)
def test_a_key_that_yarn_has_not(key: str, value: Any, said: str, remedy: str) -> None:
    facts: dict[str, Any] = {"rope": {"rope_type": "yarn", key: value}, "ignored": {key: value}}
    assert found(keys_unknown_to_the_rope_type, **facts) == [said]
    finding = only(keys_unknown_to_the_rope_type, **facts)
    assert finding.text.startswith(f"{key}={value!r} is no key of rope_type 'yarn'")
    assert finding.remedy.startswith(remedy)


def test_the_first_name_of_longrope_is_called_longrope() -> None:
    finding = only(keys_unknown_to_the_rope_type, rope={"type": "su"}, ignored={"beta_fast": 32})
    assert "rope_type 'longrope'" in finding.text


def test_nothing_is_said_where_no_key_is_ignored() -> None:
    assert found(keys_unknown_to_the_rope_type, rope={"rope_type": "yarn", "factor": 8.0}) == []


TEXT: dict[str, Any] = LLAMA | {"rope_theta": 1e4}
ROPE_4 = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 4096}


def test_attn_factor_says_who_reads_it_and_with_which_number() -> None:
    # DeepSeek-R1-0528-Qwen3-8B: the product of both is 1.
    rope = ROPE_4 | {"attn_factor": 0.8782488562869419}
    own = RopeScaling("yarn", 4.0, 4096)
    finding = only(keys_unknown_to_the_rope_type, rope=rope, ignored={"attn_factor": rope["attn_factor"]}, own=own)
    assert finding.level == "error" and "multiply 0.1·ln(s) + 1 = 1.13863 by it and get 1." in finding.text
    assert "ignore it and get 1.13863" in finding.text and finding.remedy.startswith("Write attention_factor=1 ")


@pytest.mark.parametrize(
    ("config", "wanted"),
    [
        ({"model_type": "foo_vl", "text_config": TEXT, "rope_scaling": ROPE_4}, ["error outside-text"]),
        ({"model_type": "foo_vl", "text_config": TEXT, "rope_theta": 1e4}, ["info outside-text"]),
        ({"model_type": "foo_vl", "text_config": TEXT, "rope_theta": 5e5}, ["error outside-text"]),
        ({"model_type": "foo_vl", "text_config": TEXT | {"rope_scaling": ROPE_4}}, []),
        ({"thinker_config": {"rope_scaling": ROPE_4, "text_config": TEXT}}, ["error outside-text"]),
        ({"model_type": "llava", "text_config": TEXT, "vision_config": {"rope_theta": 1.0}}, []),
        # An older Qwen2-VL keeps its text part on the top level.
        ({**TEXT, "model_type": "qwen2_vl", "vision_config": {}, "rope_scaling": ROPE_4}, []),
    ],
)
def test_keys_outside_of_the_text_part(config: dict[str, Any], wanted: list[str]) -> None:
    facts = read_facts(config)
    found = list(rope_keys_outside_the_text_part(facts))
    assert [f"{finding.level} {finding.code}" for finding in found] == wanted
    if wanted:
        assert "text_config, where programs read the RoPE of this model, so it has no effect" in found[0].text
        assert facts.own is not None and facts.own.method == "default"
