"""Where a config comes from."""

from __future__ import annotations

from typing import Any

import pytest

from scaled_rope.serving.checks_origin import code_in_the_checkpoint, family_unknown_to_transformers, finetuned_flag
from tests.helpers.facts import found, only

CODE = {"auto_map": {"AutoModelForCausalLM": "modeling.Model", "AutoConfig": "configuration.Config"}}


def test_the_flag_of_the_released_code() -> None:
    assert found(finetuned_flag, rope={"finetuned": True}) == ["info finetuned"]
    for rope in ({}, {"finetuned": False}, {"finetuned": "yes"}):
        assert found(finetuned_flag, rope=rope) == []


def test_code_in_the_checkpoint() -> None:
    known = only(code_in_the_checkpoint, raw=CODE, model_type="llama")
    assert (known.code, known.level) == ("remote-code", "info")
    assert "(configuration.Config, modeling.Model)" in known.text
    assert found(code_in_the_checkpoint, raw=CODE, model_type="llamoid") == ["warning remote-code"]
    assert found(code_in_the_checkpoint, raw=CODE) == ["warning remote-code"]


@pytest.mark.parametrize("code", [None, {}, "modeling.Model"])
def test_no_code_in_the_checkpoint(code: Any) -> None:
    assert found(code_in_the_checkpoint, raw={"auto_map": code}, model_type="llama") == []


def test_a_family_that_transformers_does_not_know() -> None:
    finding = only(family_unknown_to_transformers, model_type="llamoid")
    assert (finding.code, finding.level) == ("unknown-family", "warning")
    assert "does not know model_type 'llamoid'" in finding.text
    assert found(family_unknown_to_transformers, model_type="llama") == []
    assert found(family_unknown_to_transformers) == []
    assert found(family_unknown_to_transformers, model_type="llamoid", raw=CODE) == []  # its code is named
