"""What transformers does with a config."""

from __future__ import annotations

from typing import Any

import pytest
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from scaled_rope import RopeScaling, compute_rope
from scaled_rope.scaling.hf_config import ConfigNote
from scaled_rope.serving import checks_transformers
from scaled_rope.serving.checks_transformers import (
    config_that_transformers_refuses,
    difference_from_transformers,
    other_numbers_in_transformers,
    rope_type_that_phi3_has_not,
    rope_type_that_transformers_has_not,
    rotary_module_that_transformers_cannot_build,
    theta_dropped_with_rope_parameters,
)
from scaled_rope.serving.config_facts import ConfigFacts, read_facts
from tests.helpers.facts import LLAMA, UNSCALED, YARN, found, only

YARN_ROPE = {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 4096}


@pytest.mark.parametrize(
    ("rope_type", "code"), [("yarn", "phi3-rewritten"), ("linear", "phi3-refused"), ("dynamic-yarn", "phi3-refused")]
)
def test_phi3_knows_longrope_only(rope_type: str, code: str) -> None:
    facts: dict[str, Any] = {"own": YARN, "model_type": "phi3", "rope": {"rope_type": rope_type}}
    assert found(rope_type_that_phi3_has_not, **facts) == [f"error {code}"]
    assert f"rope_type {rope_type!r} is re" in only(rope_type_that_phi3_has_not, **facts).text
    # The other checks of this group have nothing to add.
    for check in (config_that_transformers_refuses, rope_type_that_transformers_has_not, other_numbers_in_transformers):
        assert found(check, **facts, refusal="no such type") == []


@pytest.mark.parametrize(
    "facts",
    [
        {"rope": {"rope_type": "longrope"}},
        {"rope": {"type": "su"}},
        {"rope": {}},
        {"rope": {"rope_type": "scaled-rope"}},
        {"rope": {"rope_type": "yarn"}, "model_type": "llama"},
        {"rope": {"rope_type": "yarn"}, "spec": "yarn:8"},
        {"rope": {"rope_type": "yarn"}, "own": None},
    ],
)
def test_what_phi3_takes_and_what_is_not_phi3(facts: dict[str, Any]) -> None:
    assert found(rope_type_that_phi3_has_not, **{"own": YARN, "model_type": "phi3"} | facts) == []


def test_a_config_that_transformers_refuses() -> None:
    finding = only(config_that_transformers_refuses, own=YARN, refusal="factor must be a float")
    assert (finding.code, finding.level) == ("transformers-refuses", "error")
    assert finding.text.endswith("does not accept this config: factor must be a float.")


@pytest.mark.parametrize(
    "facts",
    [
        {"refusal": ""},
        {"own": None},
        {"spec": "yarn:8"},
        {"rope_error": "rope_scaling='yarn': must be a dictionary"},
        {"dimensions_error": "head_dim=63: must be even"},
    ],
)
def test_a_refusal_that_another_finding_explains_or_that_does_not_matter(facts: dict[str, Any]) -> None:
    assert found(config_that_transformers_refuses, **{"own": YARN, "refusal": "no"} | facts) == []


WITH_THETA = {"rope_type": "default", "rope_theta": 1e6}


def test_a_base_that_rope_scaling_drops() -> None:
    text = {"rope_parameters": WITH_THETA, "rope_scaling": YARN_ROPE}
    finding = only(theta_dropped_with_rope_parameters, own=YARN, text=text)
    assert (finding.code, finding.level) == ("theta-dropped", "error")
    assert finding.text.startswith("rope_theta=1000000.0 is") and finding.text.endswith(": 10000 is used.")


@pytest.mark.parametrize(
    "text",
    [
        {"rope_parameters": WITH_THETA},
        {"rope_scaling": YARN_ROPE},
        {"rope_parameters": WITH_THETA, "rope_scaling": {}},
        {"rope_parameters": WITH_THETA, "rope_scaling": YARN_ROPE | {"rope_theta": 1e6}},
        {"rope_parameters": WITH_THETA, "rope_scaling": YARN_ROPE, "rope_theta": 1e6},
        {"rope_parameters": {"full_attention": WITH_THETA}, "rope_scaling": YARN_ROPE},
        {"rope_parameters": {"rope_type": "default"}, "rope_scaling": YARN_ROPE},
    ],
)
def test_a_base_that_stays(text: dict[str, Any]) -> None:
    assert found(theta_dropped_with_rope_parameters, own=YARN, text=text) == []


