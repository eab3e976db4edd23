"""Blocks of pages between marks."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest

from scaled_rope.errors import ConfigError
from scaled_rope.report.page_blocks import only_check, rewrite, with_block
from tests.helpers import ROOT

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
    assert rewrite(*given, True) == 1 and page.read_text() == f"{BEGIN}old\n{END}"
    assert capsys.readouterr().err == "p.md shows other rows than rows.jsonl; run python make.py\n"
    assert rewrite(*given, False) == 0 and page.read_text() == f"{BEGIN}new\n{END}"
    assert rewrite(*given, True) == 0


def test_a_script_of_pages_has_one_flag() -> None:
    assert only_check("a.py", "Write.", ["--check"]) and not only_check("a.py", "Write.", [])
    for wrong in (["--chek"], ["check"]):
        with pytest.raises(ConfigError, match=f"unrecognized arguments: {wrong[0]}"):
            only_check("a.py", "Write.", wrong)


SCRIPTS = sorted(path for folder in ("docs", "benchmarks") for path in (ROOT / folder).glob("*.py")
                 if "--check    #" in path.read_text(encoding="utf-8"))  # fmt: skip


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.stem)
def test_a_mistyped_flag_writes_no_page(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = importlib.util.spec_from_file_location(f"script_{path.stem}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)
    spec.loader.exec_module(module)

    def refuse(*_: object, **more: object) -> None:
        raise AssertionError("a file was written")

    monkeypatch.setattr(Path, "write_text", refuse)
    monkeypatch.setattr("scaled_rope.files.write_atomic", refuse)
    monkeypatch.setattr(module, "write_atomic", refuse, raising=False)
    monkeypatch.setattr(sys, "argv", [str(path), "--chek"])
    with pytest.raises(ConfigError, match="unrecognized arguments: --chek; did you mean '--check'"):
        module.main()
    monkeypatch.setattr(sys, "argv", [str(path), "--help"])
    with pytest.raises(SystemExit, match="^0$"):
        module.main()
