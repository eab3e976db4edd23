"""RULER's tasks by length in reports."""

from __future__ import annotations

from pathlib import Path

import pytest

import eval.report as report
from scaled_rope.evaluation.task_presets import RULER
from scaled_rope.report.ruler import ruler_scores, ruler_tables
from scaled_rope.report.summary import summarize
from scaled_rope.report.tables import ReportRows, load_results
from scaled_rope.results import Row
from tests.helpers.report_rows import new_row, write


def ruler_row(task: str, length: int, right: int | None, spec: str = "yarn:4", limit: int = 10, **more: object) -> Row:
    """Ten prompts of a task, the first `right` answered; None for a row with a reason."""
    said = {"name": "lm-eval", "task": task, "num_fewshot": 0, "limit": limit, "metric": str(length), "seed": 42}
    found: Row = {"value": None, "n": 0, "error": "its prompts were not ready after 600 s"}
    if right is not None:
        outcomes = {task: [1.0] * right + [0.0] * (10 - right)}
        found = {"value": 10.0 * right, "unit": "%", "n": 10, "interval": None, "outcomes": outcomes}
    return new_row("benchmark", length, spec, protocol=said, **{**found, **more})


def results_of(tmp_path: Path, rows: list[Row]) -> ReportRows:
    return load_results([write(tmp_path / "rows", rows)])


def test_six_tasks(tmp_path: Path) -> None:
    tasks = ("niah_single_1", "ruler_vt")
    rows = [ruler_row(task, length, right) for task in tasks for length, right in ((64, 10), (128, 9), (256, 4))]
    results = results_of(tmp_path, [*rows, ruler_row("ruler_cwe", 64, None), ruler_row("ruler_cwe", 128, 5)])
    scores = ruler_scores(results, results.series[0])
    assert scores is not None and scores.effective is not None and scores.effective.length == 128
    assert scores.standing == "2 of 13 tasks: niah_single_1, ruler_vt"
    lengths, by_length = ruler_tables(results)
    ((_, cells),) = lengths.lines
    assert [cell.text for cell in cells] == [
        "128", "64 to 128", "100.0", "–", "–", "2 of 13 tasks: niah_single_1, ruler_vt"
    ]  # fmt: skip
    assert by_length.columns == ["64", "128", "256"]
    told = {series.name: [cell.text for cell in cells] for series, cells in by_length.lines}
    assert told["niah_single_1"] == ["100.0", "90.0", "40.0"]
    assert told["ruler_cwe"] == ["not measured", "50.0", ""]
    assert told["mean of 2"] == ["100.0", "90.0", "40.0"]
    assert [text.partition(" [")[0] for text in told["of that at 64"]] == ["100 %", "90 %", "40 %"]
    assert "no result at 64 tokens: ruler_cwe." in by_length.remarks[0]
    summary = summarize(results)
    assert summary is not None
    said = summary.lines["works to, by RULER"][0]
    assert (said.text, said.tone) == ("128 tokens", "bad")  # the scaling is for 256
    assert "; by RULER it works to 128 tokens" in summary.sentence
    assert said.more == "[64, 128]; measured to 256; 100.0 % at 64; 2 of 13 tasks: niah_single_1, ruler_vt"


def test_all_thirteen_have_the_thresholds_of_the_authors(tmp_path: Path) -> None:
    rows = [ruler_row(task, length, right) for task in RULER for length, right in ((64, 10), (128, 9), (256, 8))]
    results = results_of(tmp_path, rows)
    ((_, cells),) = ruler_tables(results)[0].lines
    assert [cell.text for cell in cells][3:] == ["128", "256", "all 13 tasks"]


def test_what_is_missing_is_said(tmp_path: Path) -> None:
    assert ruler_tables(results_of(tmp_path, [ruler_row("ruler_vt", 64, None)])) == []
    results = results_of(tmp_path, [ruler_row("ruler_vt", 128, 10)])
    ((_, cells),) = ruler_tables(results)[0].lines
    assert cells[0].text == "not measured at 64 tokens"
    summary = summarize(results)
    assert summary is not None and summary.lines["works to, by RULER"][0].text == "not measured"
    results = results_of(tmp_path, [ruler_row("ruler_vt", 64, 0), ruler_row("ruler_vt", 128, 10)])
    ((_, cells),) = ruler_tables(results)[0].lines
    assert cells[0].text == "none: scores 0 at the trained length"
    # Rows from before outcomes were kept: a value without an interval.
    old = [ruler_row("ruler_vt", length, 10, outcomes={}) for length in (64, 128)]
    ((_, cells),) = ruler_tables(results_of(tmp_path, old))[0].lines
    assert [cell.text for cell in cells[:2]] == ["128, the longest measured", ""]


def test_other_settings_are_not_mixed(tmp_path: Path) -> None:
    rows = [ruler_row("ruler_vt", length, 10) for length in (64, 128)]
    results = results_of(tmp_path, [*rows, ruler_row("ruler_fwe", 64, 0, limit=5)])
    scores = ruler_scores(results, results.series[0])
    assert scores is not None and list(scores.rows) == ["ruler_vt"]


def test_the_page(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [ruler_row("ruler_vt", length, 10, spec) for length in (64, 128) for spec in ("default", "yarn:4")]
    assert report.main([write(tmp_path / "rows", rows), "--output", str(tmp_path / "out")]) == 0
    assert "Benchmarks, RULER, effective length" in capsys.readouterr().out
    page = (tmp_path / "out/report.html").read_text()
    assert "<h3>Effective length</h3>" in page and "works to, by RULER" in page
    assert "Benchmarks, RULER, effective length" in (tmp_path / "out/report.csv").read_text()


def test_prompts_that_were_cut_are_told_of_the_mean_and_of_the_effective_length(tmp_path: Path) -> None:
    tasks = ("niah_single_1", "ruler_vt")
    rows = [
        ruler_row(task, length, 10, requests=10, truncated=4 * (length == 128 and task == "ruler_vt"))
        for task in tasks
        for length in (64, 128)
    ]
    for one in rows:
        one["protocol"]["max_length"] = 100
    results = results_of(tmp_path, rows)
    lengths, by_length = ruler_tables(results)
    told = {series.name: [cell.marked for cell in cells] for series, cells in by_length.lines}
    assert told["ruler_vt"] == ["100.0", "100.0†"] and told["niah_single_1"] == ["100.0", "100.0"]
    assert told["mean of 2"] == ["100.0", "100.0†"]
    assert "4 of 10 prompts were cut to fit 100 tokens (ruler_vt, 128)" in by_length.text()
    said = "4 of 20 prompts were cut to fit 100 tokens"
    assert lengths.lines[0][1][0].marked.endswith("†") and f"† {said} (" in lengths.text()
    summary = summarize(results)
    assert summary is not None and summary.lines["works to, by RULER"][0].more.endswith(f"ruler_vt; {said}")