def test_rope_types_that_transformers_has_not() -> None:
    check = rope_type_that_transformers_has_not
    assert found(check, own=YARN, rope={"rope_type": "scaled-rope"}) == ["info not-native"]
    for name in ("dynamic-yarn", "dynamic-linear", "ntk-by-parts"):
        assert found(check, own=YARN, rope={"rope_type": name}) == ["warning not-native"]
        assert found(check, own=YARN, rope={"rope_type": name}, spec="yarn:8") == []
    assert found(check, own=YARN, rope=YARN_ROPE) == []


def test_other_numbers_in_transformers(monkeypatch: pytest.MonkeyPatch) -> None:
    facts = read_facts(LLAMA | {"rope_scaling": YARN_ROPE})
    assert list(other_numbers_in_transformers(facts)) == []
    untruncated = compute_rope(RopeScaling("yarn", 8.0, 4096, truncate=False), 128)
    monkeypatch.setitem(ROPE_INIT_FUNCTIONS, "yarn", lambda *args, **kwargs: untruncated)
    (finding,) = other_numbers_in_transformers(facts)
    assert (finding.code, finding.level) == ("computes-otherwise", "error")
    for code in ("mistral-constants", "stale-record"):
        explained = vars(facts) | {"notes": (ConfigNote(code, "says so"),)}
        assert found(other_numbers_in_transformers, **explained) == []
    assert found(other_numbers_in_transformers, **vars(facts) | {"rope": {"rope_type": "scaled-rope"}}) == []


NESTED = {"rope_parameters": {"full_attention": YARN_ROPE | {"rope_theta": 1e4}}}
QWEN2 = LLAMA | {"model_type": "qwen2", "num_key_value_heads": 4}


def test_entries_per_layer_type_where_layers_share_one_table() -> None:
    facts = read_facts(LLAMA | NESTED)
    (finding,) = other_numbers_in_transformers(facts)
    assert (finding.code, finding.level) == ("nested-parameters", "error")
    assert "reads none of the entries: frequencies up to 8.00 times off" in finding.text
    unscaled = {"rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 1e4}}}
    assert list(other_numbers_in_transformers(read_facts(LLAMA | unscaled))) == []  # which come to the same


def test_a_rotary_module_that_cannot_be_built() -> None:
    facts = read_facts(QWEN2 | NESTED)
    assert facts.built is not None and not facts.refusal
    (finding,) = rotary_module_that_transformers_cannot_build(facts)
    assert (finding.code, finding.level) == ("nested-parameters", "error")
    assert "cannot build this (KeyError: " in finding.text
    assert list(rotary_module_that_transformers_cannot_build(read_facts(QWEN2 | {"rope_scaling": YARN_ROPE}))) == []


def test_what_the_rotary_module_raises_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any, **kwargs: Any) -> None:
        raise ValueError("no such thing")

    monkeypatch.setitem(ROPE_INIT_FUNCTIONS, "yarn", fail)
    (finding,) = rotary_module_that_transformers_cannot_build(read_facts(LLAMA | {"rope_scaling": YARN_ROPE}))
    assert (finding.code, finding.level) == ("transformers-refuses", "error")
    assert "cannot build this: the rotary module of 'llama' models raises ValueError: no such thing." in finding.text


def test_the_difference_is_put_into_words() -> None:
    facts = read_facts(LLAMA)
    assert difference_from_transformers(facts) == ""
    other = ConfigFacts(own=YARN, built=facts.built, head_dim=128)
    text = difference_from_transformers(other)
    assert text.startswith(": frequencies up to 8.00 times off (dimension ")
    assert text.endswith("), attention factor 1 from transformers, 1.208 meant")


@pytest.mark.parametrize("missing", ["own", "built", "head_dim"])
def test_nothing_to_compare(missing: str) -> None:
    facts = vars(read_facts(LLAMA)) | {"own": UNSCALED, missing: None}
    assert difference_from_transformers(ConfigFacts(**facts)) == ""


def test_our_own_failing_is_not_taken_for_the_same_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    facts = read_facts(LLAMA)

    def fail(*args: Any, **kwargs: Any) -> None:
        raise ZeroDivisionError("a bug of ours")

    monkeypatch.setattr(checks_transformers, "compute_rope", fail)
    with pytest.raises(ZeroDivisionError, match="a bug of ours"):
        difference_from_transformers(facts)


def test_numbers_that_cannot_be_computed_are_not_compared() -> None:
    lists = RopeScaling("longrope", 4.0, 4096, params={"short_factor": (1.0,) * 4, "long_factor": (4.0,) * 4})
    facts = vars(read_facts(LLAMA)) | {"own": lists, "dimensions_error": "short_factor holds 4 numbers"}
    assert difference_from_transformers(ConfigFacts(**facts)) == ""
