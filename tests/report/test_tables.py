"""From result rows to series and tables."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import eval.report as report
from scaled_rope import RopeScaling
from scaled_rope.evaluation.passkey_context import passkey_context
from scaled_rope.report import tables
from scaled_rope.report.summary import retrieval
from scaled_rope.report.tables import load_results
from scaled_rope.results import Row, append_row, read_rows
from tests.helpers.report_rows import new_row, perplexities, write, write_rows

pytest.importorskip("matplotlib")


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
    for row in read_rows(path):
        append_row(renewed, row)
    after = load_results([str(renewed)])
    assert contents(after) == contents(before)
    (note,) = after.notes
    assert note.startswith(f"{2 * len(rows)} rows of older weights or texts are left out: ")
    assert "; and " in note  # each series under its name, with what is older and where
    assert "perplexity text of base, unscaled, float32 (older weights) at 65, 129, 257, 513; " in note
    assert "perplexity text of base, unscaled, float32 (older text) at 65, 129, 257, 513; " in note
    named = load_results([path], finetuned="run/model")
    assert [one.label for one in named.series][-1] == "yarn x4 (fine-tuned)"


@pytest.mark.parametrize(
    ("arguments", "data", "titles"),
    [
        ([{"dataset": ["a/text"]}, {"dataset": ["b/text", "c"]}], [{}, {}], ["text (a/text)", "text (b/text)"]),
        ([{}, {}], [{"subset": "en"}, {"subset": "de"}], ["text (subset en)", "text (subset de)"]),
        ([{"split": "test"}, {"split": "dev"}], [{}, {}], ["text (split test)", "text (split dev)"]),
        ([{"samples": 2}, {"samples": 3}], [{"documents": 2}, {"documents": 3}],
         ["text (samples 2, 2 documents)", "text (samples 3, 3 documents)"]),
    ],
)  # fmt: skip
def test_texts_of_one_name_that_were_read_otherwise_are_tables_of_their_own(
    arguments: list[dict[str, Any]], data: list[dict[str, Any]], titles: list[str], tmp_path: Path
) -> None:
    rows = [
        row | {"data": row["data"] | more | {"fingerprint": str(number)},
               "provenance": row["provenance"] | {"arguments": given, "date": f"2030-01-0{number + 1}"}}
        for number, (given, more) in enumerate(zip(arguments, data, strict=True))
        for row in perplexities("yarn:4", "text", {64: 30})
    ]  # fmt: skip
    results = load_results([write(tmp_path / "rows", rows)])
    assert results.notes == [] and [tables.title_of(one) for one in results.sections] == [
        f"Perplexity, {title}" for title in titles
    ]
    older = [row | {"provenance": row["provenance"] | {"arguments": arguments[0]}} for row in rows]
    older = [row | {"data": row["data"] | data[0]} for row in older]
    (note,) = load_results([write(tmp_path / "older", older)]).notes  # the same text, which has changed
    assert "older text" in note


def test_texts_of_one_name_and_other_content_are_told_apart_with_one_note(tmp_path: Path) -> None:
    """As two machines have it, each with a text of its own: nothing but the content differs."""
    rows = [
        row | {"model": model, "model_fingerprint": model, "data": row["data"] | {"fingerprint": content}}
        for model, content in (("one", "a" * 16), ("two", "b" * 16))
        for row in perplexities("yarn:4", "text", {64: 30})
    ]
    results = load_results([write(tmp_path / "rows", rows)])
    titles = [tables.title_of(one) for one in results.sections]
    assert titles == ["Perplexity, text (content aaaaaaaa)", "Perplexity, text (content bbbbbbbb)"]
    (note,) = results.notes
    assert note.startswith("texts of one name have different content") and "text (aaaaaaaa, bbbbbbbb)" in note
    alike = [row | {"data": row["data"] | {"fingerprint": "a" * 16}} for row in rows]
    results = load_results([write(tmp_path / "alike", alike)])
    assert results.notes == [] and [tables.title_of(one) for one in results.sections] == ["Perplexity, text"]


def test_prompts_in_a_chat_template_are_a_column_of_their_own() -> None:
    protocol = {"name": "lm-eval", "task": "arc_easy", "num_fewshot": 0, "metric": "acc", "limit": 100}
    row = {"metric": "benchmark", "length": None, "data": {}, "protocol": protocol}
    asked = {**row, "protocol": {**protocol, "chat_template": "9f2c"}}
    assert tables.column_of(row)[1] == "arc_easy, 0-shot acc, first 100"
    assert tables.column_of(asked)[1] == "arc_easy, 0-shot acc, first 100, chat template"


def loaded(rows: list[Row], weights: str, **arguments: Any) -> list[Row]:
    """Rows with a command's options in their record, and the fingerprint that these give."""
    record = {"provenance": {**rows[0]["provenance"], "arguments": arguments}}
    dtype = arguments.get("dtype", "float32")
    return [{**row, "model_fingerprint": weights, "dtype": dtype, **record} for row in rows]


