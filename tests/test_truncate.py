"""truncate.py."""

from __future__ import annotations

import os
import shutil

import pytest

import truncate
from scaled_rope.command_line import run_cli
from scaled_rope.texts.packed import open_packed
from tests.helpers.packing import tokenize, write_corpus


def test_truncate_command(tmp_path, tokenizer_dir, capsys):
    write_corpus(tmp_path)
    source = tmp_path / "long"
    tokenize("--dataset", tmp_path / "txt", "--tokenizer", tokenizer_dir, "--sequence-length", 96, "--num-proc", 1,
             "--output", source)  # fmt: skip
    assert run_cli(lambda: truncate.main(["32", str(tmp_path / "short"), "--dataset", str(source)])) == 0
    assert len(open_packed(tmp_path / "short")) == 3 * len(open_packed(source))
    written = (tmp_path / "short" / "tokens.bin").stat().st_mtime_ns
    assert run_cli(lambda: truncate.main(["32", str(tmp_path / "short"), "--dataset", str(source)])) == 0
    assert "already there" in capsys.readouterr().out
    assert (tmp_path / "short" / "tokens.bin").stat().st_mtime_ns == written
    shutil.copytree(source, tmp_path / "copy")
    for same in (f"{source}/", os.path.relpath(source), str(tmp_path / "copy")):
        assert run_cli(lambda: truncate.main(["32", str(tmp_path / "short"), "--dataset", same])) == 0  # noqa: B023
        assert "already there" in capsys.readouterr().out
    assert run_cli(lambda: truncate.main(["96", str(source), "--dataset", str(source)])) == 2  # it was not cut
    assert "made otherwise" in capsys.readouterr().err
    assert run_cli(lambda: truncate.main(["16", str(tmp_path / "short"), "--dataset", str(source)])) == 2
    assert "made otherwise" in capsys.readouterr().err
    tokenize("--dataset", tmp_path / "lines.jsonl", "--feature", "body", "--tokenizer", tokenizer_dir,
             "--sequence-length", 96, "--num-proc", 1, "--output", tmp_path / "other")  # fmt: skip
    for file in source.iterdir():
        file.write_bytes((tmp_path / "other" / file.name).read_bytes())
    assert run_cli(lambda: truncate.main(["32", str(tmp_path / "short"), "--dataset", str(source)])) == 2
    assert "was cut from other rows than" in capsys.readouterr().err
    # Nor does tokenization.py take it for a set of its own, though texts and length are what it was asked for.
    assert tokenize("--dataset", tmp_path / "txt", "--tokenizer", tokenizer_dir, "--sequence-length", 32,
                    "--num-proc", 1, "--output", tmp_path / "short") == 2  # fmt: skip
    assert f"short holds a set that truncate.py cut from {source}; remove it" in capsys.readouterr().err
    (tmp_path / "short" / "meta.json").unlink()
    assert run_cli(lambda: truncate.main(["32", str(tmp_path / "short"), "--dataset", str(source)])) == 0
    assert "it is made again" in capsys.readouterr().err
    assert run_cli(lambda: truncate.main(["97", str(tmp_path / "no"), "--dataset", str(source)])) == 2
    assert "97" in capsys.readouterr().err


def test_tables_are_judged_by_their_longest_row_and_the_id_that_is_wrong_is_named(tmp_path, capsys):
    datasets = pytest.importorskip("datasets")
    table = {"input_ids": [[1], [5, 6, 7, 8, 9, 3], [2, 3]], "labels": [[1], [5, 6, -100, 8, 9, 3], [2, 3]]}
    datasets.Dataset.from_dict(table).save_to_disk(tmp_path / "table")
    assert run_cli(lambda: truncate.main(["4", str(tmp_path / "cut"), "--dataset", str(tmp_path / "table")])) == 0
    cut = open_packed(tmp_path / "cut")
    assert cut.tokens.tolist() == [[1, 5, 6, 7], [8, 9, 3, 2]]
    assert cut.loss_weight.tolist() == [[1, 1, 1, 0], [1, 1, 1, 1]]
    assert run_cli(lambda: truncate.main(["7", str(tmp_path / "no"), "--dataset", str(tmp_path / "table")])) == 2
    assert "length 7 is not allowed; 2 to 6, the longest row of" in capsys.readouterr().err
    datasets.Dataset.from_dict({"input_ids": [[5, 6], [900, -100]]}).save_to_disk(tmp_path / "bad")
    assert run_cli(lambda: truncate.main(["2", str(tmp_path / "no"), "--dataset", str(tmp_path / "bad")])) == 2
    assert "error: row 1 of" in (said := capsys.readouterr().err) and "has token id -100 in input_ids" in said
    assert not (tmp_path / "no").exists()
