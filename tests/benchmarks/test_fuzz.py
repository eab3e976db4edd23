"""Damaged files of every kind: an answer or one clear line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import fuzz
from scaled_rope.command_line import run_cli
from scaled_rope.errors import ConfigError


@pytest.fixture(scope="module", autouse=True)
def _quiet() -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("COLUMNS", "100")
        yield


@pytest.mark.parametrize("name", fuzz.TARGETS)
def test_damaged_inputs_are_read_or_refused(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    counts, first = fuzz.run([name], seed=0, stop=lambda tried: tried >= 40)
    assert not first, first
    assert sum(counts.values()) == 40 and counts[name, "value"] + counts[name, "refused"] == 40
    assert len({fuzz.make_input(name, 0, number) for number in range(40)}) > 20  # inputs differ


#: what was once a traceback, or took gigabytes
FOUND = (
    ("config", b'{"model_type": "llama", "head_dim": 2147483648}'),
    ("config", b'{"model_type": "llava", "text_config": {"head_dim": 100000000000000000000, "model_type": "llama"}}'),
    ("packed", b'{"sequence_length": 4, "rows": 3, "vocabulary": "", "dtype": "uint16"}'),
    ("packed", b'{"sequence_length": 4, "rows": 3, "dtype": "uint16", "hashes": null}'),
    ("state", b'{"step": Infinity, "ranks": 1}'),
    ("state", b'{"step": 6, "ranks": 1, "files": {"model.safetensors": 0}}'),
    ("state", b'{"step": 6, "ranks": 1, "files": {"model.safetensors": [""]}}'),
    ("state", b'{"step": 6, "ranks": 1, "files": []}'),
)


@pytest.mark.parametrize(("name", "data"), FOUND)
def test_what_was_found_is_mended(name: str, data: bytes) -> None:
    assert fuzz.outcome(name, data) in fuzz.GOOD


@pytest.mark.parametrize("field", ["window_tokens", "distance", "accuracy", "protocol"])
def test_rows_with_values_of_another_kind(field: str) -> None:
    lines = [json.loads(line) for line in fuzz._seeds("rows")[0].splitlines()]
    for row in lines:
        if field == "window_tokens":
            row["data"][field] = [4096]
        elif field == "distance":
            row["prompts"] = [{"distance": float("nan")}]
        elif field == "accuracy":
            row[field] = []
        else:
            row[field]["name"] = {"a": [1]}
    assert fuzz.outcome("rows", b"".join(json.dumps(row).encode() + b"\n" for row in lines)) in fuzz.GOOD


def test_failures_are_found_made_small_and_replayed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def use(folder: Path, data: bytes) -> object:
        if b"bad" in data:
            raise KeyError("bad")
        if len(data) < 3:
            raise ConfigError("too short")
        return data

    target = fuzz.Target(lambda: [b"some text with bad in it", b"good text"], use, "bytes")
    monkeypatch.setitem(fuzz.TARGETS, "recipe", target)
    monkeypatch.setattr(fuzz, "_KEPT", {})
    monkeypatch.setattr(fuzz, "limit_memory", lambda: None)
    assert fuzz.main(["--only", "recipe", "--minutes", "0.01"]) == 1
    said = capsys.readouterr().out
    assert "FAILED recipe: KeyError at test_fuzz.py" in said and "smallest: b'bad'" in said
    number = said.partition("--replay recipe:")[2].partition(";")[0]
    with pytest.raises(KeyError):
        fuzz.main(["--replay", f"recipe:{number}"])
    for words, message in (
        (["--only", "recipes"], "unknown target 'recipes'"),
        (["--minutes", "0"], "--minutes 0.0 is not allowed"),
        (["--replay", "recipe:x"], "is not allowed; TARGET:NUMBER"),
    ):
        assert run_cli(lambda words=words: fuzz.main(words)) == 2
        assert message in capsys.readouterr().err