@pytest.mark.parametrize(
    ("first", "second", "names"),
    [
        ({}, {"adapter": "runs/a/adapter"}, ["yarn x4", "yarn x4, adapter a/adapter"]),
        ({"adapter": "a"}, {"adapter": "b"}, ["yarn x4, adapter a", "yarn x4, adapter b"]),
        ({}, {"load_in_4bit": True}, ["yarn x4", "yarn x4, 4 bits"]),
        ({"load_in_8bit": True}, {"load_in_4bit": True}, ["yarn x4, 8 bits", "yarn x4, 4 bits"]),
        ({}, {"sliding_window_attention": 32}, ["yarn x4", "yarn x4, attention window 32"]),
        ({"dtype": "float32"}, {"dtype": "bfloat16"}, ["yarn x4, float32", "yarn x4, bfloat16"]),
    ],
)
def test_models_that_were_loaded_otherwise_are_series_of_their_own(
    first: dict[str, Any], second: dict[str, Any], names: list[str], tmp_path: Path
) -> None:
    rows = perplexities("yarn:4", "t", {64: 30})
    both = [
        row
        for weights, arguments in (("f", first), ("f" if "dtype" in second else "g", second))
        for row in loaded(rows, weights, **arguments)
    ]
    results = load_results([write(tmp_path / "rows", both)])
    assert [one.name for one in results.series] == names and results.notes == []
    assert [len(section.rows) for section in results.sections] == [2]
    alone = load_results([write(tmp_path / "alone", both[1:])])  # then nothing has to be told apart
    assert [one.name for one in alone.series] == ["yarn x4"]


def test_a_corrected_description_of_the_model_is_a_series_of_its_own(tmp_path: Path) -> None:
    rows = perplexities("yarn:4", "t", {64: 30})
    corrected = [{**row, "scaling": row["scaling"] | {"original_max_position_embeddings": 512}} for row in rows]
    results = load_results([write(tmp_path / "rows", [*rows, *corrected])])
    trained = rows[0]["scaling"]["original_max_position_embeddings"]
    assert [one.name for one in results.series] == [f"yarn x4, L {trained}", "yarn x4, L 512"]
    assert [len(section.rows) for section in results.sections] == [2] and results.notes == []
    alone = load_results([write(tmp_path / "alone", corrected)])
    assert [one.name for one in alone.series] == ["yarn x4"]


def test_layers_that_were_chosen_are_no_newer_weights(tmp_path: Path) -> None:
    rows = perplexities("default", "t", {64: 30})
    chosen = [{**row, "label": "unscaled, without RoPE in 3"} for row in loaded(rows, "g", drop_layers=[3])]
    results = load_results([write(tmp_path / "rows", [*rows, *chosen])])
    assert [one.name for one in results.series] == ["unscaled", "unscaled, without RoPE in 3"] and not results.notes


def test_one_precision_for_each_metric_is_one_series(tmp_path: Path) -> None:
    found = {"n": 3, "right": 1, "accuracy": 1 / 3, "interval": [0.06, 0.79]}
    keys = new_row("passkey", 64, dtype="bfloat16", protocol={"iterations": 3}, **found)
    results = load_results([write(tmp_path / "rows", [*perplexities("default", "t", {64: 30}), keys])])
    assert [one.name for one in results.series] == ["unscaled"]


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
    buckets, whole = (block.splitlines()[1:] for block in capsys.readouterr().out.strip().split("\n\n")[2:4])
    assert buckets[0].split() == ["0-64", "0-128", "64-256", "128-256", "256-1024"]
    assert buckets[2].split() == ["unscaled", "30.00", "40.00", "90.00", "95.00", "99.00"]
    assert buckets[3].split() == ["yarn", "x4", "35.00", "OOM"]
    assert whole[0].split() == ["64", "128", "256", "1024"]
    page = (tmp_path / "report.html").read_text()
    assert "a line per set of lengths" in page


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


