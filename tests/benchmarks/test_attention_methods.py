"""The benchmark of methods that change attention."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import attention_methods
from scaled_rope.errors import ConfigError
from scaled_rope.results import read_rows


def test_costs_are_written_as_rows(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = tmp_path / "rows.jsonl"
    assert attention_methods.main(["--lengths", "64,96", "--rounds", "1", "--output", str(rows)]) == 0
    found = [(row["dtype"], row["queries"], row["length"], row["variant"]) for row in read_rows(rows)]
    # sdpa and four methods in two dtypes for each of three shapes, and blockwise attention where it can be.
    assert len(set(found)) == len(found) == 2 * 3 * 5 + 2
    assert all(row["seconds"] > 0 and row["provenance"]["command"] for row in read_rows(rows))
    with pytest.raises(ConfigError, match="lengths '64,x'"):
        attention_methods.main(["--lengths", "64,x"])
