"""The report: result rows become tables, figures, a page that explains every number, a CSV file and a verdict."""

from __future__ import annotations

import csv
import html
import json
import re
from pathlib import Path
from typing import Any

import pytest

import eval.report as report
from scaled_rope import RopeScaling
from scaled_rope.command_line import run_cli
from scaled_rope.errors import ConfigError
from scaled_rope.report import tables
from scaled_rope.report.contents import read_losses
from scaled_rope.report.figures import GREY, PALETTE
from scaled_rope.report.tables import load_results
from scaled_rope.report.verdict import demo_verdict
from scaled_rope.results import Row, append_row, read_rows

pytest.importorskip("matplotlib")

ENDS = (64, 128, 256, 512)
CURVES = {
    ("base", "default"): (40, 90, 130, 180),
    ("base", "linear:4"): (120, 110, 105, 140),
    ("base", "ntk:4"): (55, 70, 100, 150),
    ("base", "yarn:4"): (60, 62, 64, 150),
    ("base", "dynamic-yarn"): (40, 60, 64, 80),
    ("run/model", "yarn:4"): (38, 41, 42, 90),
}


def write_rows(path: Path, **changed: tuple[float, ...]) -> str:
    """Rows of the six series above; `changed` replaces the fine-tuned curve ("tuned") or a base curve by method."""
    base = RopeScaling("default", original_max_position_embeddings=64)
    provenance = {"command": "python x", "commit": None, "versions": {}, "device": "cpu", "cpu_count": 1}
    for (model, spec), curve in CURVES.items():
        tuned = model != "base"
        scaling = RopeScaling.from_spec(spec, base)
        shared = {
            "model": model,
            "model_fingerprint": model,
            "dtype": "float32",
            "head_dim": 16,
            "scaling": scaling.to_dict(),
            "label": f"{scaling.label} (checkpoint)" if tuned else scaling.label,
            "carried": tuned or spec == "default",
            "provenance": {**provenance, "date": "2030-01-01", "seed": 1},
        }
        values = changed.get("tuned" if tuned else scaling.method, curve)
        for start, end, value in zip((0, *ENDS), ENDS, values, strict=False):
            numbers = {"perplexity": value, "perplexity_bucket": value, "bucket": [start, end], "targets": 1}
            data = {"fingerprint": "d", "name": "text", "windows": 1}
            measured = {"metric": "perplexity", "data": data, "length": end, "protocol": {"bucket_start": start}}
            append_row(path, {**shared, **measured, **numbers})
        prompts = [{"depth": depth, "key": 1, "right": depth < 0.5} for depth in (0.0, 0.3, 0.6, 1.0)]
        numbers = {"n": 4, "right": 2, "accuracy": 0.5, "interval": [0.15, 0.85], "prompts": prompts}
        measured = {"metric": "passkey", "data": {"fingerprint": "p"}, "length": 64, "protocol": {"iterations": 4}}
        append_row(path, {**shared, **measured, **numbers})
    return str(path)


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


def contents(results: tables.ReportRows) -> Any:
    return [(one.topic, {s.full_name: cells for s, cells in one.rows.items()}) for one in results.sections]


def test_rows_of_older_weights_or_texts_do_not_share_a_line_with_new_ones(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "rows.jsonl")
    before = load_results([path])
    rows = [row for row in read_rows(path) if row["model"] == "base" and row["metric"] == "perplexity"]
    renewed = tmp_path / "renewed.jsonl"
    for row in rows:
        stale = {**row, "perplexity_bucket": 1.0, "length": row["length"] + 1}
        append_row(renewed, {**stale, "model_fingerprint": "older"})
        append_row(renewed, {**stale, "data": {**row["data"], "fingerprint": "older"}})
        append_row(renewed, {**stale, "dtype": "bfloat16"})
    for row in read_rows(path):
        append_row(renewed, row)
    after = load_results([str(renewed)])
    assert contents(after) == contents(before)
    assert after.notes == [f"{3 * len(rows)} rows of older weights or texts are left out"]
    named = load_results([path], finetuned="run/model")
    assert [one.label for one in named.series][-1] == "yarn x4 (fine-tuned)"


def test_windows_of_another_length_are_another_section(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "rows.jsonl")
    rows = [row for row in read_rows(path) if row["metric"] == "perplexity"]
    both = tmp_path / "both.jsonl"
    for tokens in (4096, 8192):
        for row in rows:
            append_row(both, {**row, "data": {**row["data"], "window_tokens": tokens, "fingerprint": str(tokens)}})
    found = load_results([str(both)])
    assert not found.notes
    said = [tables.describe(section) for section in found.of("perplexity")]
    assert len(said) == 2 and "of 4096 tokens" in said[0] and "of 8192 tokens" in said[1]


