"""Sets on disk: damaged and foreign ones."""

from __future__ import annotations

import pytest

from scaled_rope.errors import ConfigError
from scaled_rope.texts.packed import ColumnDataset, PackedWriter, open_packed, open_rows
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


def test_tables_with_masks_and_labels_give_weights(tmp_path):
    datasets = pytest.importorskip("datasets")
    table = {"input_ids": [[5, 6, 7, 8]], "attention_mask": [[1, 1, 1, 0]], "labels": [[5, -100, 7, 8]]}
    datasets.Dataset.from_dict(table).save_to_disk(tmp_path / "table")
    tokens, weights = open_rows(str(tmp_path / "table")).row(0)
    assert tokens.tolist() == [5, 6, 7, 8] and weights.tolist() == [1, 0, 1, 0]
