"""Row files with damaged rows, and with what was measured twice."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest

import eval.report as report
from scaled_rope.checkpoint import display_name
from scaled_rope.errors import ConfigError
from scaled_rope.evaluation.failures import failures_file
from scaled_rope.report.row_files import damage, newest, read_row_files
from scaled_rope.report.tables import load_results
from scaled_rope.results import Row
from tests.helpers import ROOT
from tests.helpers.report_rows import every_kind, new_row, perplexities, write

METRICS = ("perplexity", "passkey", "passkey_hard", "passkey_context", "passkey_hard_context", "benchmark", "quality")


def changed(row: Row, path: str, value: Any = None) -> Row:
    """A copy of a row with one field replaced, or without it."""
    row = copy.deepcopy(row)
    *outer, last = path.split(".")
    inner = row
    for name in outer:
        inner = inner[name]
    if value is KeyError:
        del inner[last]
    else:
        inner[last] = value
    return row


def of(metric: str, task: str = "") -> Row:
    return next(row for row in every_kind() if row["metric"] == metric and task in str(row["protocol"]))


def with_sums(**fields: Any) -> Row:
    """A row of perplexity over two documents that lists the sums of each; `fields` replace some."""
    sums = {"bucket_targets": 40, "bucket_nats": [[30.0], [20.0, 20.0]]}
    sums |= {"document_targets": [20, 20], "document_nats": [30.0, 20.0]}
    return of("perplexity") | sums | fields


TWO = [1, 2]
SUMS: list[tuple[dict[str, Any], str]] = [
    ({"bucket_nats": 1e308}, "field 'bucket_nats' is 1e+308; must be a list of numbers for each document"),
    ({"bucket_nats": [[]]}, "field 'bucket_nats' is [[]]; must be a list of numbers for each document"),
    ({"bucket_nats": ["aaa"]}, "field 'bucket_nats' is [\"aaa\"]; must be a list of numbers for each document"),
    ({"bucket_nats": [["a"]]}, "field 'bucket_nats' is \"a\"; must be numbers, 0 to 230 for each target"),
    ({"bucket_nats": [[None]]}, "field 'bucket_nats' is null; must be numbers, 0 to 230 for each target; null only"),
    ({"bucket_nats": [[1e308]]}, "field 'bucket_nats' is 1e+308; must be numbers, 0 to 230 for each target"),
    ({"bucket_nats": [[-3.0]]}, "field 'bucket_nats' is -3.0; must be numbers, 0 to 230 for each target"),
    ({"bucket_targets": None}, "field 'bucket_targets' is null; must be a whole number of at least 1"),
    ({"bucket_targets": [0]}, "field 'bucket_targets' is [0]; must be a whole number of at least 1"),
    ({"document_targets": [0, 9]}, "field 'document_targets' is [0, 9]; must be a list of whole numbers of at least 1"),
    (
        {"document_nats": [1.0]},
        "field 'document_nats' is [1.0]; must be a list of as many numbers as document_targets, 2",
    ),
    ({"document_nats": "a"}, "field 'document_nats' is \"a\"; must be a list of as many numbers as document_targets"),
    ({"block_nats": TWO}, "there is no field 'block_targets'"),
    ({"block_nats": [1, []], "block_targets": TWO}, "field 'block_nats' is []; must be numbers, 0 to 230"),
    (
        {"bucket_block_nats": TWO, "bucket_block_targets": [5, -5]},
        "field 'bucket_block_targets' is [5, -5]; must be a list",
    ),
    (
        {"bucket_block_nats": TWO, "bucket_block_targets": [5]},
        "field 'bucket_block_nats' is [1, 2]; must be a list of as",
    ),
]

DAMAGED = [
    (changed(of("passkey"), "metric", KeyError), "there is no field 'metric'"),
    (changed(of("passkey"), "metric", 3), "field 'metric' is 3; must be text"),
    (changed(of("passkey"), "right", None), "field 'right' is null; must be a whole number"),
    (changed(of("passkey"), "right", 9), "field 'right' is 9; must be at most n, 3"),
    (changed(of("passkey"), "n", 0), "field 'n' is 0; must be a whole number of at least 1"),
    (changed(of("passkey"), "length", "64"), "field 'length' is \"64\"; must be a whole number of at least 1"),
    (changed(of("passkey"), "prompts", [{"depth": 0}]), "field 'prompts' is "),
    (changed(of("passkey_context"), "accuracy", "many"), "field 'accuracy' is \"many\"; must be a number or null"),
    (changed(of("perplexity"), "perplexity", "low"), "field 'perplexity' is \"low\"; must be a number or null"),
    (changed(of("perplexity"), "perplexity_bucket", KeyError), "there is no field 'perplexity_bucket'"),
    (changed(of("perplexity"), "bucket", [0]), "field 'bucket' is [0]; must be two positions"),
    (changed(of("perplexity"), "interval", [1, "x"]), "field 'interval' is [1, \"x\"]; must be two numbers, or null"),
    *(
        (
            changed(of("perplexity"), name, value),
            f"field '{name}' is {value}; must be a number or null; a perplexity is 1",
        )
        for name in ("perplexity", "perplexity_bucket")
        for value in (-5.0, 0, 0.5, 1e308)
    ),
    (
        changed(of("perplexity"), "interval", [9, 3]),
        "field 'interval' is [9, 3]; must be two numbers, or null; the larger",
    ),
    (changed(of("perplexity"), "interval_bucket", [-1, 3]), "field 'interval_bucket' is [-1, 3]; must be two numbers"),
    (changed(of("perplexity"), "bucket", [512, 256]), "field 'bucket' is [512, 256]; must be two positions, the first"),
    (changed(of("passkey"), "prompts", [{"depth": 2, "right": True}]), "field 'prompts' is "),
    (changed(of("passkey"), "prompts", [{"depth": 1, "right": True, "distance": "x"}]), "field 'prompts' is "),
    (changed(of("quality"), "data.lengths", [[1]]), "field 'data.lengths' is [[1]]; must be a list of whole numbers"),
    (changed(of("benchmark"), "protocol.max_length", []), "field 'protocol.max_length' is []; must be a whole number"),
    (changed(of("passkey_context"), "protocol.passed", "x"), "field 'protocol.passed' is \"x\"; must be a number"),
    (changed(of("perplexity"), "protocol", {"name": "sliding"}), "there is no field 'protocol.stride'"),
    (changed(of("quality"), "server", "x"), "field 'server' is \"x\"; must be an object"),
    (changed(of("quality"), "server", {"url": [1]}), "field 'server.url' is [1]; must be text or null"),
    (
        changed(of("perplexity"), "protocol", {"name": "last-tokens", "window": 4}),
        "there is no field 'protocol.stride'",
    ),
    *((with_sums(**fields), message) for fields, message in SUMS),
    (changed(of("perplexity"), "data.fingerprint", KeyError), "there is no field 'data.fingerprint'"),
    (changed(of("perplexity"), "length", None), "field 'length' is null"),
    (changed(of("benchmark"), "value", None), "field 'value' is null; must be a number"),
    (changed(of("benchmark"), "value", True), "field 'value' is true; must be a number"),
    (changed(of("benchmark"), "protocol.task", KeyError), "there is no field 'protocol.task'"),
    (changed(of("quality"), "protocol", []), "field 'protocol' is []; must be an object"),
    (changed(of("passkey"), "protocol.seed", {"a": 1}), "field 'protocol.seed' is {\"a\": 1}; must be a whole number"),
    (changed(of("quality"), "data", None), "field 'data' is null; must be an object"),
    (changed(of("quality"), "seconds", "soon"), "field 'seconds' is \"soon\"; must be a number or null"),
    (changed(of("quality"), "model", None), "field 'model' is null; must be text"),
    (changed(of("quality"), "head_dim", 0), "field 'head_dim' is 0; must be a whole number of at least 1"),
    (changed(of("quality"), "provenance.date", KeyError), "there is no field 'provenance.date'"),
    (changed(of("quality"), "provenance.versions", "2"), "field 'provenance.versions' is \"2\"; must be an object"),
    (changed(of("quality"), "scaling", {"method": "yarm"}), "field 'scaling' cannot be read: "),
    (changed(of("quality"), "scaling", {}), "field 'scaling' cannot be read: "),
]


@pytest.mark.parametrize(("row", "message"), DAMAGED, ids=[message for _, message in DAMAGED])
def test_a_damaged_row_is_named_and_the_rest_is_shown(row: Row, message: str, tmp_path: Path) -> None:
    path = write(tmp_path / "rows", [*every_kind(), row])
    rows, notes = read_row_files([path], METRICS)
    (note,) = notes
    assert note.startswith(f"{path}, line {len(every_kind()) + 1}: {message}") and "\n" not in note
    assert rows == read_row_files([write(tmp_path / "whole", every_kind())], METRICS)[0]


def test_rows_of_every_evaluator_are_whole() -> None:
    assert [damage(row) for row in every_kind()] == [None] * len(every_kind())


def test_intervals_of_two_documents_are_wide() -> None:
    """Student's, of losses of 1.0 and 1.3 nats and of 4.0 and 4.9."""
    for interval in ([0.47, 21.2], [0.28, 26048.0], [0.9, None]):
        assert damage(changed(of("perplexity"), "interval", interval)) is None


