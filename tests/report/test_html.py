"""The page of a report."""

from __future__ import annotations

import csv
import html
import json
import re
from pathlib import Path

import pytest

import eval.report as report
from scaled_rope.report.figures import GREY, PALETTE
from scaled_rope.results import read_rows
from tests.helpers.report_rows import every_kind, passkeys, write, write_rows

pytest.importorskip("matplotlib")


def check_page(page: str) -> None:
    """Check the rules for every page: it stands alone, its ids are unique, and its colors follow the theme."""
    fetched = re.findall(r'(?:src|href)="(?!#)([^"]*)"|url\((?!#)|@import', page)
    assert not fetched, "the page must need no other file"
    ids = re.findall(r'\bid="?([^" >]*)', page)
    assert len(ids) == len(set(ids))
    assert set(re.findall(r'(?:href="#|url\(#)([^")]*)', page)) <= set(ids)
    drawn = "".join(re.findall(r"<svg.*?</svg>", page, re.DOTALL))
    assert not any(ink in drawn for ink in [GREY[0], "#222222", *(light for light, _ in PALETTE)])
    assert "prefers-color-scheme: dark" in page and "width=device-width" in page


def tips(page: str, tag: str) -> list[tuple[str, str]]:
    """The tip and the text of every cell or point that has one."""
    found = re.findall(rf'<{tag}\b[^>]*? data-tip="([^"]*)"[^>]*>([^<]*)', page)
    return [(html.unescape(tip), html.unescape(text)) for tip, text in found]


def test_report_is_one_page(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows, log, folder = write_rows(tmp_path / "rows.jsonl"), tmp_path / "log.jsonl", tmp_path / "out"
    log.write_text("".join(json.dumps({"step": step, "loss": 4 - step / 9}) + "\n" for step in range(1, 9)))
    argv = [rows, "--output", str(folder), "--train-log", str(log), "--verdict", "demo", "--title", "A <test>"]
    assert report.main(argv) == 1
    page, shown = (folder / "report.html").read_text(), capsys.readouterr().out
    figures = ("perplexity", "passkey", "wavelengths", "loss")
    names = {"report.html", "report.csv", *(f"{name}.{kind}" for name in figures for kind in ("png", "pdf"))}
    assert {path.name for path in folder.iterdir()} == names
    assert page.count("<figure") == 4 and page.count("<table") == 5  # with the opening and the summary
    assert "A &lt;test&gt;" in page and "<b>UNDECIDED</b>: " in page and "python x" in page
    check_page(page)
    # Six series: four buckets, four lengths and one passkey length each, as cells; the buckets as points as well.
    assert len(tips(page, "td")) == 6 * 9 and len(tips(page, "g")) == 6 * 4
    for tip, text in [*tips(page, "td"), *tips(page, "g")]:
        assert text.strip() in tip and tip.endswith("python x") and "commit unknown" in tip
    assert "2/4" in shown and "control: not measured" in shown and "41.00" in shown
    assert report.main([rows]) == 0  # without --output: the terminal only
    assert "2/4" in capsys.readouterr().out

    kept = read_rows(rows)
    failing = write(tmp_path / "failing.jsonl", [*kept, *passkeys(kept, "run/model", {64: 10, 256: 0})])
    assert report.main([failing, "--verdict", "demo"]) == 1
    assert "\nFAIL: " in capsys.readouterr().out


def test_every_evaluator_text_and_protocol_has_its_own_table(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = write(tmp_path / "rows.jsonl", [*every_kind(), {"metric": "gguf", "data": {}}])
    assert report.main([rows, "--output", str(tmp_path / "out")]) == 0
    captured = capsys.readouterr()
    assert captured.err == "note: 1 rows of other kinds are left out: gguf\n"
    titles = [
        "Perplexity, novels, by position bucket",
        "Perplexity, novels, by context length",
        "Perplexity, sums, by position bucket",
        "Perplexity, sums, by context length",
        "Perplexity in sliding windows, novels, by window",
        "Passkeys found, by context length",
        "Passkey context",
        "Numbered passkeys found in text, by context length",
        "Passkey context, numbered keys in text",
        "Benchmarks",
        "Benchmarks, against the base on the same questions",
        "Benchmarks, niah, by context length",
        "Long-document questions answered, by context length",
    ]
    blocks = {block.splitlines()[0]: block for block in captured.out.strip().split("\n\n")}
    assert list(blocks)[2:-1] == titles  # after the two blocks of the summary
    assert re.search(r"unscaled +30\.00 +40\.50 +OOM", blocks[titles[0]])
    assert re.search(r"yarn x4 +64 +90\.0", blocks["Passkey context"]) and "none" in blocks["Passkey context"]
    assert "arc_challenge, 5-shot acc, first 50" in blocks["Benchmarks"]

    page = (tmp_path / "out" / "report.html").read_text()
    check_page(page)
    cells = tips(page, "td")
    assert all("commit c0ffee" in tip and "\npython " in tip for tip, _ in cells)
    assert any("95 % interval 29.00 to 32.00" in tip for tip, text in cells if text == "30.00")
    assert any("95 % interval 6.00 to 79.00 %" in tip for tip, text in cells if text == "1/3")
    assert {"out of memory" in tip for tip, text in cells if text == "OOM"} == {True}
    assert "Bands: 95 % intervals" in page  # two series
    pictures = {path.stem for path in (tmp_path / "out").glob("*.png")}
    assert pictures == {"perplexity-novels", "perplexity-sums", "passkey", "passkey_hard", "benchmark", "wavelengths"}

    with open(tmp_path / "out" / "report.csv", newline="") as file:
        lines = list(csv.DictReader(file))
    assert len(lines) == 2 * (6 + 4 + 1 + 1 + 2 + 1 + 2 + 2 + 1 + 1) + 2
    row = next(line for line in lines if line["table"] == titles[0] and line["column"] == "64-128")
    assert (row["measured"], row["low"], row["high"], row["n"], row["commit"]) == (
        "40.5",
        "39.5",
        "42.5",
        "9",
        "c0ffee",
    )
    assert sum(line["measured"] == "out of memory" for line in lines) == 4