def test_buckets_of_other_lengths_are_other_columns_and_other_curves(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [
        *perplexities("default", "t", {64: 30, 256: 90}),
        *perplexities("default", "t", {128: 40, 256: 95, 1024: 99}),
        *perplexities("yarn:4", "t", {128: 35, 256: None}),
    ]
    results = load_results([write(tmp_path / "rows", rows)])
    (section,) = results.sections
    unscaled, yarn = results.series
    assert section.partitions(unscaled) == [
        [(64, "0-64"), (256, "64-256"), (1024, "256-1024")],  # which both sets of lengths share
        [(128, "0-128"), (256, "128-256"), (1024, "256-1024")],
    ]
    assert section.partitions(yarn) == [[(128, "0-128"), (256, "128-256")]]
    assert report.main([str(tmp_path / "rows"), "--output", str(tmp_path)]) == 0
    buckets, whole = (block.splitlines()[1:] for block in capsys.readouterr().out.strip().split("\n\n")[:2])
    assert buckets[0].split() == ["0-64", "0-128", "64-256", "128-256", "256-1024"]
    assert buckets[2].split() == ["unscaled", "30.00", "40.00", "90.00", "95.00", "99.00"]
    assert buckets[3].split() == ["yarn", "x4", "35.00", "OOM"]
    assert whole[0].split() == ["64", "128", "256", "1024"]
    page = (tmp_path / "report.html").read_text()
    assert "a line per set of lengths" in page


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


def check_page(page: str) -> None:
    """What holds for every page: it stands alone, its ids are unique, and its colors follow the theme."""
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
    assert report.main(argv) == 0
    page, shown = (folder / "report.html").read_text(), capsys.readouterr().out
    figures = ("perplexity", "passkey", "wavelengths", "loss")
    names = {"report.html", "report.csv", *(f"{name}.{kind}" for name in figures for kind in ("png", "pdf"))}
    assert {path.name for path in folder.iterdir()} == names
    assert page.count("<figure") == 4 and page.count("<table") == 3
    assert "A &lt;test&gt;" in page and "PASS" in page and "python x" in page
    check_page(page)
    # Six series: four buckets, four lengths and one passkey length each, as cells; the buckets as points as well.
    assert len(tips(page, "td")) == 6 * 9 and len(tips(page, "g")) == 6 * 4
    for tip, text in [*tips(page, "td"), *tips(page, "g")]:
        assert text.strip() in tip and tip.endswith("python x") and "commit unknown" in tip
    assert "2/4" in shown and "PASS" in shown and "41.00" in shown
    assert report.main([rows]) == 0  # without --output: the terminal only
    assert "2/4" in capsys.readouterr().out

    failing = write_rows(tmp_path / "failing.jsonl", tuned=(38, 41, 99, 99))
    assert report.main([failing, "--output", str(folder), "--verdict", "demo"]) == 1


def new_row(metric: str, length: int | None, spec: str = "default", **fields: Any) -> Row:
    """A row of some evaluator, with what every row has."""
    scaling = RopeScaling.from_spec(spec, RopeScaling("default", original_max_position_embeddings=64))
    record = {"command": f"python {metric}", "commit": "c0ffee", "versions": {"torch": "2"}, "device": "cpu"}
    shared = {
        "model": "m/tiny",
        "model_fingerprint": "f",
        "dtype": "float32",
        "head_dim": 16,
        "scaling": scaling.to_dict(),
        "label": scaling.label,
        "carried": spec == "default",
        "metric": metric,
        "length": length,
        "data": {"name": metric, "fingerprint": metric},
        "protocol": {"name": metric},
        "provenance": {**record, "cpu_count": 1, "date": "2030-01-01", "seed": None},
    }
    return {**shared, **fields}


def perplexities(spec: str, text: str, values: dict[int, float | None], **protocol: Any) -> list[Row]:
    """Rows over one text; None is a length that ran out of memory."""
    rows, start = [], 0
    for length, value in values.items():
        numbers: Row = {"perplexity": value, "perplexity_bucket": value, "bucket": [start, length], "targets": 9}
        bounds = None if value is None else [value - 1, value + 2]
        numbers |= {"error": "out of memory"} if value is None else {"interval": bounds, "interval_bucket": bounds}
        data = {"name": text, "fingerprint": text, "documents": 3}
        said = {"name": "truncate", "bucket_start": start, **protocol}
        rows.append(new_row("perplexity", length, spec, data=data, protocol=said, **numbers))
        start = length
    return rows


def every_kind() -> list[Row]:
    """Rows of every evaluator under two scalings, over two texts and two protocols."""
    rows: list[Row] = []
    for spec, more in (("default", 0), ("yarn:4", 5)):
        rows += perplexities(spec, "novels", {64: 30 + more, 128: 40.5 + more, 256: None})
        rows += perplexities(spec, "sums", {64: 7 + more, 128: 8 + more})
        rows += perplexities(spec, "novels", {128: 33 + more}, name="sliding", stride=16, weighting="window")
        prompts = [{"depth": depth, "right": depth < 0.5, "key": 1} for depth in (0, 0.5, 1)]
        found = {"n": 3, "right": 1, "accuracy": 1 / 3, "interval": [0.06, 0.79], "prompts": prompts}
        said = {"name": "teacher-forced", "iterations": 3}
        for metric in ("passkey", "passkey_hard"):
            rows.append(new_row(metric, 64, spec, protocol=said, **found))
            context = {"context": 64 if more else None, "accuracy": 0.9 if more else None}
            rows.append(new_row(f"{metric}_context", 64, spec, protocol={**said, "passed": 0.8}, **context))
        rows.append(new_row("quality", 128, spec, n=4, right=3, accuracy=0.75, interval=[0.3, 0.95]))
        score = {"value": 25.5 + more, "unit": "%", "standard_error": 3.0, "interval": [20.0, 31.0 + more], "n": 50}
        for task in ("arc_challenge", "mmlu"):
            said = {"name": "lm-eval", "task": task, "num_fewshot": 5, "limit": 50, "metric": "acc"}
            rows.append(new_row("benchmark", None, spec, protocol=said, **score))
        said = {"name": "lm-eval", "task": "niah", "num_fewshot": 0, "limit": None, "metric": "64"}
        rows.append(new_row("benchmark", 64, spec, protocol=said, **score))
    return rows


def write(path: Path, rows: list[Row]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


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
        "Benchmarks, niah, by context length",
        "Long-document questions answered, by context length",
    ]
    blocks = {block.splitlines()[0]: block for block in captured.out.strip().split("\n\n")}
    assert list(blocks)[:-1] == titles
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
    assert len(lines) == 2 * (6 + 4 + 1 + 1 + 2 + 1 + 2 + 2 + 1 + 1)
    row = next(line for line in lines if line["table"] == titles[0] and line["column"] == "64-128")
    assert (row["measured"], row["low"], row["high"], row["n"], row["commit"]) == (
        "40.5",
        "39.5",
        "42.5",
        "9",
        "c0ffee",
    )
    assert sum(line["measured"] == "out of memory" for line in lines) == 4


def test_the_best_of_a_column_stands_out_unless_all_are_equal() -> None:
    rows = [
        *perplexities("default", "t", {64: 30, 128: 50}),
        *perplexities("yarn:4", "t", {64: 30, 128: 40}),
        *perplexities("linear:4", "t", {64: 30, 128: None}),
    ]
    section = tables.Section(tables.topic_of(rows[0]))
    for row in rows:
        one = next((s for s in section.rows if s.label == row["label"]), None)
        one = one or tables.Series("m", row["label"], RopeScaling.from_dict(row["scaling"]), False, 16)
        section.rows.setdefault(one, {})[tables.column_of(row)] = row
    buckets, _ = tables.tables_of(section)
    assert buckets.best == [set(), {"40.00"}]


def test_dynamic_scalings_share_the_color_of_their_static_form(tmp_path: Path) -> None:
    specs = ("default", "dynamic-yarn", "linear:4", "yarn:4", "dynamic-ntk")
    rows = [row for spec in specs for row in perplexities(spec, "t", {64: 30})]
    found = {one.label: one for one in load_results([write(tmp_path / "rows", rows)]).series}
    assert found["unscaled"].color == tables.UNSCALED
    assert found["dynamic-yarn"].color == found["yarn x4"].color and found["dynamic-yarn"].dashed
    assert len({one.color for one in found.values()}) == 4 and len({one.marker for one in found.values()}) == 5


def test_crowded_plots_have_no_bands(tmp_path: Path) -> None:
    specs = ("default", "linear:4", "ntk:4", "yarn:4", "dynamic-yarn")
    rows = [row for spec in specs for row in perplexities(spec, "t", {64: 30, 128: 40})]
    assert report.main([write(tmp_path / "rows", rows), "--output", str(tmp_path)]) == 0
    page = (tmp_path / "report.html").read_text()
    assert "Bands" not in page and "95 % interval 29.00 to 32.00" in page


def test_a_row_that_lacks_a_field_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    row = every_kind()[0]
    del row["scaling"]
    assert run_cli(lambda: report.main([write(tmp_path / "rows", [row])])) == 2
    assert capsys.readouterr().err == "error: a row has no field 'scaling'; rows come from the evaluators in eval/\n"
    row = every_kind()[0]
    del row["provenance"]["commit"]
    assert run_cli(lambda: report.main([write(tmp_path / "rows", [row])])) == 2
    assert "no field 'commit'" in capsys.readouterr().err
    assert run_cli(lambda: report.main(["--verdict", "demo"])) == 2


def test_rows_without_lengths_alone(tmp_path: Path) -> None:
    said = {"name": "lm-eval", "task": "mmlu", "num_fewshot": 5, "limit": 50, "metric": "acc"}
    specs = ("default", "dynamic-yarn", "yarn:4")
    rows = [new_row("benchmark", None, spec, protocol=said, value=25.0, unit="%", n=50) for spec in specs]
    assert report.main([write(tmp_path / "rows", rows), "--output", str(tmp_path)]) == 0
    assert "dynamic-yarn at 64" in (tmp_path / "report.html").read_text()


def test_losses_are_read_in_both_forms(tmp_path: Path) -> None:
    (tmp_path / "rows").write_text('{"step": 5, "loss": 2.5}\n{"step": 6, "lo')
    (tmp_path / "list").write_text("3.5,2.5\n")
    assert read_losses(str(tmp_path / "rows")) == [(5, 2.5)]
    assert read_losses(str(tmp_path / "list")) == [(1, 3.5), (2, 2.5)]
