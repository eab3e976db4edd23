"""The paper's tables beside measured rows."""

from __future__ import annotations

import csv
import io
import json
import runpy
import sys
from pathlib import Path

import pytest

from scaled_rope.errors import ConfigError
from scaled_rope.paper import DIFFERS, NOT_RUN, REPRODUCED, compare, load_published, read_curves, to_csv

ROOT = Path(__file__).parent.parent
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
    assert statuses([failed], "2", "7B YaRN s=16, 64k")[-1] == DIFFERS


@pytest.mark.parametrize(
    "change",
    [
        {"model": "NousResearch/Yarn-Llama-2-7b-128k"},
        {"carried": False},
        {"metric": "passkey"},
        {"length": 8191},
        {"protocol": {"name": "sliding", "stride": 256}},
        {"data": {"name": "proofpile-test-tokenized", "documents": 9}},
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


def test_the_weighting_of_windows_matters_where_windows_slide():
    row = perplexity(32768, 3.59, data={"name": "govreport", "documents": 50})
    for protocol, status in (
        ({"name": "sliding", "stride": 256, "weighting": "window"}, REPRODUCED),
        ({"name": "sliding", "stride": 256}, NOT_RUN),
        ({"name": "sliding", "stride": 512, "weighting": "window"}, NOT_RUN),
    ):
        assert statuses([row | {"protocol": protocol}], "4", "7B YaRN s=16, 64k") == [status]


def test_benchmarks_and_passkeys():
    base = {"model": "NousResearch/Yarn-Llama-2-7b-128k", "carried": True, "length": None, "data": {}}
    benchmark = {"metric": "benchmark", "value": 51.5, "protocol": {"name": "lm-eval", "task": "arc_challenge"}}
    limited = benchmark | {"protocol": benchmark["protocol"] | {"limit": 100}}
    assert statuses([base | benchmark], "3", "7B YaRN s=32, 128k")[:2] == [REPRODUCED, NOT_RUN]
    assert statuses([base | limited], "3", "7B YaRN s=32, 128k")[0] == NOT_RUN
    found = {"metric": "passkey_context", "context": 131072, "accuracy": 0.95, "protocol": {}}
    assert statuses([base | found], "5", "7B YaRN s=32, 128k") == [REPRODUCED, REPRODUCED]
    assert statuses([base | found | {"context": 65536, "accuracy": 0.9}], "5", "7B YaRN s=32, 128k") == [DIFFERS] * 2


def test_csv_and_curves(tmp_path):
    rows = list(csv.reader(io.StringIO(to_csv(compare([perplexity(8192, 3.5)], ["2"])))))
    assert len(rows) == 1 + 35 and rows[0][-1] == "status"
    assert ["2", "7B YaRN s=16, 64k", "8192", "3.51", "3.5", "reproduced"] in rows
    (tmp_path / "a.csv").write_text(",2048,4096\nx/y,3.5,inf\nz,,4.25\n")
    assert read_curves(tmp_path) == {"x/y": {2048: 3.5}, "z": {4096: 4.25}}
    (tmp_path / "b.csv").write_text(",2048\nx,high\n")
    with pytest.raises(ConfigError, match="b.csv"):
        read_curves(tmp_path)
    with pytest.raises(ConfigError, match="must be a folder"):
        read_curves(tmp_path / "nowhere")
    with pytest.raises(ConfigError, match="unknown table '7'"):
        compare([], ["7"])


def test_the_script(tmp_path, capsys, monkeypatch):
    pytest.importorskip("matplotlib")
    (tmp_path / "rows.jsonl").write_text(json.dumps(perplexity(8192, 3.5)) + "\n")
    arguments = [str(tmp_path / "rows.jsonl"), "--table", "2", "--output", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["eval/paper.py", *arguments])
    with pytest.raises(SystemExit) as done:
        runpy.run_path(str(ROOT / "eval" / "paper.py"), run_name="__main__")
    assert done.value.code == 0
    assert "3.51 3.5=" in (out := capsys.readouterr().out) and "1 reproduced, 0 differs, 34 not run" in out
    assert (tmp_path / "paper.png").stat().st_size > 1000 and (tmp_path / "paper.csv").is_file()
