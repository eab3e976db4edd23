"""How QuALITY's results are told."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from scaled_rope import RopeScaling
from scaled_rope.evaluation.jobs import ModelJob
from scaled_rope.evaluation.quality_evaluator import describe_choices, write_accuracies
from scaled_rope.results import Row

CARRIED = ModelJob("some/reader", "checkpoint", RopeScaling("default", 1.0, 64), True, 16, "float32", "f")
SCALED = dataclasses.replace(CARRIED, spec="yarn:4", scaling=RopeScaling("yarn", 4.0, 64), carried=False)
QUESTION = {"choice": "C", "answer": "A", "scores": [-1.5, -2.0, -0.256, -9.0]}
ROWS: dict[ModelJob, dict[int, Row]] = {CARRIED: {100: {"accuracy": 0.5, "questions": [QUESTION] * 2}}, SCALED: {}}


def test_choices_are_told_with_their_scores() -> None:
    assert list(describe_choices(ROWS)) == [
        "\nreader, unscaled",
        "1: choice C, answer A (A -1.50 B -2.00 C -0.26 D -9.00)",
        "2: choice C, answer A (A -1.50 B -2.00 C -0.26 D -9.00)",
    ]
    out_of_memory = {CARRIED: {100: {"accuracy": None, "error": "out of memory"}}}
    assert list(describe_choices(out_of_memory)) == ["\nreader, unscaled"]


def test_the_table_has_an_empty_place_where_there_is_no_accuracy(tmp_path: Path) -> None:
    write_accuracies(str(tmp_path / "table.csv"), [CARRIED, SCALED], ROWS)
    assert (tmp_path / "table.csv").read_text() == "some/reader,some/reader yarn x4\n0.5,\n"
