"""The figures of a report."""

from __future__ import annotations

from pathlib import Path

import pytest

import eval.report as report
from tests.helpers.report_rows import perplexities, write

pytest.importorskip("matplotlib")


def test_crowded_plots_have_no_bands(tmp_path: Path) -> None:
    specs = ("default", "linear:4", "ntk:4", "yarn:4", "dynamic-yarn")
    rows = [row for spec in specs for row in perplexities(spec, "t", {64: 30, 128: 40})]
    assert report.main([write(tmp_path / "rows", rows), "--output", str(tmp_path)]) == 0
    page = (tmp_path / "report.html").read_text()
    assert "Bands" not in page and "95 % interval 29.00 to 32.00" in page
