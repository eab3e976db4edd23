"""Factor, L and max_position_embeddings."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from scaled_rope import RopeScaling
from scaled_rope.scaling.known_lengths import KnownLengths
from scaled_rope.serving.checks_lengths import (
    length_other_than_factor_times_original,
    looks_extended,
    original_length_known_otherwise,
    original_length_that_is_the_extended_one,
    scaling_shorter_than_the_checkpoint,
    shortening,
    undeclared_extended_length,
    unsaid_original_length,
)
from scaled_rope.serving.config_facts import ConfigFacts
from tests.helpers.facts import YARN, found, only

LINEAR = RopeScaling("linear", 8.0, 4096)
LLAMA3 = RopeScaling("llama3", 8.0, 4096, params={"low_freq_factor": 1.0, "high_freq_factor": 4.0})


def lengths(own: RopeScaling, context: int | None, written: bool = True) -> dict[str, Any]:
    original = {"original_max_position_embeddings": own.original_max_position_embeddings} if written else {}
    return {"own": own, "rope": original, "complete": {"max_position_embeddings": context}}


def test_a_scaling_that_needs_no_original_length_leaves_it_open() -> None:
    finding = only(unsaid_original_length, **lengths(LINEAR, 4096, written=False))
    assert (finding.code, finding.level) == ("unknown-original", "info")
    assert "the original one 512" in finding.text


@pytest.mark.parametrize("more", [{}, {"spec": "yarn:8"}])
@pytest.mark.parametrize("own", [LINEAR, RopeScaling("ntk", 8.0, 4096)])
def test_a_context_that_looks_extended_leaves_the_original_length_open(own: RopeScaling, more: dict[str, Any]) -> None:
    finding = only(unsaid_original_length, **lengths(own, 32768, written=False), **more)
    assert (finding.code, finding.level) == ("factor-twice", "warning")
    assert "the factor leads to 262144 tokens" in finding.text and "the original length is 4096" in finding.text


def test_types_of_released_code_leave_it_open_too() -> None:
    facts = lengths(YARN, 32768, written=False) | {"rope": {"rope_type": "dynamic-yarn"}}
    assert only(unsaid_original_length, **facts).code == "factor-twice"


@pytest.mark.parametrize(
    ("context", "factor", "extended"),
    [(16384, 4.0, True), (8192, 4.0, False), (131072, 8.0, True), (40960, 4.0, False), (16384, 1.0, False)],
)
def test_lengths_that_look_extended(context: int, factor: float, extended: bool) -> None:
    assert looks_extended(context, factor) is extended


def test_a_length_that_is_known_of_the_model_is_told() -> None:
    known = KnownLengths(4096, 32768, "its authors say so")
    facts = lengths(LINEAR, 32768, written=False) | {"known": known}
    finding = only(original_length_known_otherwise, **facts)
    assert (finding.code, finding.level) == ("known-original", "info")
    assert "4096 tokens" in finding.text and "its authors say so" in finding.text
    assert only(original_length_known_otherwise, **facts, spec="yarn:4") == finding  # whatever the scaling asked for
    assert found(unsaid_original_length, **facts) == []
    assert found(original_length_known_otherwise, **lengths(LINEAR, 32768)) == []


@pytest.mark.parametrize(
    "facts",
    [
        lengths(LINEAR, 32768),
        lengths(LINEAR, None, written=False),
        lengths(YARN, 32768, written=False),  # a note says so
        lengths(RopeScaling("linear", 1.0, 4096), 4096, written=False),
        lengths(LINEAR, 4096, written=False) | {"spec": "linear:8"},
        {},
    ],
)
def test_an_original_length_that_is_said_or_not_needed(facts: dict[str, Any]) -> None:
    assert found(unsaid_original_length, **facts) == []


def test_a_context_that_is_still_the_original_length() -> None:
    finding = only(undeclared_extended_length, **lengths(YARN, 4096))
    assert (finding.code, finding.level) == ("undeclared-length", "warning")
    assert finding.remedy.startswith("Write max_position_embeddings=32768")


@pytest.mark.parametrize(
    ("context", "meaning", "remedy"), [(16384, "below", "factor 4 "), (65536, "above", "factor 16 ")]
)
def test_a_context_that_is_no_product_of_the_factor(context: int, meaning: str, remedy: str) -> None:
    finding = only(length_other_than_factor_times_original, **lengths(YARN, context))
    assert found(length_other_than_factor_times_original, **lengths(LINEAR, context)) == ["warning length-mismatch"]
    assert (finding.code, finding.level) == ("length-mismatch", "warning")
    assert f"={context} is {meaning} that" in finding.text and remedy in finding.remedy


FITTING = [
    lengths(YARN, 32768),
    lengths(YARN, 32770),  # rounded somewhere
    lengths(YARN, None),
    lengths(YARN, 16384, written=False),
    lengths(YARN, 4096, written=False),
    lengths(LLAMA3, 131072),  # its factor is no ratio of lengths
    lengths(LLAMA3, 4096),
    lengths(LINEAR, 4096),  # works without L
    lengths(RopeScaling("yarn", 1.0, 4096), 8192),
    lengths(YARN, 4096) | {"spec": "yarn:8"},
    {},
]


@pytest.mark.parametrize("facts", FITTING)
def test_lengths_that_go_together_or_say_nothing(facts: dict[str, Any]) -> None:
    assert found(undeclared_extended_length, **facts) == []
    assert found(length_other_than_factor_times_original, **facts) == []


@pytest.mark.parametrize(
    ("own", "context", "words"),
    [
        (RopeScaling("llama3", 8.0, 8192), 131072, "replaces llama3 x8: it is for 32768 tokens, and the checkpoint"),
        (RopeScaling("yarn", 8.0, 8192), None, "reached 65536; yarn:8 reaches that"),
        (RopeScaling("yarn", 2.0, 8192), 16384, ""),
        (RopeScaling("yarn", 4.0, 131072), 32768, ""),  # the spec corrects L
        (RopeScaling("default", original_max_position_embeddings=131072), 131072, ""),
    ],
)
def test_a_scaling_that_ends_before_the_checkpoint_did(own: RopeScaling, context: int | None, words: str) -> None:
    asked = RopeScaling("yarn", 4.0, 8192)
    text = {} if context is None else {"max_position_embeddings": context}
    facts: dict[str, Any] = {"own": own, "scaling": asked, "spec": "yarn:4", "complete": text}
    said = [finding.text for finding in scaling_shorter_than_the_checkpoint(ConfigFacts(**facts))]
    assert words in "".join(said) and len(said) == bool(words)
    assert found(scaling_shorter_than_the_checkpoint, **facts | {"spec": None, "scaling": own}) == []


def test_a_method_with_parameters_of_its_own_is_not_named_without_them() -> None:
    lists = {"short_factor": [1.0] * 16, "long_factor": [2.0] * 16}
    own = RopeScaling("longrope", 32.0, 4096, params=lists)
    text = shortening(replace(own, factor=16.0), own, 131072)
    assert text.endswith("it is for 65536 tokens, and the checkpoint reached 131072; a factor of 32 reaches that")


def test_a_factor_of_llama_3_1_is_no_ratio_of_lengths() -> None:
    own = RopeScaling("llama3", 8.0, 8192, rope_theta=5e5)
    assert shortening(replace(own, factor=16.0), own, 131072) == ""  # for twice as much
    text = shortening(replace(own, factor=4.0), own, 131072)
    assert text.endswith("llama3 x4 replaces llama3 x8: it is for 65536 tokens, and the checkpoint reached 131072")
    assert shortening(RopeScaling("dynamic-ntk", 2.0, 8192), own, 131072) == ""


def test_llama3_whose_original_length_is_the_maximum() -> None:
    finding = only(original_length_that_is_the_extended_one, **lengths(LLAMA3, 4096))
    assert (finding.code, finding.level) == ("undeclared-length", "warning") and "at least to 32768" in finding.text
    for facts in (lengths(LLAMA3, 131072), lengths(LLAMA3, 4096, written=False), lengths(YARN, 4096), {}):
        assert found(original_length_that_is_the_extended_one, **facts) == []


def test_either_of_the_two_is_found() -> None:
    assert found(length_other_than_factor_times_original, **lengths(YARN, 4096)) == []
    assert found(undeclared_extended_length, **lengths(YARN, 16384)) == []
