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
from scaled_rope.evaluation.passkey_prompts import KEY_LINE, KEY_RANGE, OPENING, QUESTION, WORDINGS, build_prompt
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


def test_wordings_and_seeds_in_one_run(
    checkpoint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["-m", checkpoint, "--lengths", "250,300", "--iterations", "2", "--depths", "random"]
    before = evaluate(passkey.main, tmp_path / "rows.jsonl", *argv)  # a run that knew of no wordings
    assert all("wording" not in row["protocol"] for row in before)
    more = ["--wording", "passkey,needle", "--seeds", "42,43,44"]
    picture = tmp_path / "map.svg"
    rows = evaluate(passkey.main, tmp_path / "rows.jsonl", *argv, *more, "--heatmap", str(picture))[len(before) :]
    each = [row for row in rows if row["metric"] == "passkey"]
    found = [(row["protocol"].get("wording", "passkey"), row["protocol"]["seed"], row["length"]) for row in each]
    assert found == [  # those of seed 42 in the released wording are there
        *(("passkey", seed, n) for seed in (43, 44) for n in (250, 300)),
        *(("needle", seed, n) for seed in (42, 43, 44) for n in (250, 300)),
    ]
    assert [row["provenance"]["seed"] for row in each] == [seed for _, seed, _ in found]
    assert len({row["data"]["fingerprint"] for row in each}) == len(each)
    contexts = [row for row in rows if row["metric"] == "passkey_context"]
    assert [row["protocol"].get("wording") for row in contexts] == [None, "needle"]
    assert all(row["protocol"]["seeds"] == [42, 43, 44] for row in contexts)
    said = capsys.readouterr().out
    assert "passkeys found, by context length (tokens), needle\n" in said and "0/6" in said
    assert ", needle" in picture.read_text()
    monkeypatch.setattr(passkey_evaluator, "score", None)  # nothing is measured again
    again = evaluate(passkey.main, tmp_path / "rows.jsonl", *argv, "--wording=passkey", "--wording=needle", *more[2:])
    assert again == [*before, *rows]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--wording", "needles"], "unknown wording 'needles'"),
        (["--seeds", "1,2", "--seed", "3"], "give either --seed or --seeds"),
        (["--seeds", "1,x"], "--seeds 1,x is not allowed; whole numbers, separated by commas"),
        (["--seeds", "1,1"], "--seeds 1,1 is not allowed; each seed once"),
        (["--seeds", "1,-2"], "--seeds 1,-2 is not allowed; each at least 0"),
        (["--seed", "-1"], "--seed -1 is not allowed; at least 0"),
    ],
)
def test_wordings_and_seeds_that_are_refused(flags: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        passkey.check_arguments(passkey.build_parser().parse_args(["--lengths", "99", *flags]))


def test_the_flag_knows_every_wording() -> None:
    assert tuple(WORDINGS) == passkey.WORDINGS
