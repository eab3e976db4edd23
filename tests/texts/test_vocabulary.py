"""Tokenized sets against the tokenizer of a model."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from scaled_rope.errors import ConfigError
from scaled_rope.texts.token_documents import TokenSource
from scaled_rope.texts.vocabulary import base_vocabulary_hash, check_tokenizer, vocabulary_hash
from tests.helpers.packing import tokenize, write_corpus


class Words:
    """A tokenizer of a few words."""

    def __init__(self, words: str, added: str = "") -> None:
        self._words, self._added = words.split(), added.split()

    def get_vocab(self) -> dict[str, int]:
        return {word: index for index, word in enumerate([*self._words, *self._added])}

    def get_added_vocab(self) -> dict[str, int]:
        return {word: index for word, index in self.get_vocab().items() if word in self._added}


def made_with(tokenizer: Any, **fields: Any) -> Any:
    hashes = {"tokenizer_hash": vocabulary_hash(tokenizer), "base_vocabulary_hash": base_vocabulary_hash(tokenizer)}
    return SimpleNamespace(meta={"tokenizer": "other", **hashes} | fields)


def test_what_differs_decides() -> None:
    rows = made_with(Words("a b c", "<s>"))
    assert check_tokenizer(rows, "set", Words("a b c", "<s>"), "mine") is None
    for added in ("", "<s> <pad>", "<pad>"):
        note = check_tokenizer(rows, "set", Words("a b c", added), "mine")
        assert note == "dataset set was made with tokenizer other, which has other added tokens than that of mine"
    for words in ("a c b", "a b", "a b c d"):
        with pytest.raises(ConfigError) as refused:
            check_tokenizer(rows, "set", Words(words, "<s>"), "mine")
        assert str(refused.value) == (
            "dataset set was made with tokenizer other, whose ids stand for other tokens than those of mine; make it "
            "with the tokenizer of mine"
        )


def test_sets_that_do_not_say_so_much_are_not_refused() -> None:
    earlier = made_with(Words("a b"), base_vocabulary_hash=None)
    assert check_tokenizer(earlier, "set", Words("a b"), "mine") is None
    assert "does not say in what they differ" in str(check_tokenizer(earlier, "set", Words("a c"), "mine"))
    assert check_tokenizer(SimpleNamespace(meta={}), "set", Words("a"), "mine") is None
    assert check_tokenizer(object(), "a table of datasets", Words("a"), "mine") is None


def test_evaluators_refuse_a_set_of_another_tokenizer(tmp_path: Path, tokenizer_dir: Path) -> None:
    from scaled_rope.checkpoint import load_tokenizer

    write_corpus(tmp_path)
    flags = ("--dataset", tmp_path / "txt", "--tokenizer", tokenizer_dir, "--sequence-length", 32, "--num-proc", 1)
    assert tokenize(*flags, "--output", tmp_path / "set") == 0
    source = TokenSource(str(tmp_path / "set"))
    assert len(next(iter(source.documents(load_tokenizer(str(tokenizer_dir)))))) == 32
    with pytest.raises(ConfigError, match="whose ids stand for other tokens than those of the model"):
        next(iter(source.documents(load_tokenizer("models/tiny-llama-256"))))
