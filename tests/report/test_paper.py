"""The paper's tables beside measured rows."""

from __future__ import annotations

import csv
import html
import json
import re

import pytest

import eval.harness as harness
import eval.passkey as passkey
import eval.perplexity as perplexity_script
import eval.report as report
import scaled_rope.report.paper as paper
from scaled_rope.errors import ConfigError
from scaled_rope.report.paper import (
    DIFFERS,
    NOT_RUN,
    REPRODUCED,
    PaperTable,
    compare,
    figures,
    load_published,
    read_curves,
    runs,
)

MODEL = "NousResearch/Yarn-Llama-2-7b-64k"


def perplexity(length: int, value: float | None, **fields: object) -> dict[str, object]:
    row = {
        "metric": "perplexity",
        "model": MODEL,
        "carried": True,
        "length": length,
        "perplexity": value,
        "protocol": {"name": "truncate", "bucket_start": 0},
        "data": {"name": "proofpile-test-tokenized", "documents": 10},
    }
    return row | fields


def statuses(rows: list[dict[str, object]], table: str, label: str) -> list[str]:
    (found,) = compare(rows, [table])
    return next([cell.status for cell in cells] for name, cells in found.lines if name == label)


def test_the_published_tables_are_whole():
    published = load_published()
    assert list(published["tables"]) == ["1", "2", "3", "4", "5", "6"]
    for table in published["tables"].values():
        for row in table["rows"]:
            assert len(row["values"]) == len(table["columns"]) == len(row.get("exact", row["values"]))
    # Numbers that the text of the paper repeats, and the sizes of its tables.
    assert [len(table["rows"]) for table in published["tables"].values()] == [3, 7, 14, 7, 7, 4]
    last = published["tables"]["2"]["rows"][3]
    assert last["label"] == "7B YaRN s=32, 128k" and last["values"][-1] == 2.37
    assert published["tables"]["1"]["rows"][0]["exact"][3] == 3.3441


def test_cells_are_reproduced_different_or_not_run():
    rows = [
        perplexity(8192, 3.525),  # printed 3.51, tolerance 0.02
        perplexity(32768, 2.6701),  # printed 2.65: 0.0201 too far
        perplexity(98304, 12.0),  # printed as above 10
        perplexity(131072, None),  # too large for a number is above 10 as well
    ]
    wanted = [REPRODUCED, DIFFERS, NOT_RUN, REPRODUCED, REPRODUCED]
    assert statuses(rows, "2", "7B YaRN s=16, 64k") == wanted
    assert statuses(rows, "2", "7B YaRN s=32, 128k") == [NOT_RUN] * 5
    (table,) = compare(rows, ["2"])
    assert table.counts == {REPRODUCED: 3, DIFFERS: 1, NOT_RUN: 31}
    assert statuses([perplexity(131072, 9.0)], "2", "7B YaRN s=16, 64k")[-1] == DIFFERS
    failed = perplexity(131072, None, error="out of memory")
    assert statuses([failed], "2", "7B YaRN s=16, 64k")[-1] == NOT_RUN
    (table,) = compare([failed], ["2"])
    assert ">10 OOM." in table.text()


def test_a_line_has_a_verdict():
    def verdict(*rows: dict[str, object]) -> tuple[str, str]:
        (table,) = compare(list(rows), ["2"])
        return PaperTable.verdict(dict(table.lines)["7B YaRN s=16, 64k"])

    right = [perplexity(8192, 3.51), perplexity(32768, 2.65), perplexity(65536, 2.42)]
    above = [perplexity(98304, 11.0), perplexity(131072, 50.0)]
    assert verdict() == (NOT_RUN, "not run")
    assert verdict(*right, *above) == (REPRODUCED, "reproduced")
    assert verdict(*right) == (REPRODUCED, "reproduced, 3 of 5 run")
    assert verdict(*right, perplexity(131072, 5.0)) == (DIFFERS, "1 of 4 differ")


