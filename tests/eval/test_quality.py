"""eval/quality.py: questions about long stories."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest

import eval.quality as quality
from scaled_rope.evaluation import quality_evaluator
from scaled_rope.evaluation.statistics import wilson_interval
from tests.helpers.evaluators import evaluate
from tests.helpers.retrieval import (
    TRAINED,
    bigram_model,
    checkpoint,  # noqa: F401
    merges_bracket_and_a,
    tokenizer,  # noqa: F401
    tokenizers,  # noqa: F401
    write_questions,
)


def test_quality_end_to_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tokenizer = merges_bracket_and_a()
    model = bigram_model(tokenizer, {"Ġ": {"(": 8.0}, "(": {"C": 6.0}})
    model.save_pretrained(tmp_path / "likes-c")
    tokenizer.save_pretrained(tmp_path / "likes-c")
    questions = write_questions(tmp_path / "questions.jsonl", "2C012D")
    output, table = tmp_path / "rows.jsonl", tmp_path / "table.csv"
    argv = ["-m", str(tmp_path / "likes-c"), "--scaling", "default", "--dynamic-yarn", "--dataset", questions]
    rows = evaluate(quality.main, output, *argv, "--print-choices", "--output-file", str(table))
    for row in rows:
        assert (row["n"], row["right"], row["accuracy"], row["cut"]) == (6, 3, 0.5, 0)
        assert row["interval"] == wilson_interval(3, 6)
        assert [one["answer"] for one in row["questions"]] == list("CCABCD")
        assert [one["right"] for one in row["questions"]] == [True, True, False, False, True, False]
        assert row["length"] == max(one["tokens"] for one in row["questions"])
    with open(table, newline="") as file:
        names, values = csv.reader(file)
    assert names == [str(tmp_path / "likes-c"), f"{tmp_path / 'likes-c'} dynamic-yarn"] and values == ["0.5", "0.5"]
    said = capsys.readouterr().out
    assert "3: choice C, answer A" in said and "3/6, 50.0 %" in said
    monkeypatch.setattr(quality_evaluator, "score_letters", None)  # nothing is left to compute
    assert evaluate(quality.main, output, *argv) == rows


def test_quality_limits(checkpoint: str, tmp_path: Path) -> None:
    questions = write_questions(tmp_path / "questions.jsonl", "012301")
    argv = ["-m", checkpoint, "--dataset", questions]
    (whole,) = evaluate(quality.main, tmp_path / "whole.jsonl", *argv, "--limit", "2")
    short, long = (one["tokens"] for one in whole["questions"])
    assert whole["n"] == 2 and short < long
    limit = ["--max-tokens", str(short + 60)]
    (cut,) = evaluate(quality.main, tmp_path / "cut.jsonl", *argv, *limit)
    assert (cut["n"], cut["cut"], cut["length"]) == (6, 3, short + 60)
    assert [one["tokens"] for one in cut["questions"]] == [short, short + 60] * 3
    (dropped,) = evaluate(quality.main, tmp_path / "drop.jsonl", *argv, *limit, "--too-long", "drop", "--limit", "2")
    assert (dropped["n"], dropped["cut"]) == (2, 0)
    assert [one["scores"] for one in dropped["questions"]] == [one["scores"] for one in cut["questions"][:3:2]]


def test_dynamic_scaling_reads_a_question_at_its_prompts_end(checkpoint: str, tmp_path: Path) -> None:
    questions = write_questions(tmp_path / "questions.jsonl", "0")
    argv = ["-m", checkpoint, "--dataset", questions]
    (dynamic,) = evaluate(quality.main, tmp_path / "dynamic.jsonl", *argv, "--dynamic-yarn")
    # Letters are one token here, so the prompt is all but the last.
    factor = (dynamic["questions"][0]["tokens"] - 1) / TRAINED
    (static,) = evaluate(quality.main, tmp_path / "static.jsonl", *argv, "--scaling", f"yarn:{factor!r}")
    # Rows keep four decimals.
    assert dynamic["questions"][0]["scores"] == pytest.approx(static["questions"][0]["scores"], abs=2e-4)
