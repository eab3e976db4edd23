"""Sets on disk: damaged and foreign ones."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from scaled_rope import files
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


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"rows": 4, "sequence_length": 3}, "content: it was changed after it was written"),
        ({"dtype": "float16"}, "dtype: 'float16' is not one of uint16, uint32"),
        ({"rows": 3.7}, "rows: 3.7 is no whole number of 1 or more"),
        ({"rows": 0}, "rows: 0 is no whole number of 1 or more"),
        ({"rows": True}, "rows: True is no whole number"),
        ({"sequence_length": -4}, "sequence_length: -4 is no whole number of 2 or more"),
        ({"vocabulary": 9}, "content: it was changed after it was written"),
        ({"hashes": 5}, "meta.json without a usable"),
    ],
)
def test_a_changed_record_is_refused(tmp_path, change, said):
    with PackedWriter(tmp_path / "set", 4, 100) as writer:
        for start in (0, 4, 8):
            writer.append(range(start, start + 4))
        writer.close({})
    open_packed(tmp_path / "set")
    meta = tmp_path / "set" / "meta.json"
    meta.write_text(json.dumps(json.loads(meta.read_text()) | change))
    with pytest.raises(ConfigError, match=re.escape(said)):
        open_packed(tmp_path / "set")


def test_changed_tokens_are_found_and_old_sets_are_read(tmp_path):
    with PackedWriter(tmp_path / "set", 4, 100, weighted=True) as writer:
        writer.append([1, 2, 3, 4], starts=[0])
        writer.close({})
    for name in ("tokens.bin", "loss_weight.bin", "borders.bin"):
        path = tmp_path / "set" / name
        before = path.read_bytes()
        path.write_bytes(bytes([before[0] ^ 1]) + before[1:])
        with pytest.raises(ConfigError, match=f"the content of {name} changed after it was written"):
            open_packed(tmp_path / "set")
        path.write_bytes(before)
    meta = json.loads((tmp_path / "set" / "meta.json").read_text())
    del meta["hashes"]  # as earlier versions wrote it
    (tmp_path / "set" / "meta.json").write_text(json.dumps(meta))
    assert len(open_packed(tmp_path / "set")) == 1


def test_leftovers_of_processes_that_ended_are_removed(tmp_path):
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    here = files._process_place()
    gone, ours, other = (
        tmp_path / f".set.{place}.partial"
        for place in (f"{here}-{ended.pid}", f"{here}-{os.getppid()}", f"another-{ended.pid}")
    )
    for folder in (gone, ours, other):
        folder.mkdir()
        (folder / "tokens.bin").write_bytes(b"x")
    with PackedWriter(tmp_path / "set", 4, 10) as writer:
        writer.append([1, 2, 3, 4])
        writer.close({})
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([ours.name, other.name, "set"])


def test_of_two_that_make_one_set_the_second_says_so(tmp_path):
    with PackedWriter(tmp_path / "set", 4, 10) as late:
        late.append([1, 2, 3, 4])
        (tmp_path / "set").mkdir()
        (tmp_path / "set" / "meta.json").write_text("{}")
        with pytest.raises(ConfigError, match="was made by another process meanwhile"):
            late.close({})
    assert [path.name for path in tmp_path.iterdir()] == ["set"]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no file that is always full")
def test_a_disk_that_fills_up_names_the_set_and_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="No space left") as raised:
        with PackedWriter(tmp_path / "set", 4, 10) as writer:
            writer._tokens.close()
            writer._tokens = open("/dev/full", "wb")  # which takes what fits into its buffer
            writer.append([1, 2, 3, 4])
            writer.close({})
    assert raised.value.filename == str(tmp_path / "set")
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="no folder in which nobody can make files")
def test_a_place_where_no_set_can_be_made_is_named_as_it_was_given() -> None:
    with pytest.raises(ConfigError, match="^file '/proc/set' cannot be used: /proc is no folder that can be written"):
        PackedWriter("/proc/set", 4, 10)