def test_sums_that_overflowed_are_null_where_the_perplexity_is() -> None:
    blocks = {"block_nats": TWO, "block_targets": TWO, "bucket_block_nats": TWO, "bucket_block_targets": TWO}
    assert damage(with_sums()) is damage(with_sums(**blocks)) is None
    lost = {"perplexity": None, "perplexity_bucket": None, "bucket_nats": [[None, 1.0]], "document_nats": [None, 1.0]}
    assert damage(with_sums(**lost)) is None


@pytest.mark.parametrize("name", ["feature", "split", "samples", "dataset"])
@pytest.mark.parametrize("value", [["a"], {"a": [1]}])
def test_any_recorded_argument_tells_texts_apart(name: str, value: Any, tmp_path: Path) -> None:
    rows = [changed(row, "provenance.arguments", {name: value}) for row in perplexities("default", "t", {64: 30})]
    rows += [changed(row, "data.subset", value) for row in rows]
    rows += perplexities("default", "t", {128: 31})
    assert load_results([write(tmp_path / "rows", rows)]).notes == []


def test_every_committed_row_is_whole() -> None:
    files = [file for folder in ("data", "benchmarks") for file in (ROOT / folder).rglob("*_rows.jsonl")]
    rows = [json.loads(line) for file in files for line in file.read_text().splitlines()]
    measured = [row for row in rows if row.get("metric") in METRICS and "provenance" in row]
    assert len(measured) > 2000 and not list(filter(None, map(damage, measured)))


