"""eval/passkey.py: rows that record every prompt, and prompts of a fixed length."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerFast

import eval.passkey as passkey
from scaled_rope.checkpoint import encode
from scaled_rope.errors import ConfigError
from scaled_rope.evaluation import passkey_evaluator
from scaled_rope.evaluation.passkey_prompts import KEY_LINE, KEY_RANGE, OPENING, QUESTION, build_prompt
from tests.helpers.evaluators import evaluate
from tests.helpers.small_models import (
    checkpoint,  # noqa: F401
    measured,
    tokenizer,  # noqa: F401
)


def test_rows_record_every_prompt(checkpoint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    argv = ("-m", checkpoint, "--scaling", "default", "--dynamic-yarn", "--lengths", "100,160", "--iterations", "4")
    table = tmp_path / "table.csv"
    whole = evaluate(passkey.main, tmp_path / "rows.jsonl", *argv, "--length-step", "128", "--output-file", str(table))
    each = [row for row in whole if row["metric"] == "passkey"]
    assert [(row["label"], row["length"]) for row in each] == [
        (label, length) for label in ("unscaled", "dynamic-yarn") for length in (100, 160)
    ]
    for row in each:
        assert row["n"] == len(row["prompts"]) == 4
        assert row["right"] == sum(prompt["right"] for prompt in row["prompts"])
        assert row["prompts"][0]["depth"] == 0 and row["prompts"][-1]["depth"] == 1
    with open(table, newline="") as file:
        assert next(csv.reader(file)) == ["", "100", "160"]
    cut = tmp_path / "cut.jsonl"
    cut.write_bytes(b"".join((tmp_path / "rows.jsonl").read_bytes().splitlines(keepends=True)[:3]))
    lengths: list[int] = []
    score = passkey_evaluator.score
    monkeypatch.setattr(
        passkey_evaluator,
        "score",
        lambda model, prompts, *rest: lengths.append(prompts[0].length) or score(model, prompts, *rest),
    )
    assert measured(evaluate(passkey.main, cut, *argv)) == measured(whole)
    assert lengths == [160]


def test_fixed_length_and_shortest(checkpoint: str, tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    fixed = (OPENING, KEY_LINE, QUESTION + " {key}")
    shortest = 1 + max(sum(len(encode(tokenizer, piece.format(key=key))) for piece in fixed) for key in KEY_RANGE)
    argv = ("-m", checkpoint, "--fixed-length", str(shortest), "--iterations", "1")
    row, _ = evaluate(passkey.main, tmp_path / "rows.jsonl", *argv)
    assert row["length"] == shortest
    with pytest.raises(ConfigError, match=f"at least {shortest}"):
        build_prompt(tokenizer, shortest - 1, 0.5, 12345)
