"""The comparison of answers with those of lm-eval's own model."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import harness
from benchmarks.harness import differences
from scaled_rope.errors import ConfigError
from scaled_rope.results import read_rows

TEXT = [0, 1, "42"]


def scored(document: int, value: float, greedy: bool = False, tokens: int = 2) -> list[object]:
    return [document, tokens, [value, greedy]]


@pytest.mark.parametrize(
    ("other", "said"),
    [
        ([TEXT, scored(1, -3.0), scored(1, -4.0)], 0),
        ([TEXT, scored(1, -3.003), scored(1, -4.0)], 0),  # float noise of two tokens
        ([[0, 1, "43"], scored(1, -3.0), scored(1, -4.0)], 1),
        ([TEXT, scored(1, -3.1), scored(1, -4.0)], 1),
        ([TEXT, scored(1, -3.0, True), scored(1, -4.0)], 1),
        ([TEXT, scored(1, -3.0), scored(1, -2.9)], 2),  # its own value, and another ending is the likeliest
    ],
)
def test_differences(other: list[object], said: int) -> None:
    assert len(differences([TEXT, scored(1, -3.0), scored(1, -4.0)], other)) == said


def test_two_arms(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    answers = {"scaled-rope": [scored(1, -3.0)], "hf": [scored(1, -3.0)]}
    monkeypatch.setattr(
        harness, "run_arm",
        lambda args, arm: {"t": {"seconds": 1.0, "cpu_seconds": 1.0 + (arm == "hf"), "answers": answers[arm]}},
    )  # fmt: skip
    argv = ["--tasks", "t", "--output", str(tmp_path / "rows")]
    assert harness.main(argv) == 0
    (row,) = read_rows(tmp_path / "rows")
    assert row["ratio"] == 2.0 and row["different"] == [] and (row["samples"], row["requests"]) == (1, 1)
    answers["hf"] = [scored(1, -9.0)]
    assert harness.main(argv) == 1 and "1 answers differ" in capsys.readouterr().out
    with pytest.raises(ConfigError, match="--limit 0 is not allowed"):
        harness.main([*argv, "--limit", "0"])
