"""eval/passkey_hard.py, from natural text to rows."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerFast

import eval.passkey_hard as passkey_hard
from scaled_rope.errors import ConfigError
from scaled_rope.evaluation import hard_passkey_evaluator
from scaled_rope.evaluation.statistics import wilson_interval
from scaled_rope.results import Row
from tests.helpers.evaluators import evaluate
from tests.helpers.retrieval import (
    STORY,
    checkpoint,  # noqa: F401
    story,  # noqa: F401
    tokenizer,  # noqa: F401
    tokenizers,  # noqa: F401
)


def measured(rows: list[Row]) -> list[Row]:
    differ = ("provenance", "seconds", "peak_memory")
    return [{key: value for key, value in row.items() if key not in differ} for row in rows]


def test_a_model_that_reads_no_cache_is_decoded_without_or_refused(
    checkpoint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "story.txt").write_text(STORY * 40)
    monkeypatch.setattr(hard_passkey_evaluator, "cache_obstacle", lambda model: "its attention is its own")
    argv = ["-m", checkpoint, "--dataset", str(tmp_path / "story.txt"), "--lengths", "150", "--iterations", "1"]
    argv += ["--device", "cpu", "--output", str(tmp_path / "rows.jsonl")]
    with pytest.raises(ConfigError, match="its attention is its own; use --uncached"):
        passkey_hard.main([*argv, "--scaling", "dynamic-yarn"])
    assert passkey_hard.main([*argv, "--scaling", "dynamic-yarn", "--uncached", "--scaling", "yarn:4"]) == 0


def test_passkey_hard_end_to_end(
    checkpoint: str, story: str, tokenizer: PreTrainedTokenizerFast, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    argv = ["-m", checkpoint, "--scaling", "yarn:4", "--dynamic-yarn", "--dataset", story, "--num-keys", "2"]
    argv += ["--iterations", "3", "--lengths", "150,220"]
    answers = tmp_path / "answers.json"
    whole = evaluate(passkey_hard.main, tmp_path / "rows.jsonl", *argv, "--output-file", str(answers))
    assert [(row["metric"], row["label"], row["length"]) for row in whole] == [
        *(("passkey_hard", label, n) for label in ("yarn x4", "dynamic-yarn") for n in (150, 220)),
        *(("passkey_hard_context", label, 220) for label in ("yarn x4", "dynamic-yarn")),
    ]
    for row in whole[:4]:
        assert row["seconds"] > 0 and row["peak_memory"] > 2**20
        assert row["n"] == 3 and row["right"] == sum(one["right"] for one in row["prompts"])
        assert row["interval"] == wilson_interval(row["right"], 3)
        for one in row["prompts"]:
            assert len(set(one["keys"])) == 2 and one["keys"][one["asked"] - 1] == one["key"]
            assert one["depths"] == sorted(one["depths"]) and one["depths"][one["asked"] - 1] == one["depth"]
            assert set(one["answer"]) <= set("0123456789 \n\t\r") and one["answer"] != str(one["key"])
    assert whole[0]["prompts"][0]["keys"] == whole[2]["prompts"][0]["keys"]  # the same questions for every scaling
    kept = json.loads(answers.read_text())
    assert [row["prompts"] for row in kept] == [row["prompts"] for row in whole[:4]]

    cut = tmp_path / "cut.jsonl"
    cut.write_bytes(b"".join((tmp_path / "rows.jsonl").read_bytes().splitlines(keepends=True)[:3]))
    assert measured(evaluate(passkey_hard.main, cut, *argv)) == measured(whole)
    monkeypatch.setattr(hard_passkey_evaluator, "decode_numbers", None)  # nothing is left to compute
    assert measured(evaluate(passkey_hard.main, cut, *argv)) == measured(whole)


def test_passkey_hard_lengths() -> None:
    def lengths(*argv: str) -> list[int]:
        return passkey_hard.lengths_of(passkey_hard.build_parser().parse_args(list(argv)))

    assert lengths() == [8192]
    assert lengths("--fixed-length", "500") == [500]
    assert lengths("--max-tokens", "600") == [256, 512, 600]
    assert lengths("--max-tokens", "8192") == [256, 512, 1024, 2048, 4096, 8192]
    assert lengths("--lengths", "64,32") == [32, 64]
    assert lengths("--tokens-step", "4000") == [256, 4256]
