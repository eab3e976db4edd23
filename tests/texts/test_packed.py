"""Packing and re-cutting, and sets that are damaged or foreign."""

from __future__ import annotations

import numpy as np
import pytest

from scaled_rope.errors import ConfigError
from scaled_rope.texts.packed import PackedWriter, open_packed, open_rows, recut
from scaled_rope.texts.tables import ColumnDataset
from tests.helpers.packing import BOS, EOS, documents, packed


def test_document_packing_is_the_concatenation_cut_every_n_tokens(tmp_path):
    docs = documents(0)
    stream = [token for doc in docs for token in [BOS, *doc, EOS]]
    data, counts = packed(tmp_path, docs, 32, "document")
    assert data.tokens.reshape(-1).tolist() == stream[: len(stream) // 32 * 32]
    assert counts.documents == len(docs)
    assert counts.tokens == len(stream)
    assert counts.dropped_tokens == len(stream) % 32
    assert data.tokens.dtype == np.uint16


def test_chunk_packing_opens_and_closes_every_row(tmp_path):
    docs = documents(1)
    stream = [token for doc in docs for token in doc]
    data, counts = packed(tmp_path, docs, 32, "chunk")
    assert (data.tokens[:, 0] == BOS).all() and (data.tokens[:, -1] == EOS).all()
    assert data.tokens[:, 1:-1].reshape(-1).tolist() == stream[: len(stream) // 30 * 30]
    assert counts.dropped_tokens == len(stream) % 30


@pytest.mark.parametrize("bookend", ["document", "chunk"])
def test_recutting_equals_packing_at_the_shorter_length(tmp_path, bookend):
    docs = documents(2)
    long, _ = packed(tmp_path, docs, 64, bookend, "long")
    recut(long, tmp_path / "recut", 24, lambda n: None)
    direct, _ = packed(tmp_path, docs, 24, bookend, "direct")
    result = open_packed(tmp_path / "recut")
    # The long set lost its own incomplete last row, so the recut one may end earlier: by less than 64 tokens.
    assert 0 <= len(direct) - len(result) <= -(-64 // 22)
    np.testing.assert_array_equal(result.tokens, direct.tokens[: len(result)])


def test_recutting_keeps_loss_weights_beside_their_tokens(tmp_path):
    rng = np.random.default_rng(0)
    tokens, weights = rng.integers(2, 90, (6, 32)), rng.integers(0, 9, (6, 32))
    with PackedWriter(tmp_path / "long", 32, 100, weighted=True) as writer:
        for row, weight in zip(tokens, weights, strict=True):
            writer.append(row, weight)
        writer.close({})
    recut(open_packed(tmp_path / "long"), tmp_path / "short", 12, lambda n: None)
    short = open_packed(tmp_path / "short")
    assert len(short) == 6 * 32 // 12
    np.testing.assert_array_equal(short.tokens.reshape(-1), tokens.reshape(-1))
    np.testing.assert_array_equal(short.loss_weight.reshape(-1), weights.reshape(-1))


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
