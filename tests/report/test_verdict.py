"""The verdict on the demo."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from scaled_rope.errors import ConfigError
from scaled_rope.report import tables
from scaled_rope.report.tables import load_results
from scaled_rope.report.verdict import demo_verdict
from scaled_rope.results import append_row, read_rows
from tests.helpers.report_rows import write, write_rows

pytest.importorskip("matplotlib")


@pytest.mark.parametrize(
    ("changed", "holds"),
    [
        ({}, True),
        ({"tuned": (38, 41, 44.0, 90)}, True),  # exactly 1.10 x 40
        ({"tuned": (38, 41, 44.1, 90)}, False),
        ({"tuned": (38, 71, 42, 90)}, False),  # NTK-aware is better from 64 to 128
        ({"tuned": (38, 41, 42, 145)}, False),  # PI is better in the last bucket
        ({"tuned": (99, 41, 42, 90)}, True),  # what happens within the trained context is not claimed
        ({"linear": (1, 110, 105, 140)}, True),
    ],
)
def test_demo_verdict(tmp_path: Path, changed: dict[str, tuple[float, ...]], holds: bool) -> None:
    results = load_results([write_rows(tmp_path / "rows.jsonl", **changed)])
    verdict = demo_verdict(results)
    assert verdict.holds is holds
    assert verdict.line.startswith("PASS" if holds else "FAIL") and "\n" not in verdict.line
    assert verdict == demo_verdict(results, base="base", finetuned="run/model")


def test_the_verdict_compares_buckets_of_one_range_only(tmp_path: Path) -> None:
    rows = read_rows(write_rows(tmp_path / "rows.jsonl"))
    for row in rows:
        if row["model"] != "base" and row.get("bucket", [0])[0] == 128:
            row["bucket"] = [100, row["bucket"][1]]
    with pytest.raises(ConfigError, match="buckets 100-256 and 128-256 differ"):
        demo_verdict(load_results([write(tmp_path / "changed", rows)]))


@pytest.mark.parametrize("gone", ["unscaled", "linear x4", "ntk x4", "yarn x4 (checkpoint)"])
def test_verdict_without_its_evidence_is_an_error(tmp_path: Path, gone: str) -> None:
    path = write_rows(tmp_path / "rows.jsonl")
    kept = [row for row in read_rows(path) if row["label"] != gone]
    Path(path).write_text("".join(json.dumps(row) + "\n" for row in kept))
    results = load_results([path])
    with pytest.raises(ConfigError, match="verdict"):
        demo_verdict(results)


def test_the_verdict_is_about_the_text_that_was_measured_last(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "rows.jsonl", tuned=(99, 99, 99, 99))
    newer = read_rows(write_rows(tmp_path / "newer.jsonl"))
    for row in newer:
        append_row(path, {**row, "data": {**row["data"], "name": "other", "fingerprint": "other"}})
    assert demo_verdict(load_results([path])).holds
    with pytest.raises(ConfigError, match="no perplexities"):
        demo_verdict(tables.ReportRows([], [], [], []))
