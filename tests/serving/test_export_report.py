"""How an export is laid out."""

from __future__ import annotations

import json

import pytest

from scaled_rope.serving.export_report import Comparison, ExportReport
from scaled_rope.serving.gguf import GgufRope
from tests.helpers.facts import YARN

SAME = Comparison(length=4096, max_relative_difference=1e-7, worst_dimension=3, attention_factor=1.2, ours=1.2)
OTHER = Comparison(length=8192, max_relative_difference=0.5, worst_dimension=7, attention_factor=1.2, ours=1.2)
FACTOR = Comparison(length=8192, max_relative_difference=0.0, worst_dimension=0, attention_factor=1.0, ours=1.2)


def test_numbers_that_match_or_not() -> None:
    assert SAME.matches and not OTHER.matches and not FACTOR.matches
    assert FACTOR.attention_difference == pytest.approx(-0.2)


@pytest.mark.parametrize(("status", "code"), [("exact", 0), ("partial", 1), ("unknown", 1), ("refused", 2)])
def test_exit_codes(status: str, code: int) -> None:
    assert ExportReport(YARN, "vLLM 1", status).exit_code == code


def test_a_refusal_is_one_line() -> None:
    assert str(ExportReport(YARN, "vLLM 1", "refused", "no words")) == "yarn x8 for vLLM 1: refused: no words"


def test_a_report_says_where_the_config_goes_and_its_json_does_not() -> None:
    report = ExportReport(
        YARN,
        "llama.cpp 1",
        "partial",
        config={"rope_parameters": {"list": [1.0, 2.0]}},
        gguf=GgufRope({"llama.rope.freq_base": 1e4}),
        notes=("a note",),
        comparisons=(SAME, OTHER),
        config_place="in config.json, before it is converted",
    )
    text = str(report)
    assert "\nin config.json, before it is converted:\n" in text and '"list": [1.0, 2.0]' in text
    assert "in the GGUF:\n  llama.rope.freq_base=10000\n" in text and text.endswith("notes:\n  - a note")
    assert "up to 4096 tokens: same" in text and "up to 8192 tokens: DIFFERENT" in text
    values = json.loads(json.dumps(report.to_dict()))
    assert "config_place" not in values and values["label"] == "yarn x8"
    assert [one["matches"] for one in values["comparisons"]] == [True, False]