def test_broken_lines(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "rows.jsonl"
    lines = ["not json", json.dumps(of("passkey")), "", "[1]", "\xff", '{"metric": "other"}', '{"metric": NaN}']
    path.write_bytes("\n".join(lines).encode("latin-1") + b'\n{"metric": "passk')  # the last line is being written
    assert report.main([str(path), "--output", str(tmp_path / "page")]) == 0
    said = capsys.readouterr()
    assert said.err.splitlines() == [
        f"note: {path}, line 1: it is not JSON; the row is left out",
        f"note: {path}, line 4: it is not a JSON object; the row is left out",
        f"note: {path}, line 5: it is not JSON; the row is left out",
        f"note: {path}, line 7: field 'metric' is NaN; must be text; the row is left out",
        "note: 1 rows of other kinds are left out: other",
    ]
    assert "1/3" in said.out and "line 4: it is not a JSON object" in (tmp_path / "page/report.html").read_text()
    path.write_text("not json\n")
    with pytest.raises(ConfigError, match="line 1: it is not JSON"):
        load_results([str(path)])
    path.write_text("")
    with pytest.raises(ConfigError, match="no rows of the evaluators"):
        load_results([str(path)])
    with pytest.raises(ConfigError, match="cannot be used"):
        load_results([str(tmp_path / "absent")])


def test_half_of_a_surrogate_pair_is_no_text(tmp_path: Path) -> None:
    path = write(tmp_path / "rows", [of("passkey"), changed(of("quality"), "model", "\ud800"),
                                     changed(of("quality"), "model", "\U0001f600")])  # fmt: skip
    rows, notes = read_row_files([path], METRICS)
    assert notes == [f"{path}, line 2: it has half of a surrogate pair, which is no text; the row is left out"]
    assert [row["metric"] for row in rows] == ["passkey", "quality"]


def test_of_two_measurements_the_newer_is_shown_and_both_are_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (row,) = perplexities("default", "t", {64: 30})
    older = changed(changed(row, "provenance.date", "2030-01-01T10:00:00+00:00"), "provenance.device", "a laptop")
    newer = changed(changed(row, "provenance.date", "2030-01-01T13:00:00+02:00"), "provenance.device", "a server")
    newer["perplexity"] = newer["perplexity_bucket"] = 31.5
    for order in ([older, newer], [newer, older]):
        paths = [write(tmp_path / str(index), [each, each]) for index, each in enumerate(order)]
        assert report.main([*paths, "--output", str(tmp_path / "page")]) == 0
        said = capsys.readouterr()
        assert "31.50" in said.out and "30.00" not in said.out
        (note,) = said.err.splitlines()
        assert note.startswith(
            "note: 1 measurement was made more than once, and the newest is shown: perplexity t at 64"
        )
        assert "(a laptop)" in note and "(a server)" in note
        assert "made more than once" in (tmp_path / "page/report.html").read_text()
    # A copy of a file is no second measurement, and a failure takes nothing away.
    assert load_results([paths[0], paths[0]]).notes == []
    failed = {**newer, "perplexity": None, "perplexity_bucket": None, "error": "out of memory"}
    assert newest([older, failed]) == older == newest([failed, older])


def test_what_could_not_be_measured_is_shown_with_its_reason(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    said = {"name": "lm-eval", "task": "ruler_cwe", "num_fewshot": 0, "limit": 2, "seed": 42}
    score = {"value": 50.0, "unit": "%", "standard_error": 3.0, "interval": [20.0, 80.0], "n": 2}
    reason = "512 tokens are too short: there is a prompt without an answer in it"
    nothing = dict.fromkeys(score) | {"n": 0, "error": reason}
    absent = nothing | {"error": "no file"}
    rows = [
        new_row("benchmark", 1024, protocol={**said, "metric": "1024"}, **score),
        new_row("benchmark", 512, protocol={**said, "metric": "512"}, **nothing),
        new_row("benchmark", None, protocol={**said, "task": "arc", "metric": "acc"}, **absent),
    ]
    assert report.main([write(tmp_path / "rows", rows), "--output", str(tmp_path)]) == 0
    shown = capsys.readouterr().out
    assert f"not measured at 512: {reason}" in shown and "50.0" in shown
    assert "not measured at arc, 0-shot acc, first 2: no file" in shown
    page = (tmp_path / "report.html").read_text()
    assert reason in page and "no file" in page
    assert f"{reason}" in (tmp_path / "report.csv").read_text()


def test_a_model_that_could_not_be_measured_is_named_until_it_is(tmp_path: Path) -> None:
    rows = perplexities("yarn:4", "text", {64: 30})
    path = write(tmp_path / "rows.jsonl", rows)
    assert load_results([path]).notes == []
    name = f"{display_name(rows[0]['model'])}, {rows[0]['label']}"
    record = {"metric": "perplexity", "job": "broken/model", "task": "", "failed": "no weights", "date": "2031-01-01"}
    records = [record, record | {"job": name, "task": "text"}, record | {"job": name, "metric": "quality"}]
    records.append(record | {"job": name, "task": "text", "date": "2000-01-01"})  # measured since then
    write(failures_file(path), records)
    assert load_results([path]).notes == [
        "perplexity of broken/model could not be measured: no weights",
        f"perplexity of {name} on text could not be measured: no weights",
        f"quality of {name} could not be measured: no weights",
    ]
    failures_file(path).write_text("")
    assert load_results([path]).notes == []
