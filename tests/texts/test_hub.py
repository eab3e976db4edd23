"""Data sets of the hub, read through a stand-in of the `datasets` library."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from scaled_rope.errors import ConfigError
from scaled_rope.evaluation.choice_prompts import Question, read_questions
from scaled_rope.texts.documents import read_documents
from scaled_rope.texts.hub import hub_records, load_hub
from scaled_rope.texts.packed import open_rows

RECORD = {"article": "a", "question": "q", "options": ["w", "x", "y", "z"], "answer": 2, "text": "one"}


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """What the hub was asked for."""
    asked: list[tuple[Any, ...]] = []
    table = pytest.importorskip("datasets").Dataset.from_dict({"input_ids": [[5, 6]]})

    def load_dataset(*names: str, **options: Any) -> Any:
        asked.append((*names, options))
        return iter([RECORD, RECORD]) if options["streaming"] else table

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    return asked


def test_everybody_asks_the_hub_alike(calls: list[tuple[Any, ...]]) -> None:
    assert list(read_documents("some/set", split="test")) == ["one", "one"]
    assert list(read_documents("some/set:part", split="test")) == ["one", "one"]
    assert list(read_documents("some/set", split="test", subset="b")) == ["one", "one"]
    assert list(read_questions("some/set", "test")) == [Question("a", "q", ("w", "x", "y", "z"), 2)] * 2
    assert open_rows("some/set", "test").row(0)[0].tolist() == [5, 6]
    assert open_rows("some/set", "test", "b").row(0)[0].tolist() == [5, 6]
    whole = {"data_dir": None, "split": "test"}
    assert calls == [
        ("some/set", whole | {"streaming": True}),
        ("some/set", {"data_dir": "part", "split": "test", "streaming": True}),
        ("some/set", "b", {"split": "test", "streaming": True}),
        ("some/set", whole | {"streaming": True}),
        ("some/set", whole | {"streaming": False}),
        ("some/set", "b", {"split": "test", "streaming": False}),
    ]


def test_a_subset_is_for_the_hub(calls: list[tuple[Any, ...]], tmp_path: Any) -> None:
    (tmp_path / "a.txt").write_text("text")
    for name in (str(tmp_path), str(tmp_path / "a.txt"), "standin:books", "./nowhere"):
        for read in (lambda name: list(read_documents(name, subset="b")), lambda name: open_rows(name, "train", "b")):
            with pytest.raises(ConfigError, match="subset 'b' is for hub datasets; .* is none"):
                read(name)
    assert not calls


def test_what_the_hub_says_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*names: str, **options: Any) -> None:
        raise KeyError("no such set\nand more")

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=refuse))
    with pytest.raises(ConfigError, match="^dataset 'a/b' is no local path and the hub gave: 'no such set") as caught:
        load_hub("a/b", "train")
    assert "\n" not in str(caught.value)
    with pytest.raises(ConfigError, match="^dataset 'a/b' with subset 'c': the hub gave: 'no such set"):
        load_hub("a/b", "train", "c")

    def torn(*names: str, **options: Any) -> Iterator[dict[str, Any]]:
        yield RECORD
        raise OSError("torn file")

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=torn))
    records = hub_records("a/b", "train")
    assert next(records) == RECORD
    with pytest.raises(ConfigError, match="^dataset 'a/b' cannot be read: torn file$"):
        next(records)


def test_a_missing_library_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    for read in (
        lambda: list(read_documents("a/b")),
        lambda: list(read_questions("a/b", "x")),
        lambda: open_rows("a/b"),
    ):
        with pytest.raises(ConfigError, match=r"hub datasets need: pip install 'scaled-rope\[train\]'"):
            read()


def test_questions_are_read_from_json_in_any_layout(tmp_path: Any) -> None:
    question = {"article": "a", "question": "q", "options": ["w", "x", "y", "z"], "answer": 2}
    path = tmp_path / "questions.json"
    path.write_text(json.dumps([question, question], indent=2))
    assert list(read_questions(str(path), "test")) == [Question("a", "q", ("w", "x", "y", "z"), 2)] * 2
    path.write_text(json.dumps(question) + "\n" + json.dumps(question | {"article": "a\ud83d"}))
    with pytest.raises(ConfigError, match="questions.json line 2: .* holds half of a surrogate pair"):
        list(read_questions(str(path), "test"))
