"""The verdict on the demo."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from scaled_rope.errors import ConfigError
from scaled_rope.report import tables
from scaled_rope.report.tables import load_results
from scaled_rope.report.verdict import demo_verdict
from scaled_rope.results import Row, read_rows
from tests.helpers import ROOT
from tests.helpers.report_rows import passkeys, with_controls, write, write_rows


def rows_of(
    path: Path,
    gain: float = -0.03,
    found: dict[int, int] | None = None,
    base: float = 0.5,
    **changed: tuple[float, ...],
) -> list[Row]:
    """Rows by which the claim holds, unless something is changed.

    gain: change against the model's own control; base: that of the base against its own.
    """
    rows = read_rows(write_rows(path, **changed))
    keys = passkeys(rows, "run/model", {64: 10, 256: 9} if found is None else found)
    plain = [row for row in rows if row["metric"] != "passkey" or row["model"] != "run/model"]
    return [*with_controls(plain, {"run/model": gain, "base": base}), *keys]


@pytest.mark.parametrize(
    ("changed", "failed"),
    [
        ({}, []),
        ({"gain": 0.03}, ["control"]),
        ({"gain": 0.0}, ["control"]),
        ({"gain": -0.0005}, ["control"]),  # below what counts as a change
        ({"found": {64: 10, 256: 8}}, ["retrieval"]),
        ({"gain": 0.03, "found": {64: 10, 256: 0}}, ["retrieval", "control"]),
        ({"base": 2.2}, ["control"]),  # the base cut short has 90 / 3.2 and 130 / 3.2, the model 41 and 42
        ({"base": 1.2}, []),  # 41 and 59: from 64 to 128 tokens, up to twice the control's window, nothing is decided
        ({"tuned": (38, 41, 88, 90)}, ["control"]),  # the base cut short is better in the last bucket alone
        ({"tuned": (99, 41, 42, 990)}, []),  # what happens within the trained context and beyond the target
    ],
)
def test_demo_verdict(tmp_path: Path, changed: dict[str, Any], failed: list[str]) -> None:
    results = load_results([write(tmp_path / "all", rows_of(tmp_path / "rows", **changed))])
    verdict = demo_verdict(results)
    assert verdict.holds is not bool(failed)
    assert verdict.line.startswith("FAIL: " if failed else "PASS: ") and "\n" not in verdict.line
    assert re.findall(r"([a-z]+) did not hold", verdict.line) == failed
    assert verdict.line == demo_verdict(results, base="base", finetuned="run/model").line


def with_text(rows: list[Row], name: str) -> list[Row]:
    """The perplexities among rows, over another text."""
    return [
        {**row, "data": {**row["data"], "name": name, "fingerprint": name}}
        for row in rows
        if row["metric"] == "perplexity"
    ]


def test_one_text_is_enough_and_the_others_are_named(tmp_path: Path) -> None:
    good, bad = rows_of(tmp_path / "good"), rows_of(tmp_path / "bad", gain=0.03)
    verdict = demo_verdict(load_results([write(tmp_path / "all", [*good, *with_text(bad, "speeches")])]))
    assert verdict.holds and [(text.text, text.holds) for text in verdict.texts] == [
        ("text", True),
        ("speeches", False),
    ]
    assert "on text yes, closest: " in verdict.line
    assert "on speeches no, not below both in every bucket: +3.0 % [+3.0, +3.0] at positions" in verdict.line
    keys = [row for row in good if row["metric"] == "passkey"]
    none = demo_verdict(load_results([write(tmp_path / "none", [*bad, *with_text(bad, "speeches"), *keys])]))
    assert not none.holds and none.line.startswith("FAIL: ")


def test_buckets_between_once_and_twice_the_window_do_not_decide(tmp_path: Path) -> None:
    rows = rows_of(tmp_path / "rows")
    changed = []
    for row in rows:
        if row["metric"] == "perplexity" and row["length"] == 128:  # as if the bucket ended at 96 tokens
            row = {**row, "length": 96, "bucket": [64, 96]}
            if row["model"] == "run/model" and row["protocol"]["name"] == "truncate":
                row = {**row, "bucket_nats": [[nats + 9 for nats in document] for document in row["bucket_nats"]]}
        elif row["metric"] == "perplexity" and row["length"] == 256:
            row = {**row, "bucket": [96, 256], "protocol": {**row["protocol"], "bucket_start": 96}}
        changed.append(row)
    assert demo_verdict(load_results([write(tmp_path / "all", changed)])).holds


def test_a_gain_without_an_interval_decides_nothing(tmp_path: Path) -> None:
    rows = [{name: value for name, value in row.items() if name != "bucket_nats"} for row in rows_of(tmp_path / "rows")]
    verdict = demo_verdict(load_results([write(tmp_path / "sumless", rows)]))
    assert not verdict.holds and verdict.line.startswith("UNDECIDED: ") and "no interval: −" in verdict.line


def test_what_was_not_measured_is_said_and_decides_nothing(tmp_path: Path) -> None:
    rows = rows_of(tmp_path / "rows")
    keyless = [row for row in rows if row["metric"] != "passkey" or row["length"] == 64]
    verdict = demo_verdict(load_results([write(tmp_path / "keyless", keyless)]))
    assert not verdict.holds and verdict.line.startswith("UNDECIDED: ") and "retrieval: not measured" in verdict.line
    uncontrolled = [row for row in rows if row["protocol"].get("name") != "last-tokens"]
    verdict = demo_verdict(load_results([write(tmp_path / "uncontrolled", uncontrolled)]))
    assert not verdict.holds and verdict.line.startswith("UNDECIDED: ") and "control: not measured" in verdict.line
    own = [row for row in rows if row["protocol"].get("name") != "last-tokens" or row["model"] != "base"]
    verdict = demo_verdict(load_results([write(tmp_path / "own", own)]))
    assert verdict.line.startswith("UNDECIDED: ") and "that of the base was not measured" in verdict.line
    short = [row for row in rows if row["metric"] != "perplexity" or row["length"] <= 128]
    verdict = demo_verdict(load_results([write(tmp_path / "short", short)]))
    assert verdict.line.startswith("UNDECIDED: ") and "no position bucket ends at 256 tokens" in verdict.line


def test_committed_rows_with_a_control() -> None:
    rows = str(ROOT / "data" / "demo_control_rows.jsonl")
    verdict = demo_verdict(load_results([rows], "out/demo/model"), "models/tiny-llama-256", "out/demo/model")
    assert verdict.line.startswith("FAIL: ") and "retrieval did not hold (0 of 10" in verdict.line
    # It is below its own control everywhere, but not below the base's.
    assert (
        "control did not hold" in verdict.line
        and "+0.4 % [−1.7, +2.5] at positions 1024-1536 against the base's" in verdict.line
    )


def test_models_that_were_loaded_otherwise_beside_those_of_the_claim(tmp_path: Path) -> None:
    rows = rows_of(tmp_path / "rows")
    expected = demo_verdict(load_results([write(tmp_path / "all", rows)]))
    assert expected.holds
    record = {**rows[0]["provenance"], "arguments": {"drop_layers": [3]}}
    chosen = [
        {**row, "label": f"{row['label']}, without RoPE in 3", "model_fingerprint": "other", "provenance": record}
        for row in rows
    ]
    assert demo_verdict(load_results([write(tmp_path / "chosen", [*rows, *chosen])])).line == expected.line
    later = {**rows[0]["provenance"], "date": "2030-02-01"}
    halved = [{**row, "dtype": "bfloat16", "provenance": later} for row in rows]
    verdict = demo_verdict(load_results([write(tmp_path / "halved", [*rows, *halved])]))
    assert verdict.holds and verdict.tuned.dtype == verdict.base.dtype == "bfloat16"


@pytest.mark.parametrize("gone", ["unscaled", "yarn x4 (checkpoint)"])
def test_verdict_without_its_models_is_an_error(tmp_path: Path, gone: str) -> None:
    path = write_rows(tmp_path / "rows.jsonl")
    kept = [row for row in read_rows(path) if row["label"] != gone]
    results = load_results([write(tmp_path / "kept", kept)])
    with pytest.raises(ConfigError, match="verdict"):
        demo_verdict(results)
    with pytest.raises(ConfigError, match="no perplexities"):
        demo_verdict(tables.ReportRows([], [], [], []))
