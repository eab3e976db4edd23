"""What is prepared for SmolLM2 from 8k to 32k: the texts and their windows."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import smollm2_32k_prepare
from benchmarks.smollm2_32k_prepare import Text
from scaled_rope.checkpoint import encode, load_tokenizer
from scaled_rope.command_line import run_cli
from scaled_rope.errors import ConfigError
from scaled_rope.texts.packed import open_packed
from tests.helpers.smollm2 import pack_training_set, prepare


def test_a_text_that_is_trained_on_is_refused(prepared: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The training set is the folder's plus one of the held-out texts, cut elsewhere than the evaluation's windows."""
    pack_training_set(prepared, prepared / "heldout" / "5.txt")
    assert run_cli(lambda: prepare(prepared)) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert "bundle/books: " in line and "hold it out" in line


def test_windows_are_those_of_the_texts(prepared: Path) -> None:
    """A row is the BOS and the tokens of its text from where `select` puts it."""
    model = str(prepared / "base")
    smollm2_32k_prepare.write_windows(
        Text((f"{prepared}/heldout/*.txt",), windows=2), model, 256, prepared / "out" / "books"
    )
    rows, tokenizer = open_packed(prepared / "out" / "books"), load_tokenizer(model)
    first = encode(tokenizer, (prepared / "heldout" / "4.txt").read_text())
    bos = tokenizer.bos_token_id
    assert rows.tokens[0].tolist() == [bos, *first[:255]] and rows.tokens[1].tolist() == [bos, *first[-255:]]
    with pytest.raises(ConfigError, match="made otherwise"):
        smollm2_32k_prepare.write_windows(Text((f"{prepared}/heldout/4.txt",)), model, 256, prepared / "out" / "books")
