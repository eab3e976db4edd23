"""The verdict on the demo."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from scaled_rope.errors import ConfigError
from scaled_rope.report import tables
from scaled_rope.report.tables import load_results
from scaled_rope.report.verdict import demo_verdict
from scaled_rope.results import Row, append_row, read_rows
from tests.helpers import ROOT
from tests.helpers.report_rows import passkeys, with_controls, write, write_rows

pytest.importorskip("matplotlib")


def rows_of(
    path: Path, gain: float = -0.03, found: dict[int, int] | None = None, **changed: tuple[float, ...]
) -> list[Row]:
    """Rows by which the claim holds, unless something is changed."""
    rows = read_rows(write_rows(path, **changed))
    keys = passkeys(rows, "run/model", {64: 10, 256: 9} if found is None else found)
    return [*with_controls(rows, {"run/model": gain}), *keys]


@pytest.mark.parametrize(
    ("changed", "failed"),
    [
        ({}, []),
        ({"gain": 0.03}, ["control"]),
        ({"gain": 0.0}, ["control"]),
        ({"gain": -0.0005}, ["control"]),  # below what counts as a change
        ({"found": {64: 10, 256: 8}}, ["retrieval"]),
        ({"gain": 0.03, "found": {64: 10, 256: 0}}, ["control", "retrieval"]),
        ({"tuned": (38, 71, 42, 90)}, ["comparison with other methods"]),  # NTK-aware is better from 64 to 128
        ({"tuned": (38, 41, 42, 145)}, ["comparison with other methods"]),  # PI is better in the last bucket
        ({"tuned": (38, 41, 69, 90)}, []),  # columns of other text are not compared
        ({"tuned": (99, 41, 42, 90)}, []),  # what happens within the trained context is not claimed
        ({"linear": (1, 110, 105, 140)}, []),
    ],
)
def test_demo_verdict(tmp_path: Path, changed: dict[str, Any], failed: list[str]) -> None:
    results = load_results([write(tmp_path / "all", rows_of(tmp_path / "rows", **changed))])
    verdict = demo_verdict(results)
    assert verdict.holds is not bool(failed)
    assert verdict.line.startswith("FAIL: " if failed else "PASS: ") and "\n" not in verdict.line
    assert re.findall(r"([a-z ]+) did not hold", verdict.line) == [f" {name}" for name in failed]
    assert verdict == demo_verdict(results, base="base", finetuned="run/model")


def test_what_was_not_measured_is_said_and_decides_nothing(tmp_path: Path) -> None:
    rows = rows_of(tmp_path / "rows")
    keyless = [row for row in rows if row["metric"] != "passkey" or row["length"] == 64]
    verdict = demo_verdict(load_results([write(tmp_path / "keyless", keyless)]))
    assert not verdict.holds and verdict.line.startswith("UNDECIDED: ") and "retrieval: not measured" in verdict.line
    uncontrolled = [row for row in rows if row["protocol"].get("name") != "last-tokens"]
    verdict = demo_verdict(load_results([write(tmp_path / "uncontrolled", uncontrolled)]))
    assert not verdict.holds and verdict.line.startswith("UNDECIDED: ") and "control: not measured" in verdict.line


def test_the_committed_rows_have_no_control() -> None:
    verdict = demo_verdict(load_results([str(ROOT / "data" / "demo_rows.jsonl")], "out/demo/model"))
    assert verdict.line.startswith("FAIL: ") and "retrieval did not hold (0 of 10 passkeys at 2048" in verdict.line
    assert "control: not measured" in verdict.line


def test_the_committed_rows_with_a_control() -> None:
    rows = str(ROOT / "data" / "demo_control_rows.jsonl")
    verdict = demo_verdict(load_results([rows], "out/demo/model"), "models/tiny-llama-256", "out/demo/model")
    assert verdict.line.startswith("FAIL: ") and "retrieval did not hold (0 of 10" in verdict.line
    assert "control held (uses its context: −1.6 % [−2.0, −1.2]" in verdict.line
    assert "not shown to be worth extending for this text: −0.4 % [−1.2, +0.5]" in verdict.line


def test_the_verdict_says_whether_cutting_would_have_done(tmp_path: Path) -> None:
    verdict = demo_verdict(load_results([write(tmp_path / "all", rows_of(tmp_path / "rows"))]))
    # Over 64-128 and 128-256: 41 and 42 against 90 and 130 of the base, whose control is as good as itself.
    change = (41 * 42 / (90 * 130)) ** 0.5 - 1
    said = f"−{-100 * change:.1f}"
    assert f"worth extending for this text: {said} % [{said}, {said}] against the base cut to" in verdict.line


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
    path = write(tmp_path / "rows.jsonl", rows_of(tmp_path / "older", tuned=(99, 99, 99, 99)))
    assert not demo_verdict(load_results([path])).holds
    for row in with_controls(read_rows(write_rows(tmp_path / "newer.jsonl")), {"run/model": -0.03}):
        if row["metric"] == "passkey":
            continue
        append_row(path, {**row, "data": {**row["data"], "name": "other", "fingerprint": "other"}})
    assert demo_verdict(load_results([path])).holds
    with pytest.raises(ConfigError, match="no perplexities"):
        demo_verdict(tables.ReportRows([], [], [], []))