@pytest.mark.parametrize(
    "change",
    [
        {"model": "NousResearch/Yarn-Llama-2-7b-128k"},
        {"carried": False},
        {"metric": "passkey"},
        {"length": 8191},
        {"protocol": {"name": "sliding", "stride": 256}},
        {"data": {"name": "proofpile-test-tokenized", "documents": 9}},
        {"data": {"name": "standin:hol-light", "documents": 10}},
    ],
)
def test_a_row_that_measured_something_else_does_not_count(change):
    assert statuses([perplexity(8192, 3.51)], "2", "7B YaRN s=16, 64k")[0] == REPRODUCED
    assert statuses([perplexity(8192, 3.51) | change], "2", "7B YaRN s=16, 64k")[0] == NOT_RUN


def test_a_local_copy_of_a_model_and_the_exact_value_count():
    rows = [perplexity(10240, 6.05, model="/models/yarn-llama-2-7b-8K")]
    rows[0]["model"] = "checkpoints/Yarn-Llama-2-7b-8k"
    # Printed 6.04 by truncation; the released file has 6.0485.
    assert statuses(rows, "1", "YaRN s=2")[-1] == REPRODUCED
    assert statuses([perplexity(10240, 6.025, model="emozilla/Yarn-Llama-2-7b-8k")], "1", "YaRN s=2")[-1] == DIFFERS


def test_a_model_that_was_loaded_plainly_counts_before_others():
    packed = perplexity(8192, 4.0, provenance={"arguments": {"load_in_4bit": True}})
    for rows in ([perplexity(8192, 3.51), packed], [packed, perplexity(8192, 3.51)]):
        assert statuses(rows, "2", "7B YaRN s=16, 64k")[0] == REPRODUCED
    assert statuses([packed], "2", "7B YaRN s=16, 64k")[0] == DIFFERS


def test_the_weighting_of_windows_matters_where_windows_slide():
    row = perplexity(32768, 3.59, data={"name": "govreport-test-tokenized", "documents": 50})
    for protocol, status in (
        ({"name": "sliding", "stride": 256, "weighting": "window"}, REPRODUCED),
        ({"name": "sliding", "stride": 256}, NOT_RUN),
        ({"name": "sliding", "stride": 512, "weighting": "window"}, NOT_RUN),
    ):
        assert statuses([row | {"protocol": protocol}], "4", "7B YaRN s=16, 64k") == [status]


def test_benchmarks_and_passkeys():
    base = {"model": "NousResearch/Yarn-Llama-2-7b-128k", "carried": True, "length": None, "data": {}}
    said = {"name": "lm-eval", "task": "arc_challenge", "num_fewshot": 25}
    benchmark = base | {"metric": "benchmark", "value": 51.5, "protocol": said}
    label = "7B YaRN s=32, 128k"
    assert statuses([benchmark], "3", label)[:2] == [REPRODUCED, NOT_RUN]
    for other in ({"limit": 100}, {"num_fewshot": 0}, {"chat_template": "9f2c"}):
        assert statuses([benchmark | {"protocol": said | other}], "3", label)[0] == NOT_RUN
    assert statuses([benchmark | {"data": {"source": "bigbench 1.0.0, partial"}}], "3", label)[0] == NOT_RUN
    assert statuses([benchmark | {"truncated": 0}], "3", label)[0] == REPRODUCED
    assert statuses([benchmark | {"truncated": 1, "n": 1172}], "3", label)[0] == NOT_RUN  # prompts were cut

    tried = list(range(8192, 131073, 8192))
    found = base | {"metric": "passkey_context", "context": 131072, "accuracy": 0.95, "data": {"lengths": tried}}
    found["protocol"] = {"iterations": 10}
    assert statuses([found], "5", label) == [REPRODUCED, REPRODUCED]
    assert statuses([found | {"context": 65536, "accuracy": 0.9}], "5", label) == [DIFFERS] * 2
    # Fewer lengths or prompts are another measurement: a context of 128k can't be found among lengths to 64k.
    assert statuses([found | {"data": {"lengths": tried[:8]}}], "5", label) == [NOT_RUN] * 2
    for other in ({"iterations": 5}, {"iterations": 10, "chat_template": "9f2c"}):
        assert statuses([found | {"protocol": other}], "5", label) == [NOT_RUN] * 2


