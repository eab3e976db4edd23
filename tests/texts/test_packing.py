"""Packing documents into rows, and cutting rows anew."""

from __future__ import annotations

import numpy as np
import pytest

from scaled_rope.errors import ConfigError
from scaled_rope.texts import packing
from scaled_rope.texts.packed import PackedWriter, open_packed
from scaled_rope.texts.packing import Document, pack, recut
from scaled_rope.training.batches import DocumentBorders
from tests.helpers.packing import BOS, EOS, documents, packed

#: tokenizers: BOS and EOS
KINDS = {"both": (0, 1), "one for both": (0, 0), "no EOS": (0, None), "no BOS": (None, 1), "neither": (None, None)}


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


def test_recutting_keeps_the_counts_of_the_source_apart(tmp_path):
    counts = {"documents": 3, "tokens": 70, "cut_documents": 2, "dropped_tokens": 6, "padding_tokens": 0}
    with PackedWriter(tmp_path / "long", 32, 100) as writer:
        for _ in range(2):
            writer.append([5] * 32)
        per_source = [{"dataset": "a", "documents": 3, "tokens": 70, "cut_documents": 2, "dropped_tokens": 6}]
        writer.close({"tokenizer": "t", "sources": [["a", 1.0]], "per_source": per_source, **counts})
    recut(open_packed(tmp_path / "long"), tmp_path / "short", 12, lambda n: None, "long")
    meta = open_packed(tmp_path / "short").meta
    assert not counts.keys() & meta.keys() and meta["tokenizer"] == "t"
    assert meta["per_source"] == [{"dataset": "a", "documents": 3, "tokens": 70}]
    assert meta["sources"] == [["a", 1.0]]  # what a set was made from is true of this one as well
    assert meta["recut"]["counts"] == counts and meta["recut"]["dropped_tokens"] == 64 % 12


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


def fragments(data) -> list[list[int]]:
    """What training with `documents: separate` takes for one document each, and what of it is a target."""
    borders, found = DocumentBorders.of(data, "set"), []
    assert borders.note == ""
    for index in range(len(data)):
        (tokens, weights), positions = borders.separate(index, data.row(index))
        opens = np.flatnonzero(positions == 0)
        np.testing.assert_array_equal(np.flatnonzero(weights == 0), opens)
        for begin, end in zip(opens, [*opens[1:], len(tokens)], strict=True):
            assert positions[begin:end].tolist() == list(range(end - begin))
            found.append(tokens[begin:end].tolist())
    return found


def cut(docs: list[list[int]], length: int) -> list[list[int]]:
    """The documents, cut where a stream of all of them is cut every `length` tokens, without the incomplete row."""
    pieces, place, total = [], 0, sum(map(len, docs)) // length * length
    for doc in docs:
        while doc and place < total:
            room = length - place % length
            pieces.append(doc[:room])
            place, doc = place + len(pieces[-1]), doc[room:]
    return pieces


@pytest.mark.parametrize("kind", KINDS)
def test_every_document_is_alone_whatever_marks_it(tmp_path, kind):
    """Ids of BOS and EOS stand inside documents too, as where a text spells them."""
    bos, eos = KINDS[kind]
    docs = [[*doc[:3], 0, 1, *doc[3:]] if len(doc) > 4 else doc for doc in documents(7)]
    with PackedWriter(tmp_path / "set", 32, 100) as writer:
        counts = pack(docs, writer, bos, eos)
        writer.close({"bookend": "document", "bos": bos, "eos": eos})
    whole = [[*([] if bos is None else [bos]), *doc, *([] if eos is None else [eos])] for doc in docs]
    expected = cut(whole, 32)
    assert fragments(open_packed(tmp_path / "set")) == expected
    assert counts.cut_documents == sum(
        1 for begin, end in spans(whole) if end > begin and begin // 32 != (end - 1) // 32
    )
    recut(open_packed(tmp_path / "set"), tmp_path / "short", 8, lambda n: None)
    assert fragments(open_packed(tmp_path / "short")) == cut(whole, 8)[: len(cut(expected, 8))]


def spans(docs: list[list[int]]) -> list[tuple[int, int]]:
    ends = np.cumsum([len(doc) for doc in docs]).tolist()
    return list(zip([0, *ends[:-1]], ends, strict=True))


def test_documents_in_chunks_are_known_too(tmp_path):
    docs = documents(1)
    data, _ = packed(tmp_path, docs, 32, "chunk")
    inner = [piece for piece in cut(docs, 30)]
    found = fragments(data)
    assert [[token for token in piece if token not in (BOS, EOS)] for piece in found] == inner
    recut(data, tmp_path / "short", 17, lambda n: None)
    short = [[token for token in piece if token > EOS] for piece in fragments(open_packed(tmp_path / "short"))]
    assert short == cut(docs, 15)[: len(short)] and len(short) > 30


