"""Refusals of eval/perplexity.py."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerFast

import eval.passkey as passkey
import eval.perplexity as perplexity
import eval.report as report
from scaled_rope import patch_model
from scaled_rope.command_line import run_cli
from scaled_rope.errors import ConfigError
from tests.helpers import ROOT
from tests.helpers.small_models import (
    checkpoint,  # noqa: F401
    new_model,
    texts,  # noqa: F401
    tokenizer,  # noqa: F401
)

SCORE = ["--lengths", "32", "--dataset", "{texts}"]


@pytest.mark.parametrize(
    ("main", "argv", "says"),
    [
        (perplexity.main, ["--no-such-flag"], "--no-such-flag"),
        (perplexity.main, ["-m", "{model}", "--length", "32"], "--length"),  # no abbreviations
        (perplexity.main, ["-m", "{model}"], "--dataset"),
        (perplexity.main, ["-m", "{model}", *SCORE, "--tokenized", "x"], "--dataset"),
        (perplexity.main, ["-m", "{model}", *SCORE, "--protocol", "sliding", "--windows", "2"], "windows"),
        (perplexity.main, ["-m", "{model}", *SCORE, "--sliding-window", "0"], "--sliding-window 0"),
        (perplexity.main, ["-m", "{model}", *SCORE, "--stride", "64"], "--protocol sliding"),
        (perplexity.main, ["-m", "{model}", *SCORE, "--save-tokenized", "{texts}"], "exists"),
        (perplexity.main, ["-m", "{model}", *SCORE, "--subset", "x"], "hub"),
        (perplexity.main, ["-m", "{model}", "--lengths", "32", "--dataset", "standin:boks"], "'books'"),
        (perplexity.main, ["-m", "{model}", "--dataset", "{texts}", "--lengths", "32,x"], "lengths"),
        (perplexity.main, ["-m", "{model}", "--dataset", "{texts}", "--lengths", "1"], "at least 2"),
        (perplexity.main, ["-m", "{model}", "--dataset", "{texts}", "--min-tokens", "9000"], "min-tokens"),
        (perplexity.main, ["-m", "{model}", "--dataset", "{texts}", "--tokens-step", "0"], "tokens-step"),
        (
            perplexity.main,
            ["-m", "{model}", "--dataset", "{texts}", "--max-tokens", "5000"],
            "': only 0 of 3 documents have 5000 tokens; at least 1 is needed: ask for shorter --lengths",
        ),
        (perplexity.main, ["-m", "{model}", *SCORE, "--samples", "7"], "only 3 of 3 documents"),
        (perplexity.main, ["-m", "{model}", *SCORE, "--windows", "0"], "windows"),
        (perplexity.main, ["-m", "{model}", *SCORE, "--batch-size", "0"], "--batch-size 0"),
        (perplexity.main, ["-m", "{model}", "--lengths", "32", "--dataset", "./nowhere"], "nowhere"),
        (perplexity.main, ["-m", "./nowhere", *SCORE], "does not exist"),
        (perplexity.main, ["-m", "{model}", *SCORE, "--yarn", "0.5"], "factor"),
        (perplexity.main, ["-m", "{model}", *SCORE, "--rerope", "512"], "window=512"),
        (perplexity.main, ["-m", "{model}", *SCORE, "--output", "{texts}"], "is a folder; name a file"),
        (passkey.main, ["-m", "{model}", "--lengths", "20"], "too short"),
        (passkey.main, ["-m", "{model}", "--iterations", "0"], "iterations"),
        (report.main, ["{texts}/nowhere", "--output", "{texts}"], "nowhere"),
        (report.main, ["{texts}/a.txt", "--output", "{texts}"], "no rows"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(
    checkpoint: str,
    texts: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    main: Callable[[list[str]], int],
    argv: list[str],
    says: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    filled = [part.format(model=checkpoint, texts=texts) for part in argv]
    assert run_cli(lambda: main(filled)) == 2
    captured = capsys.readouterr()
    assert captured.err.count("\n") == 1 and says in captured.err
    assert not list(tmp_path.iterdir())  # nothing half-written


def test_script_exits_with_2_from_anywhere(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "eval" / "perplexity.py"), "-m", "./nowhere", "--dataset", "."]
    environment = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment)
    assert done.returncode == 2
    assert done.stderr == "error: model './nowhere' does not exist\n"


def test_tokenizer_and_model_must_fit(texts: str, tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    patch_model(model := new_model(), "yarn:4")
    model.resize_token_embeddings(100)
    model.save_pretrained(tmp_path / "small")
    tokenizer.save_pretrained(tmp_path / "small")
    with pytest.raises(ConfigError, match="vocabulary of 100"):
        perplexity.main(["-m", str(tmp_path / "small"), "--dataset", texts, "--lengths", "32"])
