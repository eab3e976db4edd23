"""eval/report.py: rows that lack a field, and rows without lengths."""

from __future__ import annotations

from pathlib import Path

import pytest

import eval.report as report
from scaled_rope.command_line import run_cli
from tests.helpers.report_rows import every_kind, new_row, write, write_rows

pytest.importorskip("matplotlib")


def test_a_row_that_lacks_a_field_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    row = every_kind()[0]
    del row["scaling"]
    path = write(tmp_path / "rows", [row])
    assert run_cli(lambda: report.main([path])) == 2
    assert capsys.readouterr().err == f"error: {path}, line 1: there is no field 'scaling'; the row is left out\n"
    row = every_kind()[0]
    del row["provenance"]["commit"]
    assert run_cli(lambda: report.main([write(tmp_path / "rows", [row])])) == 2
    assert "no field 'provenance.commit'" in capsys.readouterr().err
    assert run_cli(lambda: report.main(["--verdict", "demo"])) == 2


def test_rows_without_lengths_alone(tmp_path: Path) -> None:
    said = {"name": "lm-eval", "task": "mmlu", "num_fewshot": 5, "limit": 50, "metric": "acc"}
    specs = ("default", "dynamic-yarn", "yarn:4")
    rows = [new_row("benchmark", None, spec, protocol=said, value=25.0, unit="%", n=50) for spec in specs]
    assert report.main([write(tmp_path / "rows", rows), "--output", str(tmp_path)]) == 0
    assert "dynamic-yarn at 64" in (tmp_path / "report.html").read_text()


@pytest.mark.parametrize("flag", ["base", "finetuned"])
def test_a_model_that_no_row_is_about_is_refused(flag: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_rows(tmp_path / "rows")
    assert run_cli(lambda: report.main([path, f"--{flag}", "run/modle"])) == 2
    told = capsys.readouterr()
    said = f"unknown {flag} model 'run/modle'; did you mean 'run/model'? known: base, run/model"
    assert (told.out, told.err) == ("", f"error: {said}\n")
    # An absolute path is recorded by its last two names.
    assert report.main([path, "--base", "base", "--finetuned", "/elsewhere/run/model"]) == 0
    assert "yarn x4 (fine-tuned)" in capsys.readouterr().out
