"""Pack documents of tokens into the rows of a packed set, and cut a set's rows anew.

Two ways: documents one after another, cut every N tokens; or best-fit, where a document is cut only if it is longer
than a row. Both stream, and both hand the place where each document begins to the set, so nothing has to be guessed
from token ids later.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from scaled_rope.errors import ConfigError
from scaled_rope.texts.packed import PackedWriter, TokenRows

#: How documents and chunks get their BOS and EOS.
BOOKENDS = ("document", "chunk")
#: How documents become rows.
PACKINGS = ("concatenate", "best-fit")
#: Best-fit chooses among the documents of so many rows, and of so many tokens at least.
BUFFER_ROWS, BUFFER_TOKENS = 64, 2**20

AnyArray = npt.NDArray[Any]


# A named tuple, because a million short documents make a million of them.
class Document(NamedTuple):
    """One document to pack.

    Attributes:
        ids: its token ids [t].
        weights: how much each counts as a target [t]; None: all of them, once.
        source: the number of the source that it is from.
        bare: whether it needs no BOS and EOS around it, because it has what it needs.
    """

    ids: npt.ArrayLike
    weights: AnyArray | None = None
    source: int = 0
    bare: bool = False


@dataclass
class PackCounts:
    """Counts of documents and tokens; part of a set's provenance.

    Attributes:
        documents, tokens: how many were packed.
        cut_documents: documents that lie in more than one row.
        dropped_tokens: tokens of the last, incomplete row.
    """

    documents: int = 0
    tokens: int = 0
    cut_documents: int = 0
    dropped_tokens: int = 0


@dataclass
class Packing(PackCounts):
    """Counts of all documents, and in `sources` of each source's; `padding_tokens` fill rows and never count."""

    padding_tokens: int = 0
    sources: tuple[PackCounts, ...] = ()

    def meta(self) -> dict[str, int]:
        """The sums, for `meta.json`."""
        return {name: value for name, value in vars(self).items() if name != "sources"}


def pack(
    documents: Iterable[npt.ArrayLike | Document],
    writer: PackedWriter,
    bos: int | None,
    eos: int | None,
    bookend: str = "document",
    packing: str = "concatenate",
    pad: int = 0,
    sources: int = 1,
) -> Packing:
    """Pack tokenized documents (without special tokens) into the writer's fixed-length rows.

    `bookend="document"`: BOS + document + EOS. `bookend="chunk"`: every row is BOS + (N - 2) tokens + EOS, as the paper
    words it. A tokenizer without BOS or EOS contributes none.

    `packing="concatenate"`: one after another, cut every N tokens. Only the last, incomplete row is dropped, and
    counted. `packing="best-fit"` (after arXiv 2404.10830): a document longer than N is cut into rows; its rest and
    shorter documents are placed whole, the longest first, each where it leaves the least room. What stays free in a row
    is padded, with weight 0, so the writer has to be a weighted one. Nothing is dropped.

    Args:
        documents: arrays of ids [t], or `Document`s.
        pad: the token id of padding.
        sources: number of sources that documents name.

    Raises:
        ConfigError: a packing or bookend that does not exist, or the two do not go together.
    """
    if bookend not in BOOKENDS:
        raise ConfigError(f"bookend {bookend!r} is not allowed; one of: {', '.join(BOOKENDS)}")
    if packing not in PACKINGS:
        raise ConfigError(f"packing {packing!r} is not allowed; one of: {', '.join(PACKINGS)}")
    if packing == "best-fit" and bookend == "chunk":
        raise ConfigError(
            "bookend 'chunk' is not allowed with packing 'best-fit', which keeps documents whole; document"
        )
    if packing == "best-fit" and not writer.weighted:
        raise ConfigError("packing 'best-fit' pads rows, so it needs a set with loss weights")
    counts = tuple(PackCounts() for _ in range(sources))
    head, tail = bookends(bos, eos)
    per_row = bookend == "chunk"
    before, after = np.asarray(head, np.int64), np.asarray(tail, np.int64)
    rows = _BestFit(writer, pad) if packing == "best-fit" else _Stream(writer, *((head, tail) if per_row else ([], [])))
    for document in documents:
        if not isinstance(document, Document):
            document = Document(document)
        ids = document.ids if isinstance(document.ids, np.ndarray) else np.asarray(document.ids, np.int64)
        bare = document.bare or per_row
        parts = [ids] if bare else [before, ids, after]
        weights = None
        if document.weights is not None:
            ends = (0, 0) if bare else (len(head), len(tail))
            weights = np.pad(document.weights, ends, constant_values=1)
        count = counts[document.source]
        size = len(ids) if bare else len(ids) + len(head) + len(tail)
        count.documents += 1
        count.tokens += size
        count.cut_documents += rows.add(parts, size, weights, document.source)
    rows.finish()
    for source, tokens in rows.dropped():
        counts[source].dropped_tokens += tokens
    total = {name: sum(getattr(count, name) for count in counts) for name in vars(PackCounts())}
    return Packing(**total, padding_tokens=rows.padding, sources=counts)


