"""Sets on disk: damaged and foreign ones."""

from __future__ import annotations

import pytest

from scaled_rope.errors import ConfigError
from scaled_rope.texts.packed import PackedWriter, open_packed, open_rows
from scaled_rope.texts.tables import ColumnDataset
from tests.helpers.packing import documents, packed


def test_the_record_of_documents_is_checked_against_its_file(tmp_path):
    data, _ = packed(tmp_path, documents(0), 32, "document")
    assert data.borders is not None and data.meta["borders"] == len(data.borders)
    (tmp_path / "set" / "borders.bin").write_bytes(b"\0" * 4)
    with pytest.raises(ConfigError, match="borders.bin has 4 bytes, expected"):
        open_packed(tmp_path / "set")
    with PackedWriter(tmp_path / "rows", 4, 10) as writer:
        writer.append([1, 2, 3, 4])
        writer.close({"borders": 7})
    assert open_packed(tmp_path / "rows").document_starts(0) is None
    with PackedWriter(tmp_path / "none", 4, 10) as writer:
        writer.append([1, 2, 3, 4], starts=[])
        writer.close({})
    assert open_packed(tmp_path / "none").document_starts(0).tolist() == []


def test_damaged_and_foreign_sets_are_refused(tmp_path):
    data, _ = packed(tmp_path, documents(3), 16, "document")
    (tmp_path / "set" / "tokens.bin").write_bytes(b"\0" * 10)
    with pytest.raises(ConfigError, match="10 bytes, expected"):
        open_packed(tmp_path / "set")
    with pytest.raises(ConfigError, match="not a packed set"):
        open_packed(tmp_path)
    datasets = pytest.importorskip("datasets")
    datasets.Dataset.from_dict({"text": ["a"]}).save_to_disk(tmp_path / "text")
    with pytest.raises(ConfigError, match="no column 'input_ids'; it has: text"):
        open_rows(str(tmp_path / "text"))


def test_sets_without_the_split_or_rows_are_refused(tmp_path):
    datasets = pytest.importorskip("datasets")
    table = datasets.Dataset.from_dict({"input_ids": [[1, 2]]})
    with pytest.raises(ConfigError, match="'nothing' is empty"):
        ColumnDataset(table.select([]), "nothing")
    datasets.DatasetDict({"train": table}).save_to_disk(tmp_path / "dict")
    with pytest.raises(ConfigError, match="unknown split of dataset .* 'test'; known: train"):
        open_rows(str(tmp_path / "dict"), "test")
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "meta.json").write_text('{"name": "something else"}')
    with pytest.raises(ConfigError, match="no packed set"):
        open_packed(tmp_path / "foreign")


def test_ids_beyond_a_vocabulary_are_found_before_they_are_trained_on(tmp_path):
    """A set that was made for more ids than a model has is read; it may do without them."""
    data, _ = packed(tmp_path, documents(4), 16, "document")
    largest = int(data.tokens.max())
    data.check(100)
    data.check(largest + 1)
    row = int((data.tokens == largest).any(axis=1).argmax())
    with pytest.raises(ConfigError, match=f"row {row} of .* has token id {largest}, the model's vocabulary ends at"):
        data.check(largest)


@pytest.mark.parametrize("bad", [-100, 100, 7000])
def test_the_id_that_does_not_fit_is_named(tmp_path, bad):
    with PackedWriter(tmp_path / "set", 4, 100) as writer:
        with pytest.raises(ConfigError, match=f"token id {bad} does not fit the vocabulary of 100, 0 to 99"):
            writer.append([5, 99, bad, 6])
