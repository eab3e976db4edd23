"""Refusals of the retrieval scripts."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

import eval.passkey as passkey
import eval.passkey_hard as passkey_hard
import eval.prompt_loop as prompt_loop
import eval.quality as quality
from scaled_rope.command_line import run_cli
from tests.helpers.retrieval import (
    checkpoint,  # noqa: F401
    story,  # noqa: F401
    tokenizer,  # noqa: F401
    tokenizers,  # noqa: F401
    write_questions,
)


@pytest.mark.parametrize(
    ("main", "argv", "says"),
    [
        (passkey.main, ["--heatmap", "map.pdf"], ".svg or .png"),
        (passkey.main, ["--fixed-length", "100", "--lengths", "100"], "--fixed-length"),
        (passkey.main, ["--fixed-length", "0"], "at least 2"),
        (passkey_hard.main, ["--dataset", "{story}", "--num-keys", "0"], "num-keys"),
        (passkey_hard.main, ["--dataset", "{story}", "--iterations", "0"], "iterations"),
        (passkey_hard.main, ["--dataset", "{story}", "--fixed-length", "50"], "too short"),
        (passkey_hard.main, ["--dataset", "{story}", "--fixed-length", "9000"], "the text has"),
        (passkey_hard.main, ["--dataset", "{story}", "--restrict-tokens", "maybe"], "maybe"),
        (passkey_hard.main, ["--dataset", "{story}", "--fixed-length", "99", "--lengths", "9"], "--fixed-length"),
        (passkey_hard.main, ["--dataset", "./nowhere.txt"], "does not exist"),
        (quality.main, ["--dataset", "./nowhere.jsonl"], "does not exist"),
        (quality.main, ["--dataset", "{story}"], "is a folder"),
        (quality.main, ["--dataset", "{story}/a.txt"], "is not JSON"),
        (quality.main, ["--dataset", "{questions}", "--limit", "0"], "limit"),
        (quality.main, ["--dataset", "{questions}", "--max-tokens", "20"], "max-tokens 20"),
        (quality.main, ["--dataset", "{questions}", "--max-tokens", "20", "--too-long", "drop"], "longer than 20"),
        (quality.main, ["--dataset", "{bad}"], "answer=4 must be 0 to 3"),
        (prompt_loop.main, ["--penalty-alpha", "0.6"], "contrastive search"),
        (prompt_loop.main, ["--max-new-tokens", "0"], "max-new-tokens"),
        (prompt_loop.main, ["--temperature", "-1"], "temperature"),
        *(
            (prompt_loop.main, ["--temperature", text], "is not allowed; 0, or 0.001 to 1000")
            for text in ("inf", "nan", "1e300", "1e-300")
        ),
        *(
            (prompt_loop.main, ["--repetition-penalty", text], "is not allowed; 0.001 to 1000")
            for text in ("inf", "nan", "1e300", "1e-300")
        ),
        (prompt_loop.main, ["--top-k", "0"], "top-k"),
        (prompt_loop.main, ["--repetition-penalty", "0"], "repetition-penalty"),
        (prompt_loop.main, ["--seed", str(2**64)], f"--seed {2**64} is not allowed; 0 to {2**64 - 1}"),
        (prompt_loop.main, ["--seed", "-1"], "--seed -1 is not allowed"),
        (passkey_hard.main, ["--dataset", "{story}", "--seed", "-1"], "--seed -1 is not allowed; at least 0"),
        (prompt_loop.main, ["--input-file", "nowhere.txt"], "nowhere.txt"),
        (prompt_loop.main, ["--yarn", "2", "--yarn", "4"], "one model and one scaling"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(
    checkpoint: str,
    story: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    main: Callable[[list[str]], int],
    argv: list[str],
    says: str,
) -> None:
    (tmp_path / "here").mkdir()
    questions = write_questions(tmp_path / "questions.jsonl", "012")
    bad = write_questions(tmp_path / "bad.jsonl", "14")
    monkeypatch.chdir(tmp_path / "here")
    filled = [part.format(story=story, questions=questions, bad=bad) for part in argv]
    assert run_cli(lambda: main(["-m", checkpoint, *filled])) == 2
    captured = capsys.readouterr()
    assert captured.err.count("\n") == 1 and says in captured.err
    assert not list((tmp_path / "here").iterdir())  # nothing half-written