def test_methods_are_named_as_in_papers_and_constants_are_told_apart(tmp_path: Path) -> None:
    fitted = "yarn:4,beta_fast=8,beta_slow=0.75,attention_factor=1.05"
    rows = [
        row
        for spec in ("default", "linear:4", "ntk:4", "dynamic-linear", "yarn:4", fitted)
        for row in perplexities(spec, "novels", {64: 30.0, 128: 40.0})
    ]
    rows.append({**perplexities(fitted, "novels", {64: 29.0})[0], "model": "out/model", "carried": True})
    rows[-1] |= {"label": f"{rows[-1]['label']} (checkpoint)", "model_fingerprint": "tuned"}
    series = load_results([write(tmp_path / "rows", rows)], "out/model").series
    assert [one.name for one in series] == [
        "unscaled",
        "PI (linear x4)",
        "NTK-aware (ntk x4)",
        "PI (dynamic-linear)",
        "yarn x4 (constants of the paper)",
        "yarn x4 (attention 1.05, β 8 and 0.75)",
        "yarn x4 (attention 1.05, β 8 and 0.75) (fine-tuned)",
    ]
    alone = load_results([write(tmp_path / "alone", perplexities("yarn:4", "novels", {64: 30.0}))]).series
    assert [one.name for one in alone] == ["yarn x4"]


def test_a_corpus_s_own_folder_is_not_taken_for_a_stand_in(tmp_path: Path) -> None:
    """Texts of both are called "bible"; only the stand-in's may have been read by any model."""
    rows = [row for row in read_rows(write_rows(tmp_path / "rows.jsonl")) if row["metric"] == "perplexity"]
    for name, said in (("bible", False), ("standin:bible", True), ("sotu", True)):
        named = [{**row, "data": {**row["data"], "name": name}} for row in rows]
        page = report.main([str(write(tmp_path / f"{name}.jsonl", named)), "--output", str(tmp_path / "page")])
        assert page == 0
        assert ("partly recall" in (tmp_path / "page" / "report.html").read_text()) is said


def keys_at(found: dict[int, tuple[int, int]], date: str) -> list[Row]:
    """What one run of the passkey evaluator writes: length -> (right, n), and the context that follows from these."""
    rows, protocol = [], {"name": "teacher-forced", "iterations": max(n for _, n in found.values())}
    for length, (right, n) in found.items():
        share = {"right": right, "n": n, "accuracy": right / n, "interval": [0.0, 1.0], "prompts": []}
        data = {"name": "passkey", "fingerprint": f"{n} at {length}"}
        rows.append(new_row("passkey", length, "yarn:4", data=data, protocol=protocol, **share))
    context, accuracy = passkey_context({length: right / n for length, (right, n) in found.items()})
    data = {"name": "passkey", "fingerprint": str(sorted(found)), "lengths": sorted(found)}
    said = {"context": context, "accuracy": accuracy, "protocol": {**protocol, "passed": 0.8}, "data": data}
    rows.append(new_row("passkey_context", max(found), "yarn:4", **said))
    return [row | {"provenance": row["provenance"] | {"date": date}} for row in rows]


@pytest.mark.parametrize("first", [{128: (4, 4), 256: (4, 4), 512: (1, 4)}, {512: (1, 4)}])
@pytest.mark.parametrize("second", [{128: (4, 4)}, {256: (4, 4), 128: (4, 4)}])
def test_the_passkey_context_follows_from_all_keys(
    first: dict[int, tuple[int, int]], second: dict[int, tuple[int, int]], tmp_path: Path
) -> None:
    rows = [*keys_at(first, "2030-01-01"), *keys_at(second, "2030-01-02")]
    (series,) = (results := load_results([write(tmp_path / "rows", rows)])).series
    (section,) = results.of("passkey_context")
    (row,) = section.rows[series].values()
    assert (row["context"], row["accuracy"]) == (max({*first, *second} - {512}), 1.0)
    assert row["data"]["lengths"] == sorted({*first, *second})


def test_most_prompts_decide_how_far_a_model_finds_its_keys(tmp_path: Path) -> None:
    rows = [*keys_at({128: (50, 50), 256: (0, 50)}, "2030-01-01"), *keys_at({256: (1, 1)}, "2030-01-02")]
    results = load_results([write(tmp_path / "rows", rows)])
    found = retrieval(results, results.series[0])
    assert found is not None and (found.works_to, found.measured_to) == (128, 256)
