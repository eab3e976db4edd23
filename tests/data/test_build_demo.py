"""Building the rows that the demo trains on."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

from data import build_base, build_demo
from scaled_rope.checkpoint import DEFAULT_MODEL
from scaled_rope.command_line import run_cli
from scaled_rope.errors import ConfigError
from scaled_rope.texts.packed import open_packed


def test_bad_numbers_and_short_texts_are_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.txt").write_text("too short for a row")
    words = ["--texts", str(tmp_path), "--tokenizer", str(DEFAULT_MODEL), "--output", str(tmp_path / "rows")]
    for flags, said in (
        ([], f"--texts {tmp_path}: no text has more than 2048 tokens, those of a row"),
        (["--rows", "0"], "--rows 0 is not allowed; at least 1"),
        (["--seed", "-1"], "--seed -1 is not allowed; at least 0"),
    ):
        assert run_cli(lambda: build_demo.main([*words, *flags])) == 2  # noqa: B023
        assert capsys.readouterr().err == f"error: {said}\n"
    assert run_cli(lambda: build_base.main(["--output", str(tmp_path / "base"), "--rows", "-1"])) == 2
    assert capsys.readouterr().err == "error: --rows -1 is not allowed; at least 1\n"
    with pytest.raises(ConfigError, match="no text has more than 9 tokens"):
        build_base.Stretches([[1] * 9], random.Random(0)).anywhere(random.Random(0), 9)


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