def llama(length: int, label: str, value: float) -> dict[str, object]:
    data = {"name": "govreport-test-tokenized", "documents": 1}
    return perplexity(length, value, model="NousResearch/Llama-2-7b-hf", label=label, carried=False, data=data)


def test_figures_have_measured_lines_printed_values_and_published_curves(tmp_path):
    (tmp_path / "a.csv").write_text(f",2048,4096\n{MODEL},3.5,3.25\n")
    rows = [perplexity(2048, 4.0), perplexity(8192, 3.5), llama(4200, "unscaled", 4.1), llama(600, "dynamic-yarn", 9.0)]
    one, five, six = figures(rows, published=tmp_path)
    assert [figure.name for figure in (one, five, six)] == ["1", "5", "6"]
    lines = {line.label: line for line in one.lines}
    ours = lines["7B YaRN s=16, 64k"]
    assert {length: row["perplexity"] for length, row in ours.measured.items()} == {2048: 4.0, 8192: 3.5}
    assert ours.published == {8192: 3.51, 32768: 2.65, 65536: 2.42}  # not where it prints "above 10"
    assert ours.curve == {2048: 3.5, 4096: 3.25} and not lines["7B YaRN s=32, 128k"].curve
    assert [len(line.measured) for line in five.lines] == [1, 0, 1] and not any(line.measured for line in six.lines)
    assert statuses([llama(4200, "unscaled", 4.03)], "figure5", "RoPE") == [REPRODUCED, NOT_RUN, NOT_RUN]
    assert statuses([llama(7800, "dynamic-yarn", 4.2)], "figure5", "Dynamic-YaRN")[-1] == DIFFERS
    assert [figure.name for figure in figures([], ["6"])] == ["6"]


def test_published_curves_are_read_and_refused(tmp_path):
    (tmp_path / "a.csv").write_text(",2048,4096\nx/y,3.5,inf\nz,,4.25\n")
    (tmp_path / "0.csv").write_text(",8192,1024\nx/y,3.0,5.0\n")
    (tmp_path / "govreport.csv").write_text(",4096\nx/y,9.0\n")  # another text: no point of the curve
    curves = read_curves(tmp_path)
    assert curves == {"x/y": {1024: 5.0, 2048: 3.5, 8192: 3.0}, "z": {4096: 4.25}}
    assert list(curves["x/y"]) == [1024, 2048, 8192]
    (tmp_path / "b.csv").write_text(",2048\nx,high\n")
    with pytest.raises(ConfigError, match="b.csv"):
        read_curves(tmp_path)
    with pytest.raises(ConfigError, match="must be a folder"):
        read_curves(tmp_path / "nowhere")
    with pytest.raises(ConfigError, match="unknown table '7'"):
        compare([], ["7"])


# ------------------------------------------------------------------------------------------------------- the report


def test_the_published_tables_alone(capsys):
    assert report.main(["--paper"]) == 0
    shown = capsys.readouterr().out
    assert [f"Table {n}. " in shown for n in range(1, 8)] == [True] * 6 + [False] and "Figure 5. " in shown
    assert "3.50 ." in shown and "0 reproduced, 0 differs, 35 not run; tolerance 0.02" in shown


