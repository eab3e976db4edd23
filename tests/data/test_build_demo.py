"""Building the rows that the demo trains on."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from data import build_demo
from scaled_rope.checkpoint import DEFAULT_MODEL
from scaled_rope.command_line import run_cli
from scaled_rope.texts.packed import open_packed


def test_rows_of_text_and_of_hidden_facts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    texts = tmp_path / "texts"
    texts.mkdir()
    words = ["--texts", str(texts), "--tokenizer", str(DEFAULT_MODEL), "--rows", "60"]
    assert run_cli(lambda: build_demo.main([*words, "--output", str(tmp_path / "none")])) == 2
    assert "there is no .txt file" in capsys.readouterr().err
    for name in ("one", "other"):
        (texts / f"{name}.txt").write_text(" ".join(f"{name} sentence {index}." for index in range(6000)))
    for name in ("rows", "again"):
        assert build_demo.main([*words, "--output", str(tmp_path / name)]) == 0
    first, again = (tmp_path / name / "tokens.bin" for name in ("rows", "again"))
    assert first.read_bytes() == again.read_bytes()
    meta = json.loads((tmp_path / "rows" / "meta.json").read_text())
    rows = open_packed(tmp_path / "rows")
    weighted = [bool((rows.row(index)[1] == 8).any()) for index in range(len(rows))]
    assert len(rows) == 60 and 0 < sum(weighted) == meta["made_rows"]["needles"] < 20
    assert {int(rows.row(index)[0][0]) for index in range(60)} == {0}
    assert build_demo.main([*words, "--output", str(tmp_path / "rows")]) == 0  # what is there is kept
    assert first.read_bytes() == again.read_bytes()
