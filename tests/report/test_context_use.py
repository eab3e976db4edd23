"""Perplexities beside those of their controls."""

from __future__ import annotations

from pathlib import Path

import pytest

import eval.report as report
from scaled_rope.evaluation.controls import Change, Control
from scaled_rope.report.context_use import all_tables, base_of, context_use, control_table, is_control, short_loss
from scaled_rope.report.demo_opening import demo_opening
from scaled_rope.report.summary import summarize
from scaled_rope.report.tables import ReportRows, Section, Series, load_results
from scaled_rope.report.verdict import demo_verdict
from scaled_rope.results import Row, read_rows
from tests.helpers.report_rows import passkeys, with_controls, write, write_rows

pytest.importorskip("matplotlib")


def load(tmp_path: Path, rows: list[Row]) -> tuple[ReportRows, Section, dict[str, Series]]:
    results = load_results([write(tmp_path / "all", rows)])
    (section,) = results.of("perplexity")
    return results, section, {one.name: one for one in results.series}


def test_a_series_beside_its_control_and_its_bases(tmp_path: Path) -> None:
    rows = with_controls(read_rows(write_rows(tmp_path / "rows")), {"run/model": -0.03, "base": 0.5})
    _, section, series = load(tmp_path, rows)
    use = context_use(section, series["yarn x4 (checkpoint)"])
    assert use is not None and use.control == Control(64, 16) and list(use.buckets) == [
        (128, "64-128"), (256, "128-256"), (512, "256-512"),
    ]  # fmt: skip
    assert all(change is not None and change.share == pytest.approx(-0.03) for change in use.buckets.values())
    assert (use.works_to, use.measured_to) == (512, 512)
    assert use.total is not None and use.total.lower and use.total.share == pytest.approx(-0.03)
    # The base's control: 90, 130 and 180, each over 1.5.
    first = use.base_buckets[128, "64-128"]
    assert first is not None and first.share == pytest.approx(41 / 60 - 1)
    assert use.against_base is not None
    assert use.against_base.share == pytest.approx((41 / 60 * 42 / (130 / 1.5)) ** 0.5 - 1)  # up to 256, its claim
    unscaled = context_use(section, series["unscaled"])
    assert unscaled is not None and unscaled.works_to == 64 and unscaled.total is not None and unscaled.total.higher
    loss = short_loss(section, series["yarn x4 (checkpoint)"], 64)
    assert loss is not None and loss.share == pytest.approx(38 / 40 - 1)
    assert short_loss(section, series["unscaled"], 64) is None


def test_the_base_is_the_one_that_was_loaded_alike(tmp_path: Path) -> None:
    rows = with_controls(read_rows(write_rows(tmp_path / "rows")), {"run/model": -0.03})
    record = {**rows[0]["provenance"], "arguments": {"load_in_4bit": True}}
    packed = [
        {**row, "model_fingerprint": "packed", "provenance": record}
        for row in rows
        if row["label"] in ("unscaled", "yarn x4")
    ]
    _, section, series = load(tmp_path, [*rows, *packed])
    for name, base in (
        ("yarn x4", "unscaled"),
        ("yarn x4, 4 bits", "unscaled, 4 bits"),
        ("unscaled, 4 bits", "unscaled, 4 bits"),
        ("yarn x4 (checkpoint)", "unscaled"),  # another model
    ):
        assert base_of(section, series[name]) is series[base]
    halved = [{**row, "dtype": "bfloat16"} for row in rows if row["label"] == "unscaled"]
    _, section, series = load(tmp_path, [*rows, *halved])
    assert base_of(section, series["yarn x4, float32"]) is series["unscaled, float32"]
    assert base_of(section, series["yarn x4 (checkpoint)"]) is series["unscaled, float32"]


def test_a_base_in_another_precision_is_compared_and_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = with_controls(read_rows(write_rows(tmp_path / "rows")), {"run/model": -0.03, "base": 0.5})
    rows += passkeys(rows, "run/model", {64: 10, 256: 10})
    moved = [{**row, "dtype": "bfloat16"} if row["model"] == "base" else row for row in rows]
    said = "base in bfloat16, model in float32"
    results, section, series = load(tmp_path, moved)
    use = context_use(section, series["yarn x4 (checkpoint)"])
    assert use is not None and use.precisions == said
    assert f"{use.against_base}".endswith(f"] ({said})") and said not in f"{use.total}"
    loss = short_loss(section, series["yarn x4 (checkpoint)"], 64)
    assert f"{loss}".endswith(f" ({said})")
    table = control_table(section)
    assert table is not None and table.remarks == (
        f"Against the base: {said} (yarn x4 (checkpoint)), so a part of the change may be rounding.",
    )
    assert not any(said in cell.text for _, cells in table.lines for cell in cells)
    summary = summarize(results, "base")
    assert summary is not None
    for question in ("better than its base cut short", "price within the trained length"):
        assert said in summary.lines[question][0].more
    assert said not in summary.lines["uses what stands further back"][0].more
    verdict = demo_verdict(results)
    opening = demo_opening(results, verdict)
    (line,) = (line for head, line in opening.lines.items() if "against the base" in head)
    assert line[-1].more.endswith(f" ({said})") and not set("[]") & set(line[-1].more)
    assert report.main([write(tmp_path / "all", moved), "--output", str(tmp_path / "out")]) == 0
    assert (
        table.remarks[0] in capsys.readouterr().out and table.remarks[0] in (tmp_path / "out/report.html").read_text()
    )
    results, section, series = load(tmp_path, rows)  # in one precision nothing is said
    again = control_table(section)
    assert again is not None and again.remarks == () and "float32" not in f"{summarize(results)}"
    use = context_use(section, series["yarn x4 (checkpoint)"])
    assert use is not None and use.precisions == "" and type(use.against_base) is Change


