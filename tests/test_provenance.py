"""Where a result is from, and what rows record of paths."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

import pytest

from scaled_rope import provenance as provenance_module
from scaled_rope.provenance import portable, portable_command, portable_model, provenance


def test_provenance_says_where_a_number_is_from() -> None:
    record = provenance("cpu", 42, {"lengths": [256], "output": Path("rows.jsonl")})
    assert json.loads(json.dumps(record)) == record
    assert record["seed"] == 42 and record["cpu_count"] == os.cpu_count()
    assert record["arguments"] == {"lengths": [256], "output": "rows.jsonl"}
    assert record["versions"]["torch"] and record["device"]
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\+00:00", record["date"])
    assert record["commit"] is None or re.fullmatch(r"[0-9a-f]{40}(-dirty)?", record["commit"])


def test_a_copy_without_its_repository_is_told_its_commit(monkeypatch: pytest.MonkeyPatch) -> None:
    for said in ("abc123", None):
        provenance_module._commit.cache_clear()
        with monkeypatch.context() as elsewhere:
            elsewhere.setattr(provenance_module, "_git", lambda *_: None)
            elsewhere.setenv("SCALED_ROPE_COMMIT", "abc123") if said else elsewhere.delenv("SCALED_ROPE_COMMIT", False)
            assert provenance("cpu", None, {})["commit"] == said
    provenance_module._commit.cache_clear()  # in the repository it is git's word that counts
    if (head := provenance_module._git("rev-parse", "HEAD")) is not None:
        monkeypatch.setenv("SCALED_ROPE_COMMIT", "abc123")
        assert str(provenance("cpu", None, {})["commit"]).startswith(head)


def test_rows_name_no_path_of_this_machine(tmp_path: Path) -> None:
    root = Path(provenance_module.__file__).parents[1]
    assert portable(f"{root}/out/mine/model") == "out/mine/model"
    assert portable_model("/scratch/me/run/model") == "run/model"
    assert portable_model("/model") == "model" and portable_model("org/name") == "org/name"
    assert portable("/scratch/me/rows.jsonl") == "rows.jsonl"
    for text in ("out/rows.jsonl", "NousResearch/Llama-2-7b-hf", "yarn:8,ramp=rotations", "standin:books", ""):
        assert portable(text) == text
    words = ["python", "eval/perplexity.py", "-m", f"{root}/models/tiny-llama-256", f"--output={tmp_path}/a b.jsonl"]
    assert portable_command(words) == "python eval/perplexity.py -m models/tiny-llama-256 '--output=a b.jsonl'"
    given = {"output": tmp_path / "rows.jsonl", "model": [str(root / "out"), "org/name"], "lengths": "5", "factor": 2.5}
    record = provenance("cpu", None, given)["arguments"]
    assert record == {"output": "rows.jsonl", "model": ["out", "org/name"], "lengths": "5", "factor": 2.5}
    # Folders of models keep two names: the last is often the same for all.
    given = {"adapter": "/scratch/me/long/adapter", "model": ["/scratch/me/run/model"], "evaluator": None}
    record = provenance("cpu", None, given)["arguments"]
    assert record == {"adapter": "long/adapter", "model": ["run/model"], "evaluator": None}