def bookends(bos: int | None, eos: int | None) -> tuple[list[int], list[int]]:
    """The tokens that open and close a document or row; empty where the tokenizer has no such token."""
    return [] if bos is None else [bos], [] if eos is None else [eos]


class _Stream:
    """Concatenates documents, cuts the stream, and writes full rows, each between `head` and `tail`."""

    padding = 0

    def __init__(self, writer: PackedWriter, head: list[int], tail: list[int]) -> None:
        self._writer, self._head, self._tail = writer, head, tail
        self._body = writer.sequence_length - len(head) - len(tail)
        if self._body < 1:
            raise ConfigError(f"sequence length {writer.sequence_length} has no room between BOS and EOS")
        self._parts: list[AnyArray] = []
        self._weights: list[AnyArray] = []
        self._starts: list[int] = []  # in the parts that are held
        self.size = 0  # tokens that are held
        self._open: list[tuple[int, int]] = []  # source and tokens of what lies in the row that is not full yet

    def add(self, parts: list[AnyArray], size: int, weights: AnyArray | None, source: int = 0) -> bool:
        """Add a document; return whether it lies in more than one row."""
        if not size:
            return False
        self._starts.append(self.size)
        cut = self.size + size > self._body  # less than a row is held
        end = (self.size + size) % self._body
        if cut or not end:
            self._open = [(source, end)] if end else []
        else:
            self._open.append((source, size))
        self._hold(parts, size, weights)
        return cut

    def add_row(self, tokens: AnyArray, weights: AnyArray, starts: AnyArray | None) -> None:
        """Add a stretch of the stream in which documents begin at `starts`; None: not known."""
        self._starts += [] if starts is None else (self.size + starts).tolist()
        self._hold([tokens], len(tokens), weights)

    def _hold(self, parts: list[AnyArray], size: int, weights: AnyArray | None) -> None:
        self._parts += parts
        if self._writer.weighted:
            self._weights.append(np.ones(size, np.uint8) if weights is None else weights)
        self.size += size
        if self.size >= self._body:
            self._write()

    def _write(self) -> None:
        stream = np.concatenate(self._parts)
        weights = np.concatenate(self._weights) if self._weights else None
        starts = np.asarray(self._starts, np.int64)
        full = self.size // self._body * self._body
        borders = np.searchsorted(starts, np.arange(0, full + 1, self._body))
        for number, begin in enumerate(range(0, full, self._body)):
            row = np.concatenate([self._head, stream[begin : begin + self._body], self._tail])
            weight = None
            if weights is not None:
                ends = len(self._head), len(self._tail)
                weight = np.pad(weights[begin : begin + self._body], ends, constant_values=1)
            places = starts[borders[number] : borders[number + 1]] - begin
            # A document that begins with the row begins with the row's BOS.
            self._writer.append(row, weight, np.where(places > 0, places + len(self._head), 0))
        self._parts, self._weights = [stream[full:]], [] if weights is None else [weights[full:]]
        self._starts = (starts[borders[-1] :] - full).tolist()
        self.size -= full

    def finish(self) -> None:
        """Nothing: the row that is not full is dropped."""

    def dropped(self) -> list[tuple[int, int]]:
        """Source and number of the tokens that found no row."""
        return self._open


class _Piece(NamedTuple):
    """A document, or the rest of one, that fits into a row."""

    number: int  # in the order of arrival
    ids: AnyArray
    weights: AnyArray | None


