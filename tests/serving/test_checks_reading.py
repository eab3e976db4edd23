"""What cannot be read."""

from __future__ import annotations

import pytest

from scaled_rope import ConfigError
from scaled_rope.serving.checks_reading import (
    rope_that_is_no_dictionary,
    uncomputable_frequencies,
    unreadable_layer_types,
    unreadable_scaling,
)
from tests.helpers.facts import YARN, found, only


def test_something_else_in_place_of_the_rope_dictionary() -> None:
    finding = only(rope_that_is_no_dictionary, rope_error="rope_scaling='yarn': must be a dictionary")
    assert (finding.code, finding.level) == ("bad-value", "error")
    assert finding.text == "rope_scaling='yarn': must be a dictionary."
    assert found(rope_that_is_no_dictionary, rope={"factor": 8.0}) == []


@pytest.mark.parametrize(
    ("error", "code", "text"),
    [
        (
            ConfigError("unknown rope_type 'yarm'; known: yarn"),
            "unknown-type",
            "unknown rope_type 'yarm'; known: yarn.",
        ),
        (ConfigError("factor is missing in the config"), "no-factor", "factor is missing in the config."),
        (ConfigError("factor=0.5: must be at least 1"), "bad-value", "factor=0.5: must be at least 1."),
        (ConfigError("did you mean this?"), "bad-value", "did you mean this?"),
        (TypeError("not a number\nbut a list"), "bad-value", "The config cannot be read: not a number."),
        (KeyError(), "bad-value", "The config cannot be read: KeyError."),
    ],
)
def test_an_error_of_the_reader(error: Exception, code: str, text: str) -> None:
    finding = only(unreadable_scaling, read_error=error)
    assert (finding.code, finding.level, finding.text) == (code, "error", text)


def test_a_scaling_that_can_be_read() -> None:
    assert found(unreadable_scaling, own=YARN) == []


def test_numbers_that_do_not_fit_the_heads() -> None:
    finding = only(uncomputable_frequencies, own=YARN, dimensions_error="head_dim=63: must be even")
    assert (finding.code, finding.text) == ("bad-value", "head_dim=63: must be even.")
    assert found(uncomputable_frequencies, own=YARN) == []


def test_a_layer_type_that_cannot_be_read() -> None:
    errors = {"sliding_attention": "factor is missing"}
    finding = only(unreadable_layer_types, own=YARN, layer_errors=errors)
    assert (finding.code, finding.text) == ("bad-value", "layer type 'sliding_attention': factor is missing.")
    # Where nothing can be read, that has been said.
    assert found(unreadable_layer_types, layer_errors=errors) == []
    assert found(unreadable_layer_types, own=YARN) == []
