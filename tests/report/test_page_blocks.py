"""Blocks of pages between marks."""

from __future__ import annotations

from pathlib import Path

import pytest

from scaled_rope.errors import ConfigError
from scaled_rope.report.page_blocks import rewrite, with_block

BEGIN, END = "<!-- a -->\n", "<!-- end of a -->\n"


def test_only_what_stands_between_the_marks_is_exchanged() -> None:
    page = f"# Title\n\n{BEGIN}old\n{END}after {BEGIN}"
    assert with_block(page, BEGIN, END, "new\n", "p.md") == f"# Title\n\n{BEGIN}new\n{END}after {BEGIN}"
    for broken in ("", BEGIN, END, END + BEGIN):
        with pytest.raises(ConfigError, match="page p.md has no place for this: <!-- a --> and <!-- end of a -->"):
            with_block(broken, BEGIN, END, "new\n", "p.md")


def test_a_page_is_written_or_compared(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page, rows = tmp_path / "p.md", tmp_path / "rows.jsonl"
    page.write_text(f"{BEGIN}old\n{END}")
    given = (page, BEGIN, END, "new\n", rows, "python make.py")
    assert rewrite(*given, ["--check"]) == 1 and page.read_text() == f"{BEGIN}old\n{END}"
    assert capsys.readouterr().err == "p.md shows other rows than rows.jsonl; run python make.py\n"
    assert rewrite(*given, []) == 0 and page.read_text() == f"{BEGIN}new\n{END}"
    assert rewrite(*given, ["--check"]) == 0
