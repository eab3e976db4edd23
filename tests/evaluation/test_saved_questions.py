"""Saved benchmark questions against lm-eval, and outcomes by hand."""

from __future__ import annotations

import json
import math
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest

import eval.harness as command
from scaled_rope.checkpoint import DEFAULT_MODEL
from scaled_rope.command_line import run_cli
from scaled_rope.errors import ConfigError
from scaled_rope.evaluation.saved_questions import outcomes
from scaled_rope.results import read_rows, row_key
from tests.helpers.offline_benchmarks import archives  # noqa: F401


def asked(folder: Path, *flags: str) -> list[dict[str, Any]]:
    """Rows of one run of the command on the embedded model, in order."""
    rows = folder / "rows.jsonl"
    rows.unlink(missing_ok=True)
    more = ["--scaling", "yarn:8", "--max-length", "700", "--hide-progress", "--output", str(rows)]
    assert command.main(["-m", str(DEFAULT_MODEL), *flags, *more]) == 0
    return read_rows(rows)


def test_saved_requests_give_the_rows_of_lm_eval(
    archives: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """All four benchmarks: same identity and values, two of them with examples in their prompts."""
    saved = tmp_path / "requests"
    for tasks, shots in (("arc_challenge,hellaswag", "3"), ("truthfulqa_mc2,mmlu", "2")):
        flags = ["--tasks", tasks, "--num-fewshot", shots, "--offline"]
        expected = asked(tmp_path, *flags)
        assert command.main(["-m", str(DEFAULT_MODEL), *flags, "--save-requests", str(saved)]) == 0
        with monkeypatch.context() as without:
            for name in ("lm_eval", "datasets"):
                without.setitem(sys.modules, name, None)
            found = asked(tmp_path, "--tasks", tasks, "--requests", str(saved))
        assert [row["protocol"]["task"] for row in found] == tasks.split(",")
        for row, other in zip(found, expected, strict=True):
            assert row_key(row) == row_key(other)
            assert row["provenance"]["versions"]["lm-eval"] == other["provenance"]["versions"]["lm-eval"] is not None
            for name in ("n", "unit", "requests", "truncated", "length"):
                assert row[name] == other[name]
            assert row["outcomes"].keys() == other["outcomes"].keys()
            for task, answers in row["outcomes"].items():  # rounded to 6 places
                assert answers == pytest.approx(other["outcomes"][task], abs=2e-6)
            # one question per subject of MMLU has no standard error
            assert (row["standard_error"] is None) == (other["standard_error"] is None) == ("tasks" in row)
            for name in ("value", "standard_error")[: 1 if "tasks" in row else 2]:
                # both from float32 log-likelihoods of the same batches; sums of a few float64 in another order
                assert row[name] == pytest.approx(other[name], rel=1e-9, abs=1e-9), row["protocol"]["task"]
    everything = asked(tmp_path, "--requests", str(saved))
    assert {row["protocol"]["task"] for row in everything} == {"arc_challenge", "hellaswag", "truthfulqa_mc2", "mmlu"}
    other_model = tmp_path / "other"
    shutil.copytree(DEFAULT_MODEL, other_model)
    tokenizer = json.loads((other_model / "tokenizer.json").read_text())
    tokenizer["model"]["merges"] = tokenizer["model"]["merges"][:100]
    (other_model / "tokenizer.json").write_text(json.dumps(tokenizer))
    for flags, message in (
        (["--tasks", "mmlu", "--requests", str(tmp_path / "nothing")], "is no folder with saved requests"),
        (["--tasks", "helaswag", "--requests", str(saved)], "did you mean 'hellaswag'"),
        (["--tasks", "mmlu", "--requests", str(saved), "--limit", "3"], "limit=3: is not for --requests"),
        (["--tasks", "mmlu", "--requests", str(saved), "-m", str(other_model)], "with another tokenizer"),
    ):
        assert run_cli(lambda flags=flags: command.main([*flags, "--output", str(tmp_path / "none.jsonl")])) == 2
        assert message in capsys.readouterr().err


def test_only_multiple_choice_can_be_saved(tmp_path: Path) -> None:
    pytest.importorskip("lm_eval")
    flags = ["--tasks", "passkey", "--lengths", "300", "--limit", "1", "--save-requests", str(tmp_path)]
    with pytest.raises(ConfigError, match="task 'passkey' cannot be saved as requests: it is not multiple choice"):
        command.main(["-m", str(DEFAULT_MODEL), *flags])


def test_outcomes_by_hand() -> None:
    # per character -1, -1.5, -0.5
    choices = [(-1.0, 1.0), (-3.0, 2.0), (-2.0, 4.0)]
    assert outcomes(choices, 0) == {"acc": 1.0, "acc_norm": 0.0}
    assert outcomes(choices, 2) == {"acc": 0.0, "acc_norm": 1.0}
    masses = [math.exp(-1), math.exp(-3), math.exp(-2)]
    assert outcomes(choices, [1, 0, 1])["acc"] == pytest.approx((masses[0] + masses[2]) / sum(masses))
    # log-likelihoods whose exponentials are all 0
    assert outcomes([(-2000.0, 1.0), (-2000.0, 1.0)], [1, 0]) == {"acc": 0.5}