def test_it_works_up_to_the_first_bucket_that_is_above(tmp_path: Path) -> None:
    rows = with_controls(read_rows(write_rows(tmp_path / "rows")), {"run/model": -0.03})
    for row in rows:
        if row["model"] == "run/model" and row["length"] == 256 and "window" in row["protocol"]:
            row["bucket_nats"] = [[one - 1 for one in document] for document in row["bucket_nats"]]
    _, section, series = load(tmp_path, rows)
    use = context_use(section, series["yarn x4 (checkpoint)"])
    assert use is not None and (use.works_to, use.measured_to) == (128, 512)


def test_without_a_control_there_is_nothing_to_say(tmp_path: Path) -> None:
    rows = with_controls(read_rows(write_rows(tmp_path / "rows")), {}, of="run/model")
    _, section, series = load(tmp_path, rows)
    assert context_use(section, series["unscaled"]) is None
    use = context_use(section, series["yarn x4 (checkpoint)"])
    assert use is not None and use.base_buckets == {} and use.against_base is None
    plain = [row for row in rows if "window" not in row["protocol"]]
    _, section, _ = load(tmp_path, plain)
    assert control_table(section) is None and len(all_tables(section)) == 2


def test_the_control_at_the_trained_length_counts(tmp_path: Path) -> None:
    rows = with_controls(read_rows(write_rows(tmp_path / "rows")), {"run/model": -0.03})
    wider = [
        {**row, "protocol": {**row["protocol"], "window": 100}, "perplexity_bucket": 1.0}
        for row in rows
        if "window" in row["protocol"] and row["length"] > 100
    ]
    for order in ([*rows, *wider], [*wider, *rows]):
        _, section, series = load(tmp_path, order)
        use = context_use(section, series["yarn x4 (checkpoint)"])
        assert use is not None and use.control.window == 64


def test_controls_alone_are_left_out_with_a_note(tmp_path: Path) -> None:
    rows = with_controls(read_rows(write_rows(tmp_path / "rows")), {})
    alone = [row for row in rows if "window" in row["protocol"]] + [row for row in rows if row["metric"] == "passkey"]
    results = load_results([write(tmp_path / "all", alone)])
    assert results.of("perplexity") == [] and any("18 rows of controls" in note for note in results.notes)


def test_controls_are_in_tables_and_figures(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = with_controls(read_rows(write_rows(tmp_path / "rows")), {"run/model": -0.03, "base": 0.5})
    rows += passkeys(rows, "run/model", {64: 10, 256: 9})
    assert report.main([write(tmp_path / "all", rows), "--output", str(tmp_path / "out")]) == 0
    blocks = {block.splitlines()[0]: block for block in capsys.readouterr().out.split("\n\n")}
    buckets = blocks["Perplexity, text, by position bucket"]
    assert "unscaled, last 64 tokens only" in buckets and "60.00" in buckets
    title = "Perplexity, text, against the last tokens only"
    assert "−3.0 % [−3.0, −3.0]" in blocks[title] and "yarn x4 (checkpoint), against the base" in blocks[title]
    assert "unscaled, against the base" not in blocks[title]
    found = next(block for name, block in blocks.items() if name.startswith("Passkeys") and "9/10" in block)
    assert "within the last 64 tokens (computed)" in found and "10/10" in found and "3/10" in found
    page = (tmp_path / "out" / "report.html").read_text()
    assert (
        "Thin dashed lines" in page
        and "Orange line" in page
        and ">trained to 64<" in page
        and ">extended to 256<" in page
    )
    _, section, _ = load(tmp_path, [row for row in rows if row["metric"] == "perplexity"])
    (one,) = [table for table in all_tables(section) if is_control(table)]
    assert one.best == [set()] * 4
    by_bucket = all_tables(section)[0]
    assert not any("27." in text for texts in by_bucket.best for text in texts)
    assert by_bucket.best[1] == {"41.00"}  # controls are beside the comparison, not in it
