"""Notes of the reader as findings."""

from __future__ import annotations

from typing import Any

import pytest

from scaled_rope import RopeScaling
from scaled_rope.scaling.hf_config import ConfigNote
from scaled_rope.serving.checks_notes import (
    both_dialects,
    lone_mscale,
    missing_original_length,
    mistral_constants,
    plain_note,
    remarks_of_the_reader,
)
from scaled_rope.serving.config_facts import ConfigFacts, read_facts
from tests.helpers.facts import LLAMA, YARN, found

MISSING = ConfigNote("no-original", "original_max_position_embeddings is missing")
MSCALE = ConfigNote("lone-mscale", "mscale_all_dim is ignored without mscale")
DIALECTS = ConfigNote("both-dialects", "both are present")


def test_a_note_as_it_stands() -> None:
    finding = plain_note(ConfigFacts(), ConfigNote("two-values", "one is ignored", "info"))
    assert (finding.code, finding.level, finding.text) == ("two-values", "info", "one is ignored.")
    assert finding.remedy.startswith("Delete the one that is ignored")


def test_what_transformers_drops_is_an_error_and_what_has_no_remedy_has_none() -> None:
    assert plain_note(ConfigFacts(), ConfigNote("flat-parameters", "dropped")).level == "error"
    finding = plain_note(ConfigFacts(), ConfigNote("older-type", "not seen"))
    assert (finding.level, finding.remedy) == ("warning", "")


def test_notes_become_findings_in_their_order() -> None:
    notes = (ConfigNote("two-values", "b"), ConfigNote("no-theta", "a"), ConfigNote("two-values", "c"))
    assert [finding.text for finding in remarks_of_the_reader(ConfigFacts(notes=notes))] == ["b.", "a.", "c."]
    assert found(remarks_of_the_reader) == []


@pytest.mark.parametrize(
    ("context", "factor", "code"),
    [
        (65536, 16.0, "factor-twice"),  # 4096 is a length of pre-training
        (16384, 32.0, "factor-twice"),
        (65536, 3.0, "no-original"),  # no power of two
        (8192, 2.0, "no-original"),  # not extended
        (16384, 64.0, "no-original"),  # 256 tokens are too few
        (65536, 1.0, "no-original"),
        (None, 16.0, "no-original"),
    ],
)
def test_a_missing_original_length_may_count_the_factor_twice(context: int | None, factor: float, code: str) -> None:
    facts = ConfigFacts(own=RopeScaling("yarn", factor, 65536), complete={"max_position_embeddings": context})
    finding = missing_original_length(facts, MISSING)
    assert (finding.code, finding.level) == (code, "warning")
    assert [one.code for one in remarks_of_the_reader(ConfigFacts(notes=(MISSING,)))] == ["no-original"]


@pytest.mark.parametrize(
    ("model_type", "text", "code"),
    [
        ("deepseek_v3", MSCALE.text, "mscale-twice"),
        ("deepseek_v3", "mscale is ignored without mscale_all_dim", "lone-mscale"),
        ("llama", MSCALE.text, "lone-mscale"),
        (None, MSCALE.text, "lone-mscale"),
    ],
)
def test_one_mscale_without_the_other(model_type: str | None, text: str, code: str) -> None:
    assert lone_mscale(ConfigFacts(model_type=model_type), ConfigNote("lone-mscale", text)).code == code
    facts = ConfigFacts(model_type=model_type, notes=(ConfigNote("lone-mscale", text),))
    assert [finding.code for finding in remarks_of_the_reader(facts)] == [code]


@pytest.mark.parametrize(("zero", "other"), [("mscale", "mscale_all_dim"), ("mscale_all_dim", "mscale")])
def test_an_mscale_of_0_is_no_missing_one(zero: str, other: str) -> None:
    rope = {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 4096, zero: 0.0, other: 1.0}
    (finding,) = remarks_of_the_reader(read_facts(LLAMA | {"rope_scaling": rope}))
    assert finding.code == "lone-mscale"
    assert finding.text == f"{zero}=0.0 counts as not said, so {other}=1.0 is ignored, as in transformers."
    assert "Write both" not in finding.remedy


@pytest.mark.parametrize(
    ("older", "newer", "level", "ending"),
    [
        ({"type": "yarn", "factor": 8}, {"rope_type": "yarn", "factor": 8, "rope_theta": 1e4}, "info", "say the same."),
        ({"factor": 8}, {"rope_type": "default", "factor": 8}, "info", "say the same."),
        ({"type": "yarn", "factor": 8}, {"type": "linear", "factor": 8}, "warning", "rope_type 'yarn' and 'linear'."),
        ({"factor": 8}, {"factor": 4, "beta_fast": 2}, "warning", "beta_fast None and 2, factor 8 and 4."),
        ("yarn", {"factor": 4}, "warning", "'yarn' and {'factor': 4}."),
        ({"list": [1.0] * 20}, {}, "warning", "list [1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1... and None."),
    ],
)
def test_two_dialects_that_agree_or_not(older: Any, newer: Any, level: str, ending: str) -> None:
    facts = ConfigFacts(text={"rope_scaling": older, "rope_parameters": newer})
    finding = both_dialects(facts, DIALECTS)
    assert finding.level == level and finding.text.endswith(ending), finding.text


def test_the_constants_of_yarn_mistral_come_with_how_far_transformers_is_off() -> None:
    rope = {"type": "yarn", "factor": 8.0, "original_max_position_embeddings": 4096, "finetuned": True}
    facts = read_facts(LLAMA | {"model_type": "mistral", "rope_scaling": rope})
    (note,) = (note for note in facts.notes if note.code == "mistral-constants")
    text = mistral_constants(facts, note).text
    assert "frequencies up to" in text and "attention factor 1.208 from transformers, 1.146 meant." in text
    # Without a config object there is nothing to compare with.
    assert mistral_constants(ConfigFacts(own=YARN), note).text == f"{note.text}."