def test_dropped_and_cut_documents_are_counted_by_source(tmp_path):
    with PackedWriter(tmp_path / "set", 10, 100) as writer:
        sources = (Document([5] * size, source=source) for size, source in ((4, 0), (9, 1), (7, 0), (3, 1), (2, 0)))
        counts = pack(sources, writer, None, None, sources=2)
        writer.close({})
    first, second = counts.sources
    assert (first.documents, first.tokens, first.cut_documents, first.dropped_tokens) == (3, 13, 0, 2)
    assert (second.documents, second.tokens, second.cut_documents, second.dropped_tokens) == (2, 12, 1, 3)
    assert counts.meta() == {
        "documents": 5, "tokens": 25, "cut_documents": 1, "dropped_tokens": 5, "padding_tokens": 0,
    }  # fmt: skip


@pytest.mark.parametrize("buffer", [100, 10_000])
def test_best_fit_cuts_only_what_is_longer_than_a_row(tmp_path, monkeypatch, buffer):
    monkeypatch.setattr(packing, "BUFFER_ROWS", 1)
    monkeypatch.setattr(packing, "BUFFER_TOKENS", buffer)
    rng = np.random.default_rng(3)
    docs = [rng.integers(2, 90, size).tolist() for size in rng.choice([1, 3, 8, 20, 31, 32, 70, 64], 200)]
    with PackedWriter(tmp_path / "set", 32, 100, weighted=True) as writer:
        counts = pack(docs, writer, None, None, packing="best-fit", pad=99)
        writer.close({"bookend": "document", "bos": None, "eos": None})
    data = open_packed(tmp_path / "set")
    found: list[list[int]] = []
    for index in range(len(data)):
        tokens, weights = data.row(index)
        starts = data.document_starts(index)
        for begin, end in zip([0, *starts[starts > 0]], [*starts[starts > 0], 32], strict=True):
            piece = tokens[begin:end]
            assert (weights[begin:end] == (piece[0] != 99)).all()
            if piece[0] != 99:
                found.append(piece.tolist())
    expected = [doc[at : at + 32] for doc in docs for at in range(0, len(doc), 32)]
    assert sorted(found) == sorted(expected)
    assert counts.cut_documents == sum(len(doc) > 32 for doc in docs)
    assert counts.padding_tokens == len(data) * 32 - sum(map(len, docs)) == int((data.tokens == 99).sum())
    assert counts.dropped_tokens == 0
    # a row with room for the smallest row's content would mean that two rows could have been one
    assert counts.padding_tokens < 0.03 * data.tokens.size


def test_best_fit_places_each_document_where_it_leaves_the_least_room(tmp_path):
    with PackedWriter(tmp_path / "set", 10, 100, weighted=True) as writer:
        pack([[size] * size for size in (4, 6, 3, 7, 2, 8)], writer, None, None, packing="best-fit")
        writer.close({})
    rows = [sorted(set(row)) for row in open_packed(tmp_path / "set").tokens.tolist()]
    assert sorted(rows) == [[2, 8], [3, 7], [4, 6]]


def test_best_fit_holds_no_more_than_its_buffer(tmp_path, monkeypatch):
    monkeypatch.setattr(packing, "BUFFER_ROWS", 4)
    monkeypatch.setattr(packing, "BUFFER_TOKENS", 100)
    taken = 0

    def endless():
        nonlocal taken
        for size in [7, 12, 3] * 300:
            taken += size
            yield [5] * size
            assert taken - writer.rows * 32 <= 4 * 32 + 12

    with PackedWriter(tmp_path / "set", 32, 100, weighted=True) as writer:
        pack(endless(), writer, None, None, packing="best-fit")


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"packing": "worst-fit"}, "packing 'worst-fit' is not allowed; one of: concatenate, best-fit"),
        ({"packing": "best-fit", "bookend": "chunk"}, "bookend 'chunk' is not allowed with packing 'best-fit'"),
        ({"packing": "best-fit"}, "needs a set with loss weights"),
        ({"bookend": "page"}, "bookend 'page' is not allowed"),
    ],
)
def test_packings_that_do_not_exist_are_refused(tmp_path, more, message):
    with pytest.raises(ConfigError, match=message), PackedWriter(tmp_path / "set", 8, 100) as writer:
        pack([[1]], writer, 0, 1, **more)