class _BestFit:
    """Writes rows of whole documents; only those that are longer than a row are cut."""

    def __init__(self, writer: PackedWriter, pad: int) -> None:
        self._writer, self._pad = writer, pad
        self._length = writer.sequence_length
        self._limit = max(BUFFER_TOKENS, BUFFER_ROWS * self._length)
        self._pieces: list[_Piece] = []
        self._held = self._arrived = self.padding = 0

    def add(self, parts: list[AnyArray], size: int, weights: AnyArray | None, source: int = 0) -> bool:
        """Add a document; return whether it lies in more than one row."""
        ids = np.concatenate(parts) if len(parts) > 1 else parts[0]
        rest = 0
        while size - rest >= self._length:
            part = slice(rest, rest + self._length)
            self._writer.append(ids[part], None if weights is None else weights[part], [] if rest else [0])
            rest = part.stop
        if rest < size:
            self._arrived += 1
            # copies, because a view would hold the whole of a long document
            short = ids[rest:].astype(np.uint32), None if weights is None else weights[rest:].astype(np.uint8)
            self._pieces.append(_Piece(self._arrived, *short))
            self._held += size - rest
            if self._held >= self._limit:
                self._write(self._limit // 2)
        return size > self._length

    def finish(self) -> None:
        """Write all that is held."""
        self._write(0)

    def dropped(self) -> list[tuple[int, int]]:
        """Nothing is."""
        return []

    def _write(self, keep: int) -> None:
        """Place all pieces in rows and write the fullest, until no more than `keep` tokens are held."""
        rows: list[list[_Piece]] = []
        room: dict[int, list[int]] = {}  # free tokens -> rows that have so many
        sizes: list[int] = []  # the keys of `room`, sorted
        for piece in sorted(self._pieces, key=lambda piece: -len(piece.ids)):
            place = bisect_left(sizes, len(piece.ids))
            if place == len(sizes):
                free, row = self._length, len(rows)
                rows.append([])
            else:
                free = sizes[place]
                row = room[free].pop()
                if not room[free]:
                    del room[free], sizes[place]
            rows[row].append(piece)
            left = free - len(piece.ids)
            if left not in room:
                room[left] = []
                insort(sizes, left)
            room[left].append(row)
        self._pieces = []
        for free in sizes:
            for row in room[free]:
                if free == 0 or self._held > keep:
                    self._write_row(rows[row], free)
                    self._held -= self._length - free
                else:
                    self._pieces += rows[row]
        self._pieces.sort(key=lambda piece: piece.number)

    def _write_row(self, pieces: list[_Piece], free: int) -> None:
        sizes = [len(piece.ids) for piece in pieces]
        ends = np.cumsum(sizes)
        padding = np.full(free, self._pad, np.uint32)
        weights = [np.ones(len(p.ids), np.uint8) if p.weights is None else p.weights for p in pieces]
        self._writer.append(
            np.concatenate([*(piece.ids for piece in pieces), padding]),
            np.concatenate([*weights, np.zeros(free, np.uint8)]),
            [0, *(ends if free else ends[:-1])],  # padding is a document of its own
        )
        self.padding += free


def hashes_of(source: TokenRows) -> dict[str, str] | None:
    """The hashes of a packed set's files; None of other data, and of sets made before there were any."""
    found: dict[str, str] | None = getattr(source, "meta", {}).get("hashes")
    return found


def recut(
    source: TokenRows, output: str | Path, sequence_length: int, progress: Callable[[int], object], name: str = ""
) -> Path:
    """Re-cut tokenized rows into rows of another length; only the last, incomplete row is dropped.

    A set made with `bookend="chunk"` gets its BOS and EOS at the new borders instead of the old ones. Other data is one
    stream, whatever tokens stand at the borders of its rows. The places where documents begin go along, where the
    source knows them. The record of the new set has under "recut" what it was cut from, with the counts of the source's
    packing and, as "dropped_tokens", what found no row now.

    Args:
        progress: called with 1 for each row of the source.
        name: the source's name in the new set's provenance.
    """
    meta: dict[str, Any] = dict(getattr(source, "meta", {}))
    known = getattr(source, "document_starts", lambda index: None)
    chunked = meta.get("bookend") == "chunk"
    head, tail = bookends(meta.get("bos"), meta.get("eos")) if chunked else ([], [])
    vocabulary = int(meta.get("vocabulary", 2**32))  # where it is not known, tokens are stored in 32 bits
    with PackedWriter(output, sequence_length, vocabulary, source.weighted) as writer:
        stream = _Stream(writer, head, tail)
        for index in range(len(source)):
            progress(1)
            tokens, weights = source.row(index)
            inner = slice(len(head), len(tokens) - len(tail))
            starts = known(index)
            if starts is not None:
                starts = np.maximum(starts - len(head), 0)
            stream.add_row(tokens[inner], weights[inner], starts)
        # Counts of the packing are true of the source's rows, not of these.
        counts = {count: meta.pop(count) for count in Packing().meta() if count in meta}
        if "per_source" in meta:
            lost = ("cut_documents", "dropped_tokens")
            rows = [{key: value for key, value in row.items() if key not in lost} for row in meta["per_source"]]
            meta["per_source"] = rows
        meta["recut"] = {
            "dataset": name,
            "hashes": hashes_of(source),
            "rows": len(source),
            "sequence_length": meta.get("sequence_length"),
            "dropped_tokens": stream.size,
            "counts": counts,
        }
        return writer.close(meta)
