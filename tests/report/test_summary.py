"""What a report opens with."""

from __future__ import annotations

from pathlib import Path

import pytest

import eval.report as report
from scaled_rope.report.summary import NOT_MEASURED, Summary, retrieval, summarize
from scaled_rope.report.tables import common_contexts, load_results
from scaled_rope.results import Row, read_rows
from tests.helpers import ROOT
from tests.helpers.report_rows import new_row, passkeys, with_controls, write, write_rows


def summary_of(tmp_path: Path, rows: list[Row]) -> Summary:
    summary = summarize(load_results([write(tmp_path / "all", rows)]))
    assert summary is not None
    return summary


def all_rows(tmp_path: Path, gain: float, found: dict[int, int]) -> list[Row]:
    rows = read_rows(write_rows(tmp_path / "rows"))
    plain = [row for row in rows if row["metric"] != "passkey"]
    keys = passkeys(rows, "run/model", found) if found else []
    return [*with_controls(plain, {"run/model": gain, "base": 0.5}), *keys]


def test_a_model_that_works(tmp_path: Path) -> None:
    summary = summary_of(tmp_path, all_rows(tmp_path, -0.03, {64: 10, 128: 9, 256: 9}))
    assert summary.models == ["yarn x4 (checkpoint)", "unscaled"]
    told = {question: answers[0] for question, answers in summary.lines.items()}
    assert told["trained on"].text == "64 tokens" and told["made for"].text == "256 tokens"
    assert (told["works to, by perplexity"].text, told["works to, by perplexity"].tone) == ("512 tokens", "good")
    assert (told["works to, by retrieval"].text, told["works to, by retrieval"].tone) == ("256 tokens", "good")
    assert told["works to, by retrieval"].more == "finds 9 of 10 at 256; 3 stand in the last 64 tokens"
    use = told["uses what stands further back"]
    assert (use.text, use.more, use.tone) == ("yes", "−3.0 % [−3.0, −3.0]", "good")
    assert told["better than its base cut short"].text == "yes"
    assert told["price within the trained length"].text == "−5.0 %"
    assert summary.sentence == (
        "yarn x4 (checkpoint) was trained on 64 tokens and extended to 256: by perplexity it works to 512 tokens; by "
        "retrieval it works to 256 tokens; what stands further back helps it; it is better than its base cut short; "
        "within the trained length its perplexity changes by −5.0 %."
    )
    base = {question: answers[1] for question, answers in summary.lines.items()}
    assert base["works to, by perplexity"].text == "no further than 64 tokens"
    assert base["works to, by retrieval"].text == NOT_MEASURED and base["price within the trained length"].text == "–"
    assert base["uses what stands further back"].text == "harms"
    assert "4 more are in the tables below" in summary.note


def test_a_model_for_which_nothing_further_back_helps(tmp_path: Path) -> None:
    summary = summary_of(tmp_path, all_rows(tmp_path, 0.0, {64: 10, 256: 3}))
    told = {question: answers[0] for question, answers in summary.lines.items()}
    assert told["uses what stands further back"].text == "no"
    assert "what stands further back makes no difference to it" in summary.sentence
    assert told["works to, by retrieval"].text == "64 tokens" and told["works to, by retrieval"].tone == "bad"


def test_what_was_not_measured_is_said(tmp_path: Path) -> None:
    rows = [row for row in all_rows(tmp_path, 0.0, {}) if "window" not in row["protocol"]]
    summary = summary_of(tmp_path, rows)
    assert "by perplexity nothing is known, since its control was not measured" in summary.sentence
    assert "by retrieval nothing is known, since finding keys was not measured" in summary.sentence
    for question in ("works to, by perplexity", "works to, by retrieval", "uses what stands further back"):
        assert {said.text for said in summary.lines[question]} == {NOT_MEASURED}
    assert summarize(load_results([write(tmp_path / "other", [new_row("quality", 128, n=4, right=3)])])) is None


def test_the_committed_rows() -> None:
    summary = summarize(load_results([str(ROOT / "data" / "demo_rows.jsonl")], "out/demo/model"))
    assert summary is not None and summary.models == ["yarn x8 (fine-tuned)", "unscaled"]
    tuned = {question: answers[0] for question, answers in summary.lines.items()}
    assert (tuned["works to, by perplexity"].text, tuned["works to, by perplexity"].more) == (
        "2048 tokens",
        "of 2 texts, on bible",
    )
    assert tuned["works to, by retrieval"].text == "2048 tokens"
    assert tuned["works to, by retrieval"].more.startswith("finds 50 of 50 at 2048")
    assert tuned["better than its base cut short"].text == "mixed"  # on the Bible, and not shown on the novel
    assert summary.lines["works to, by perplexity"][1].text == "no further than 256 tokens"
    assert summary.lines["uses what stands further back"][1].text == "harms"


def test_retrieval_stops_at_the_first_length_that_is_missed(tmp_path: Path) -> None:
    results = load_results([write(tmp_path / "all", all_rows(tmp_path, 0.0, {64: 9, 128: 8, 256: 10}))])
    (tuned,) = [one for one in results.series if one.tuned]
    found = retrieval(results, tuned)
    assert found is not None and (found.works_to, found.measured_to) == (64, 256)


def test_untrained_scalings_are_ordered_by_what_cutting_would_have_done(tmp_path: Path) -> None:
    rows = [row for row in all_rows(tmp_path, 0.0, {}) if row["model"] == "base"]
    summary = summary_of(tmp_path, rows)
    assert summary.models == ["dynamic-yarn", "yarn x4", "unscaled"]
    assert summary.lines["made for"][0].text == "no fixed length"


def test_the_page_and_the_terminal_open_with_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    rows = write(tmp_path / "all", all_rows(tmp_path, -0.03, {64: 10, 256: 9}))
    assert report.main([rows, "--output", str(tmp_path / "out"), "--verdict", "demo"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("A model that was trained for 64 tokens now reads 256") and "PASS: " in out.splitlines()[-1]
    page = (tmp_path / "out" / "report.html").read_text()
    assert page.index("<div class='summary narrow'>") < page.index("<p class=verdict") < page.index("<section")
    assert page.index("<p class=verdict") < page.index("yarn x4 (checkpoint) was trained on 64 tokens")
    assert "<td class=good>yes<small>−3.0 % [−3.0, −3.0]</small></td>" in page


def test_a_checkpoint_whose_factor_does_not_say_its_length(tmp_path: Path) -> None:
    """Llama 3.1 is for more than its factor times L, and rows do not say for how much."""
    rows = all_rows(tmp_path, -0.03, {64: 10, 128: 9, 256: 9})
    for row in rows:
        if row["carried"] and row["scaling"]["method"] == "yarn":
            scaling = {"method": "llama3", "factor": 2.0, "original_max_position_embeddings": 64}
            row |= {"scaling": scaling, "label": "llama3 x2 (checkpoint)"}
    summary = summary_of(tmp_path, rows)
    assert summary.lines["made for"][0].text == "unknown"
    assert summary.sentence.startswith("llama3 x2 (checkpoint) was trained on 64 tokens: by perplexity it works to 512")
    results = load_results([write(tmp_path / "all", rows)])
    (own,) = [one for one in results.series if one.tuned]
    assert common_contexts([own]) == (64, None)
    own.carried = False  # as "llama3:2" for another model it is for twice its trained length
    assert common_contexts([own]) == (64, 128)
