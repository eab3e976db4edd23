"""The contents of a report, from rows made here."""

from __future__ import annotations

from pathlib import Path

import pytest

from scaled_rope.checkpoint import DEFAULT_MODEL
from scaled_rope.errors import ConfigError
from scaled_rope.report.contents import file_names, lead, read_losses, read_report

ROWS = str(DEFAULT_MODEL.parents[1] / "data" / "base_rows.jsonl")


def test_without_rows_there_are_the_published_tables() -> None:
    report = read_report([], tables=["2"])
    assert report.results is None and report.sections == [] and [table.name for table in report.tables] == ["2"]
    assert lead(report) == "The numbers that the paper prints. Nothing was measured."


def test_rows_decide_what_is_shown() -> None:
    report = read_report([ROWS])
    assert report.tables == [] and report.figures == []
    assert file_names(report.sections) == [section.topic.metric for section in report.sections]
    assert lead(report).startswith("tiny-llama-256; ") and "measured 20" in lead(report)
    assert len(read_report([ROWS], whole_paper=True).tables) == 7


def test_losses_of_a_log(tmp_path: Path) -> None:
    (tmp_path / "log.jsonl").write_text('{"step": 3, "loss": 2.5}\n{"step": 4, "loss": 2.0}\n')
    (tmp_path / "log.csv").write_text("2.5,2.0\n1.5\n")
    assert read_losses(str(tmp_path / "log.jsonl")) == [(3, 2.5), (4, 2.0)]
    assert read_losses(str(tmp_path / "log.csv")) == [(1, 2.5), (2, 2.0), (3, 1.5)]
    with pytest.raises(ConfigError, match="holds no losses"):
        read_losses(str(tmp_path / "nowhere"))


def test_losses_are_read_in_both_forms(tmp_path: Path) -> None:
    (tmp_path / "rows").write_text('{"step": 5, "loss": 2.5}\n{"step": 6, "lo')
    (tmp_path / "list").write_text("3.5,2.5\n")
    assert read_losses(str(tmp_path / "rows")) == [(5, 2.5)]
    assert read_losses(str(tmp_path / "list")) == [(1, 3.5), (2, 2.5)]
