"""What the demo's page opens with."""

from __future__ import annotations

from pathlib import Path

import eval.report as report
from scaled_rope.report.demo_opening import demo_opening
from scaled_rope.report.html import build_page
from scaled_rope.report.summary import Summary
from scaled_rope.report.tables import load_results
from scaled_rope.report.verdict import demo_verdict
from scaled_rope.results import Row, read_rows
from tests.helpers.report_rows import passkeys, with_controls, write, write_rows


def all_rows(path: Path, found: dict[int, int], gain: float = -0.03) -> list[Row]:
    rows = read_rows(write_rows(path))
    plain = [row for row in rows if row["metric"] != "passkey"]
    before = passkeys(rows, "base", {length: 10 if length <= 64 else 1 for length in found})
    unscaled = [row for row in before if row["label"] == "unscaled"]
    return [*with_controls(plain, {"run/model": gain, "base": 0.5}), *unscaled, *passkeys(rows, "run/model", found)]


def opening_of(path: Path, rows: list[Row]) -> Summary:
    results = load_results([write(path, rows)])
    return demo_opening(results, demo_verdict(results))


def test_one_sentence_and_a_table_by_length(tmp_path: Path) -> None:
    rows = all_rows(tmp_path / "rows", {64: 10, 128: 10, 256: 9, 512: 2})
    needles = [
        {**row, "protocol": {**row["protocol"], "wording": "needle"}, "right": row["right"] // 2}
        for row in rows
        if row["metric"] == "passkey"
    ]
    opening = opening_of(tmp_path / "all", [*rows, *needles])
    assert opening.sentence == (
        "A model that was trained for 64 tokens now reads 256: it finds a number hidden in 256 tokens 9 of 10 times "
        "(before: 1 of 10); it predicts better than it and the base do from the last 64 "
        "tokens alone; it works to 256 tokens, not to 512."
    )
    assert opening.models == ["64", "128", "256", "512"]
    texts = {question: [said.text for said in answers] for question, answers in opening.lines.items()}
    assert texts["passkeys found, before"] == ["10/10", "1/10", "1/10", "1/10"]
    assert texts["passkeys found, extended"] == ["10/10", "10/10", "9/10", "2/10"]
    assert texts["needles found, extended"] == ["5/10", "5/10", "4/10", "1/10"]
    own = texts["perplexity, text: against itself cut to 64"]
    assert own == ["–", "−3.0 %", "−3.0 %", "−3.0 %"]
    assert [said.tone for said in opening.lines["passkeys found, extended"]] == ["good", "good", "good", ""]
    assert "Perplexity: how unsure a model is" in opening.note and "A needle is the same in other words" in opening.note


def test_what_does_not_hold_is_in_the_sentence(tmp_path: Path) -> None:
    opening = opening_of(tmp_path / "all", all_rows(tmp_path / "rows", {64: 10, 128: 8, 256: 3}, 0.03))
    assert (
        "was extended to 256 and is not shown to read them: it finds a number hidden in 256 tokens 3 of 10 times"
        in (opening.sentence)
    )
    assert (
        "it is not shown to predict better than from the last 64 tokens alone; it works to 64 tokens, not to 128."
        in (opening.sentence)
    )
    nowhere = opening_of(tmp_path / "none", all_rows(tmp_path / "more", {64: 8, 256: 0}))
    assert nowhere.sentence.endswith("it does not work even at 64 tokens, the shortest measured.")


def test_what_was_not_measured_is_said(tmp_path: Path) -> None:
    rows = [row for row in all_rows(tmp_path / "rows", {}) if row["protocol"].get("name") != "last-tokens"]
    opening = opening_of(tmp_path / "all", rows)
    assert opening.lines == {} and "whether it finds a number hidden in 256 tokens was not measured" in opening.sentence
    assert "whether the whole text helps it to predict was not measured" in opening.sentence
    assert opening.sentence.endswith("to which length it works was not measured.")


def test_the_page_has_it_before_the_verdict_and_the_summary_below(tmp_path: Path) -> None:
    rows = write(tmp_path / "all", all_rows(tmp_path / "rows", {64: 10, 256: 9}))
    results = load_results([rows])
    verdict = demo_verdict(results)
    page = build_page("t", "", (verdict.holds, verdict.line), [], demo_opening(results, verdict))
    assert page.index("A model that was trained for 64 tokens now reads 256") < page.index("<b>PASS</b>")


def test_the_exit_code_says_whether_it_holds(tmp_path: Path, capsys: object) -> None:
    for found, code in ((9, 0), (8, 1)):
        rows = write(tmp_path / f"{found}", all_rows(tmp_path / f"rows{found}", {64: 10, 256: found}))
        assert report.main([rows, "--verdict", "demo"]) == code
