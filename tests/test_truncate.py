"""truncate.py."""

from __future__ import annotations

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
    assert run_cli(lambda: truncate.main(["16", str(tmp_path / "short"), "--dataset", str(source)])) == 2
    assert "made otherwise" in capsys.readouterr().err
    assert run_cli(lambda: truncate.main(["97", str(tmp_path / "no"), "--dataset", str(source)])) == 2
    assert "97" in capsys.readouterr().err