def test_tables_and_figures_of_the_paper_on_the_page(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    record = {"command": "python x", "commit": "c0ffee", "versions": {}, "device": "gpu", "date": "2030", "seed": None}
    scaling = {"method": "yarn", "factor": 16.0, "original_max_position_embeddings": 4096}
    shared = {"model_fingerprint": "w", "dtype": "bfloat16", "head_dim": 128, "scaling": scaling, "label": "yarn x16"}
    more = {"provenance": record | {"cpu_count": 1}, "targets": 9, "interval": [3.1, 3.9]}
    bucket = {"perplexity_bucket": 3.5, "bucket": [0, 8192]}
    row = perplexity(8192, 3.5, **shared, **more, **bucket)
    row["data"]["fingerprint"] = "t"
    rows = tmp_path / "rows.jsonl"
    rows.write_text(json.dumps(row) + "\n")
    (tmp_path / "published").mkdir()
    (tmp_path / "published" / "a.csv").write_text(f",2048,4096\n{MODEL},3.5,3.25\n")
    assert report.main([str(rows), "--output", str(tmp_path), "--published", str(tmp_path / "published")]) == 0
    shown = capsys.readouterr().out
    # Only the table that has a row, without being asked for it.
    assert "Table 2. " in shown and "Table 1. " not in shown and "Figure 5. " not in shown
    assert re.search(r"7B YaRN s=16, 64k +3\.51 3\.5= .* reproduced, 1 of 5 run", shown)

    page = html.unescape((tmp_path / "report.html").read_text())
    assert "Table 2 and figure 1 of the paper" in page and "1 reproduced, 0 differs, 34 not run" in page
    assert "published 3.51, tolerance 0.02: reproduced" in page and "95 % interval 3.10 to 3.90" in page
    assert "not run here\n./eval.sh table2" in page
    assert "published curve, 4096 tokens: 3.25" in page and "published in the paper, 32768 tokens: 2.65" in page
    assert "perplexity of the first 8192 tokens: 3.50" in page  # the measured point of the figure
    for kind in ("png", "pdf"):
        assert (tmp_path / f"paper-figure-1.{kind}").stat().st_size > 1000
    with open(tmp_path / "report.csv", newline="") as file:
        lines = [line for line in csv.DictReader(file) if line["table"] == "Table 2 of the paper"]
    assert len(lines) == 35
    (ours,) = [line for line in lines if line["measured"]]
    wanted = {"model": "7B YaRN s=16, 64k", "column": "8192", "published": "3.51", "measured": "3.5"}
    assert wanted.items() <= ours.items() and ours["status"] == "reproduced" and ours["commit"] == "c0ffee"

    assert report.main([str(rows), "--table", "6", "--table", "figure5"]) == 0
    shown = capsys.readouterr().out
    assert "Table 6. " in shown and "Figure 5. " in shown and "Table 2. " not in shown


# --------------------------------------------------------------------------------------------------------- commands


@pytest.mark.parametrize("name", ["table1", "table2", "table3", "table4", "table5", "table6", "figure5"])
def test_commands_measure_what_the_tables_compare(name):
    run, published = runs()[name], load_published()
    table = published["figures"]["5"] if name == "figure5" else published["tables"][name[-1]]
    argv = ["-m", run.models[0], *run.data, *run.flags]
    if run.evaluator == "harness":
        args = harness.build_parser().parse_args(argv)
        assert set(table["columns"]) == set(harness.check_arguments(args)[0])
        return
    if run.evaluator == "passkey":
        ((evaluator,),) = passkey.evaluators_of(passkey.build_parser().parse_args(argv)).values()
        assert (evaluator.lengths[0], evaluator.lengths[-1], len(evaluator.lengths)) == (8192, 131072, 16)
        return
    args = perplexity_script.build_parser().parse_args(argv)
    ((source,), stride) = perplexity_script.check_arguments(args)
    evaluator = perplexity_script.evaluator_of(args)
    assert source.tokenized and set(table["columns"]) <= set(evaluator.lengths)
    assert (stride, args.weighting) == ((256, "window") if name == "table4" else (None, "token"))
    assert (args.samples, args.dataset_min_tokens) == (
        {"table4": 50, "figure5": 1}.get(name, 10),
        {"table4": 16384, "figure5": 8192}.get(name, 131072),
    )
    assert args.sliding_window_attention == (131072 if name == "table6" else None)
    assert args.split == ("train" if name == "table6" else "test")


def test_released_models_that_the_paper_does_not_have_are_left_out():
    assert len(runs()["table3"].models) == 9 and "NousResearch/Yarn-Llama-2-70b-32k" not in runs()["table3"].models
    assert runs()["figure1"] == runs()["table2"] and runs()["figure6"] == runs()["table6"]


@pytest.mark.parametrize("words", [["--shell"], ["--shell", "table2", "--list"]])
def test_assignments_for_a_shell_are_never_a_listing(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ConfigError, match="--shell is not allowed without a name or with --list"):
        paper.main(words)
    assert capsys.readouterr().out == ""
