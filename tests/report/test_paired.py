"""The same questions asked of a model and its base."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import eval.report as report
from scaled_rope.report.html import table_html
from scaled_rope.report.paired import paired, paired_table, short_costs
from scaled_rope.report.summary import summarize
from scaled_rope.report.tables import about, cut_words, load_results, share_cell, tables_of, to_csv
from scaled_rope.results import Row
from tests.helpers.report_rows import new_row, write


def row(spec: str, right: list[int], fingerprint: str = "q", task: str = "arc_easy", **more: Any) -> Row:
    """A benchmark of 20 questions; `right` are those that were answered."""
    outcomes = {task: [float(index in right) for index in range(20)]}
    said = {"name": "lm-eval", "task": task, "num_fewshot": 5, "limit": None, "metric": "acc", **more.pop("said", {})}
    data = {"name": task, "fingerprint": fingerprint, "documents": 20}
    numbers = {"value": 5.0 * len(right), "unit": "%", "interval": None, "n": 20, "truncated": 0}
    return new_row("benchmark", None, spec, protocol=said, data=data, **{**numbers, "outcomes": outcomes, **more})


def test_a_difference_with_its_interval(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [row("default", list(range(12))), row("yarn:4", list(range(1, 11)), said={"max_length": 256})]
    path = write(tmp_path / "rows", rows)
    results = load_results([path])
    (section,) = results.of("benchmark")
    table = paired_table(section)
    assert table is not None
    ((series, (cell,)),) = table.lines
    assert series.name == "yarn x4, against the base"
    assert cell.text.startswith("−10.0 points [−25.0, ") and cell.value == pytest.approx(-10.0)
    ((task, change),) = short_costs(results, results.series[1])
    assert task == "arc_easy" and change.questions == 20
    summary = summarize(results)
    assert summary is not None
    said = summary.lines["price within the trained length"][0]
    assert said.text == f"arc_easy {cell.text}" and said.more == "perplexity not measured"
    assert report.main([path, "--output", str(tmp_path / "out")]) == 0
    assert "against the base on the same questions" in capsys.readouterr().out
    assert cell.text in (tmp_path / "out/report.html").read_text()


def test_other_questions_are_not_compared(tmp_path: Path) -> None:
    rows = [row("default", [1]), row("yarn:4", [1], "others")]
    (section,) = load_results([write(tmp_path / "rows", rows)]).of("benchmark")
    table = paired_table(section)
    assert table is not None
    assert [cell.text for _, cells in table.lines for cell in cells] == ["–"]
    reason = "Not compared: yarn x4 on arc_easy, 5-shot acc, since the two were asked different questions."
    assert table.remarks == (reason,) and reason in table.text() and reason in table_html(table)


def test_why_rows_are_not_compared(tmp_path: Path) -> None:
    base = row("default", [1])
    assert paired(row("yarn:4", [1], said={"chat_template": "x"}), base) == "the two were asked different questions"
    cut = row("yarn:4", [1], truncated=3, said={"max_length": 256})
    assert paired(cut, base) == "prompts were cut to different lengths"
    assert paired(row("yarn:4", [1], outcomes={}), base) == (
        "rows don't list the outcome of each question; measure them anew"
    )
    assert paired(row("yarn:4", [1], error="no data", value=None), base) == "one of the two was not measured"
    assert paired(row("yarn:4", [1], outcomes={"arc_easy": [1.0]}), base) == "outcomes of other numbers of questions"


def test_prompts_that_were_cut(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A mark at the number, one remark below, and the same in the text on hovering, in the CSV and in the summary."""
    cut = {"requests": 80, "truncated": 78, "said": {"max_length": 256}}
    rows = [row("default", list(range(12)), **cut), row("yarn:4", list(range(1, 11)), **cut)]
    path = write(tmp_path / "rows", [*rows, row("default", [1], task="boolq"), row("yarn:4", [1, 2], task="boolq")])
    results = load_results([path])
    (section,) = results.of("benchmark")
    first, compared = tables_of(section)[0], paired_table(section)
    said = "78 of 80 prompts were cut to fit 256 tokens"
    places = "unscaled, arc_easy, 5-shot acc; yarn x4, arc_easy, 5-shot acc"
    assert [[cell.marked for cell in cells] for _, cells in first.lines] == [["60.0†", "5.0"], ["50.0†", "10.0"]]
    assert first.told == (f"† {said} ({places}).",)
    assert first.text().endswith(first.told[0]) and first.told[0] in table_html(first)
    assert compared is not None and compared.told == (f"† {said} (yarn x4, against the base, arc_easy, 5-shot acc).",)
    assert f"60.0 %\n20 n, 20 documents\n{said}\n" in about("", first.lines[0][1][0], "score")
    assert [line[9] for line in to_csv([first])] == [said, "", said, ""]
    assert [task for task, _ in short_costs(results, results.series[1])] == ["arc_easy (prompts cut)", "boolq"]
    assert report.main([path, "--output", str(tmp_path / "out")]) == 0
    assert capsys.readouterr().out.count(f"† {said}") == 2
    page = (tmp_path / "out/report.html").read_text()
    assert ">60.0†<" in page and "Prompts were cut: unscaled, arc_easy, 5-shot acc;" in page
    assert said in (tmp_path / "out/report.csv").read_text()


def test_how_many_prompts_were_cut() -> None:
    plain, old = row("default", [1]), row("default", [1], truncated=1, said={"max_length": 64})
    assert cut_words(plain) == ""
    assert cut_words(old) == "1 prompt of 20 questions was cut to fit 64 tokens"
    both = cut_words({**old, "requests": 20}, {**plain, "requests": 1000})
    assert both == "1 of 1,020 prompts was cut to fit 64 tokens"
    assert cut_words({**old, "truncated": 2, "protocol": {}}) == "2 prompts of 20 questions were cut"
    quality = {"metric": "quality", "protocol": {"max_tokens": 2048}, "n": 200, "cut": 5, "right": 90, "interval": None}
    assert share_cell(quality).marked == "45.0†"
    assert cut_words(quality) == "5 of 200 prompts were cut to fit 2048 tokens"


def test_a_base_in_another_precision_is_told(tmp_path: Path) -> None:
    rows = [row("default", [1, 2], dtype="bfloat16", model="base"), row("yarn:4", [1], carried=True)]
    results = load_results([write(tmp_path / "rows", rows)])
    (section,) = results.of("benchmark")
    table, said = paired_table(section), "base in bfloat16, model in float32"
    assert table is not None and len(table.remarks) == 1 and said in table.remarks[0] and said in table.text()
    tuned = next(one for one in results.series if one.model == "m/tiny")
    assert [task for task, _ in short_costs(results, tuned)] == [f"arc_easy ({said})"]


def test_no_base(tmp_path: Path) -> None:
    (section,) = load_results([write(tmp_path / "rows", [row("yarn:4", [1])])]).of("benchmark")
    assert paired_table(section) is None
