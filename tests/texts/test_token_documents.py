"""Token ids of documents, whatever they come from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from scaled_rope.errors import ConfigError
from scaled_rope.texts.packed import PackedWriter, open_packed
from scaled_rope.texts.packing import Document, pack, recut
from scaled_rope.texts.token_documents import TokenSource, first_tokens, save_token_documents


def letters(text: str, **options: Any) -> dict[str, list[int]]:
    """A tokenizer: a token per character."""
    assert options["add_special_tokens"] is False
    return {"input_ids": [ord(letter) for letter in text]}


@pytest.fixture
def texts(tmp_path: Path) -> str:
    folder = tmp_path / "texts"
    folder.mkdir()
    (folder / "a.txt").write_text("abc")
    (folder / "b.txt").write_text("de")
    return str(folder)


def read(source: TokenSource) -> list[list[int]]:
    return [ids.tolist() for ids in source.documents(letters)]


def test_texts_and_sets_of_them_are_the_same_documents(texts: str, tmp_path: Path) -> None:
    pytest.importorskip("datasets")
    source = TokenSource(texts)
    assert source.title == "texts" and read(source) == [[97, 98, 99], [100, 101]]
    saved = tmp_path / "out" / "saved"
    assert save_token_documents(source.documents(letters), saved, texts) == 2
    assert read(TokenSource(str(saved))) == read(TokenSource(str(saved), tokenized=True)) == read(source)
    assert [path.name for path in saved.parent.iterdir()] == ["saved"]
    with pytest.raises(ConfigError, match="exists; remove it or choose another folder"):
        save_token_documents(source.documents(letters), saved, texts)
    with pytest.raises(ConfigError, match="dataset 'x' is empty"):
        save_token_documents([], tmp_path / "empty", "x")
    assert not (tmp_path / "empty").exists()


def test_rows_of_a_packed_set_come_as_they_are(tmp_path: Path) -> None:
    with PackedWriter(tmp_path / "set", 3, 100) as writer:
        writer.append([0, 5, 6])
        writer.append([7, 1, 0])
        writer.close({})
    assert read(TokenSource(str(tmp_path / "set"))) == [[0, 5, 6], [7, 1, 0]]


def test_padding_is_no_text(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Of what best-fit packs as much is scored as training counts; prompts that are not learnt are text."""
    masked = Document([5, 5, 7, 8], np.asarray([0, 0, 1, 1], np.uint8), bare=True)
    with PackedWriter(tmp_path / "set", 8, 100, weighted=True) as writer:
        counts = pack([[11, 12, 13, 14, 15], masked, [*range(20, 36)]], writer, None, None, packing="best-fit", pad=5)
        writer.close({"packing": "best-fit"})
    rows = open_packed(tmp_path / "set")
    found = read(TokenSource(str(tmp_path / "set")))
    assert sorted(found) == [[5, 5, 7, 8], [11, 12, 13, 14, 15], [*range(20, 28)], [*range(28, 36)]]
    assert sum(map(len, found)) == int((rows.loss_weight != 0).sum()) + 2 == counts.tokens
    assert "set: 7 tokens of padding in 2 rows are left out\n" in capsys.readouterr().err

    # Cut anew, padding lies in the middle of rows and at their beginnings.
    recut(rows, tmp_path / "cut", 16, lambda count: None)
    assert sorted(read(TokenSource(str(tmp_path / "cut")))) == sorted(
        [[*range(20, 36)], [11, 12, 13, 14, 15], [5, 5, 7, 8]]
    )
    # Chats one after another have no padding, whatever a row ends with.
    with PackedWriter(tmp_path / "chats", 3, 100, weighted=True) as writer:
        pack([masked, masked], writer, None, None)
        writer.close({"packing": "concatenate"})
    assert read(TokenSource(str(tmp_path / "chats"))) == [[5, 5, 7], [8, 5, 5]]


def test_a_table_that_says_its_padding_by_labels_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    datasets = pytest.importorskip("datasets")
    table = {"input_ids": [[5, 6, 9, 9], [9, 9, 5, 9]], "labels": [[-100, 6, -100, -100], [-100, -100, 5, -100]]}
    datasets.Dataset.from_dict(table).save_to_disk(tmp_path / "table")
    capsys.readouterr()
    source = TokenSource(str(tmp_path / "table")).documents(letters)
    assert next(source).tolist() == [5, 6] and next(source).tolist() == [9, 9, 5, 9]
    source.close()  # type: ignore[attr-defined]  # one that has enough
    assert capsys.readouterr().err == f"note: dataset {tmp_path / 'table'}: 2 tokens of padding in 1 row are left out\n"


def test_what_is_announced_as_tokenized_must_be(texts: str) -> None:
    with pytest.raises(ConfigError, match="is no tokenized set"):
        read(TokenSource(texts, tokenized=True))
    with pytest.raises(ConfigError, match="subset 'b' is for hub datasets"):
        read(TokenSource(texts, subset="b"))


def test_first_tokens_have_a_blank_line_between_documents(texts: str, tmp_path: Path) -> None:
    whole = [ord(letter) for letter in "abc\n\nde"]
    for count in (2, 3, 5, 7, 9):
        found = first_tokens(texts, letters, count)
        assert found.tolist() == whole[:count] and found.dtype == np.int64
    (tmp_path / "empty.txt").write_text("")
    with pytest.raises(ConfigError, match="empty.txt' holds no text"):
        first_tokens(str(tmp_path / "empty.txt"), letters, 5)


def test_saved_tables_with_splits_and_padding_are_documents(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    table = datasets.Dataset.from_dict({"input_ids": [[9, 5, 6], [7, 8, 9]], "attention_mask": [[0, 1, 1], [1, 1, 1]]})
    datasets.DatasetDict({"test": table}).save_to_disk(tmp_path / "splits")
    assert read(TokenSource(str(tmp_path / "splits"))) == [[5, 6], [7, 8, 9]]


@pytest.mark.parametrize(
    ("name", "title"),
    [
        ("data/cache/books/heldout", "books-heldout"),
        ("data/cache/bible/heldout/", "bible-heldout"),
        ("heldout", "heldout"),
        ("emozilla/pg19", "pg19"),
        ("standin:sotu", "standin:sotu"),
        ("texts/novel.txt", "novel.txt"),
    ],
)
def test_titles_tell_data_sets_apart(name: str, title: str) -> None:
    assert TokenSource(name).title == title


def test_a_folder_that_is_named_by_where_it_is_has_a_title(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "essays" / "old").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "essays" / "old")
    assert TokenSource(".").title == "old" and TokenSource("..").title == "essays"
