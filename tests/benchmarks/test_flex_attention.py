"""flex_attention beside attention of our own: same results, rows, and the table of them."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention.flex_attention import flex_attention as uncompiled

from benchmarks import flex_attention
from scaled_rope.attention.regions import Regions
from scaled_rope.errors import ConfigError
from scaled_rope.results import read_rows
from tests.helpers import ROOT
from tests.helpers.region_definitions import INV_FREQ, METHODS, NOISE, Distance, heads, oracle


@pytest.fixture(autouse=True)
def _quiet() -> Any:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="flex_attention called without torch.compile")
        yield


@pytest.mark.parametrize(("regions", "distance", "log_length"), [m[1:] for m in METHODS], ids=[m[0] for m in METHODS])
def test_one_call_computes_all_regions(regions: Regions, distance: Distance, log_length: int | None) -> None:
    for length in (1, 24, 61):
        q, k, v = heads(length, length)
        mask = flex_attention.region_mask(regions, length)
        found = flex_attention.flex_regions(q, k, v, torch.tensor(INV_FREQ), regions, 0.4, mask, uncompiled)
        assert (found - oracle(q, k, v, distance, 0.4, log_length)).abs().max() < NOISE, length


def test_rows_of_all_cases_and_their_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = tmp_path / "rows.jsonl"
    assert flex_attention.main(["--lengths", "64", "--rounds", "1", "--output", str(rows)], uncompiled) == 0
    found = read_rows(rows)
    ways = {(row["case"], row["way"]) for row in found}
    assert len(ways) == 2 * 5 + 2 and len(found) == 2 * len(ways)
    assert all(row["seconds"] > 0 and row["error"] <= flex_attention.TOLERANCE[row["dtype"]] for row in found)
    capsys.readouterr()
    assert flex_attention.main(["--table", "--output", str(rows)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 + 5 * 2 and all("**" in line for line in lines[2:]) and "wrong" not in "".join(lines)


def test_what_is_wrong_is_not_timed(tmp_path: Path) -> None:
    def off(*given: Tensor, **more: Any) -> Tensor:
        return uncompiled(*given, **more) + 0.001

    rows = tmp_path / "rows.jsonl"
    command = ["--lengths", "64", "--dtypes", "float32", "--cases", "window", "--rounds", "1", "--output", str(rows)]
    assert flex_attention.main(command, off) == 1
    timed = {row["way"]: "seconds" in row for row in read_rows(rows)}
    assert timed == {"ours": True, "flex_attention": False, "sdpa with a mask": True}
    assert ", wrong, " in flex_attention.table(read_rows(rows))


def test_documents_fill_the_text() -> None:
    for length in (64, 200, 8192):
        starts = flex_attention.document_starts(length).tolist()
        assert starts[0] == 0 and len(set(starts)) == flex_attention.DOCUMENTS and max(starts) < length


@pytest.mark.slow
def test_compiled_flex_attention_is_right(tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    command = ["--lengths", "256", "--dtypes", "float32", "--cases", "rerope", "--rounds", "1", "--output", str(rows)]
    assert flex_attention.main(command) == 0
    assert [row["way"] for row in read_rows(rows)] == ["ours", "flex_attention"]


def test_bad_flags() -> None:
    for flags, said in (
        (["--lengths", "32"], "lengths 32, rounds 5: must be at least 64"),
        (["--cases", "windows"], "case 'windows'"),
        (["--dtypes", "float64"], "dtype 'float64'"),
    ):
        with pytest.raises(ConfigError, match=said):
            flex_attention.main(flags)


def test_the_page_has_the_table_of_the_committed_rows() -> None:
    page = (ROOT / "docs" / "performance.md").read_text(encoding="utf-8")
    assert flex_attention.table(read_rows(flex_attention.ROWS)) in page
