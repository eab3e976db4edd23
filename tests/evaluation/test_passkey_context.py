"""The figures of table 5: up to which length keys are found."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

import eval.passkey as passkey
from scaled_rope.evaluation import passkey_evaluator
from scaled_rope.evaluation.passkey_context import passkey_context
from tests.helpers.evaluators import evaluate
from tests.helpers.retrieval import (
    checkpoint,  # noqa: F401
    tokenizer,  # noqa: F401
    tokenizers,  # noqa: F401
)


@pytest.mark.parametrize(
    ("accuracies", "context", "accuracy"),
    [
        ({8: 1.0, 16: 1.0, 32: 1.0}, 32, 1.0),
        ({8: 1.0, 16: 0.5, 24: 0.8, 32: 0.7}, 24, (1.0 + 0.5 + 0.8) / 3),  # a dip before the largest doesn't matter
        ({32: 0.7, 24: 0.8, 16: 0.5, 8: 1.0}, 24, (1.0 + 0.5 + 0.8) / 3),  # nor does the order
        ({8: 0.79, 16: 0.0}, None, None),
        ({8: 16 / 20}, 8, 0.8),
        ({8: 0.0, 128: 0.9}, 128, 0.45),
        # Sixteen sizes, ten prompts each; 132 of the 140 up to 112k are found: the 94.3 % of table 5's second row.
        (
            dict(zip(range(8, 136, 8), [1.0] * 9 + [0.9, 0.7, 0.8, 0.9, 0.9, 0.6, 0.3], strict=True)),
            112,
            132 / 140,
        ),
    ],
)
def test_passkey_context(accuracies: dict[int, float], context: int | None, accuracy: float | None) -> None:
    found = passkey_context(accuracies)
    assert found[0] == context
    assert found[1] == (None if accuracy is None else pytest.approx(accuracy))


FOUND = {100: 5, 130: 2, 160: 4, 190: 1}  # of 5


def planned(model: Any, prompts: Any, *rest: Any) -> Any:
    right = FOUND[prompts[0].length]
    yield [index < right for index in range(len(prompts))]


def test_passkey_context_becomes_a_row(
    checkpoint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(passkey_evaluator, "score", planned)
    argv = ["-m", checkpoint, "--scaling", "default", "--yarn", "2", "--iterations", "5"]
    all_lengths = ["--lengths", ",".join(map(str, FOUND))]
    picture = tmp_path / "map.svg"
    rows = evaluate(passkey.main, tmp_path / "rows.jsonl", *argv, *all_lengths, "--heatmap", str(picture))
    assert [row["metric"] for row in rows] == ["passkey"] * 8 + ["passkey_context"] * 2
    for row in rows[8:]:
        assert row["context"] == 160 and row["accuracy"] == pytest.approx(11 / 15)
        assert row["length"] == 190 and row["data"]["lengths"] == list(FOUND) and row["protocol"]["passed"] == 0.8
        assert "eval/passkey.py" in row["provenance"]["command"] and row["provenance"]["seed"] == 42
    said = capsys.readouterr().out
    assert re.search(r"unscaled +160 +73\.3 %", said) and picture.read_text().startswith("<?xml")
    # Nothing new is measured or appended by the same command; other lengths are other figures.
    monkeypatch.setattr(passkey_evaluator, "score", None)
    assert evaluate(passkey.main, tmp_path / "rows.jsonl", *argv, *all_lengths) == rows
    more = evaluate(passkey.main, tmp_path / "rows.jsonl", *argv, "--lengths", "130,190")
    assert [row["context"] for row in more[10:]] == [None, None] and len(more) == 12
    assert re.search(r"unscaled +none", capsys.readouterr().out)


def test_what_did_not_fit_into_memory_is_left_out(
    checkpoint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def limited(model: Any, prompts: Any, *rest: Any) -> Any:
        if prompts[0].length > 150:
            raise torch.OutOfMemoryError("CUDA out of memory")
        yield from planned(model, prompts)

    monkeypatch.setattr(passkey_evaluator, "score", limited)
    argv = ["-m", checkpoint, "--iterations", "5", "--lengths", "100,130,160", "--heatmap", str(tmp_path / "map.png")]
    rows = evaluate(passkey.main, tmp_path / "rows.jsonl", *argv)
    assert rows[2]["error"] == "out of memory" and rows[3]["context"] == 100
    assert rows[3]["data"]["lengths"] == [100, 130] and "oom" in capsys.readouterr().out
    assert (tmp_path / "map.png").read_bytes().startswith(b"\x89PNG")
