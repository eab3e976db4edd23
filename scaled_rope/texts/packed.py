"""Packed sets, fixed-length token sequences on disk: write them and read them.

A packed set is a folder: `tokens.bin` ([n, sequence_length], uint16 or uint32, little endian), `borders.bin` (int64,
ascending: where documents begin, counted in tokens from the first row's first), optionally `loss_weight.bin` (uint8,
shape of the tokens: how much each counts as a target), and `meta.json` with the provenance. Sets made before there was
`borders.bin` have none. It is memory-mapped on reading and needs nothing but numpy.
"""

from __future__ import annotations

import json
import math
import os
import shutil
from pathlib import Path
from typing import Any, BinaryIO, Protocol

import numpy as np
import numpy.typing as npt

from scaled_rope.content_hash import content_hash, kept_hash, record_hash
from scaled_rope.errors import ConfigError, check_name, shortened, unknown
from scaled_rope.files import check_writable, naming, scratch_path
from scaled_rope.texts.documents import check_subset, expanded, is_local
from scaled_rope.texts.hub import import_datasets, load_hub
from scaled_rope.texts.tables import ColumnDataset, check_ids

IntArray = npt.NDArray[np.int64]


def vocabulary_dtype(vocabulary: int) -> npt.DTypeLike:
    """The narrowest storage that holds every token id below `vocabulary`."""
    return np.uint16 if vocabulary <= 2**16 else np.uint32


_DTYPES = ("uint16", "uint32")


def _whole(meta: dict[str, Any], name: str, least: int) -> int:
    """A whole number of a set's record. Raises KeyError and ValueError, whose messages begin with its name."""
    value = meta[name]
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"{name}: {value!r} is no whole number of {least} or more")
    return value


def _record_hash(record: dict[str, Any]) -> str:
    """The hash of a set's record without that hash itself."""
    hashes = {name: digest for name, digest in record["hashes"].items() if name != "meta.json"}
    return record_hash(record | {"hashes": hashes})


class PackedWriter:
    """Writes a packed set chunk by chunk; the folder appears under its name only when `close` succeeds.

    Use as a context manager: leaving it by an exception removes what was written.
    """

    def __init__(self, output: str | Path, sequence_length: int, vocabulary: int, weighted: bool = False) -> None:
        if sequence_length < 2:
            raise ConfigError(f"sequence length {sequence_length} is not allowed; at least 2 tokens")
        check_name(output, "output")
        self.output = Path(output)
        if self.output.exists():
            raise ConfigError(f"output {output} exists; remove it or choose another folder")
        self.sequence_length, self.vocabulary = sequence_length, vocabulary
        self.dtype = np.dtype(vocabulary_dtype(vocabulary))
        self.weighted = weighted
        self.rows = 0
        check_writable(self.output)
        with naming(self.output):
            self.output.parent.mkdir(parents=True, exist_ok=True)
            self._staged = scratch_path(self.output, "partial")
            shutil.rmtree(self._staged, ignore_errors=True)
            self._staged.mkdir()
        self._tokens = (self._staged / "tokens.bin").open("wb")
        self._weights = (self._staged / "loss_weight.bin").open("wb") if weighted else None
        self._borders: BinaryIO | None = None
        self._documents = 0

    def append(
        self,
        tokens: npt.ArrayLike,
        loss_weight: npt.ArrayLike | None = None,
        starts: npt.ArrayLike | None = None,
    ) -> None:
        """Add one row of `sequence_length` tokens (and as many weights, for a weighted set).

        starts: the places in the row at which documents begin, ascending. A row that has none at 0 goes on with the
            document of the row before. A set none of whose rows is given any keeps no record of its documents.
        """
        with naming(self.output):
            self._append(np.asarray(tokens, dtype=np.int64), loss_weight, starts)

    def _append(self, row: IntArray, loss_weight: npt.ArrayLike | None, starts: npt.ArrayLike | None) -> None:
        if row.shape != (self.sequence_length,):
            raise ConfigError(f"row of {row.size} tokens in a set with sequence length {self.sequence_length}")
        if row.min() < 0 or row.max() >= self.vocabulary:
            bad = row[(row < 0) | (row >= self.vocabulary)][0]
            raise ConfigError(
                f"token id {bad} does not fit the vocabulary of {self.vocabulary}, 0 to {self.vocabulary - 1}"
            )
        self._tokens.write(row.astype(self.dtype).tobytes())
        if self._weights is not None:
            weights = np.ones(row.shape, np.uint8) if loss_weight is None else np.asarray(loss_weight, np.uint8)
            self._weights.write(weights.tobytes())
        if starts is not None:
            if self._borders is None:
                self._borders = (self._staged / "borders.bin").open("wb")
            places = np.asarray(starts, dtype=np.int64)
            self._borders.write((places + self.rows * self.sequence_length).astype("<i8").tobytes())
            self._documents += len(places)
        self.rows += 1

    def close(self, meta: dict[str, Any]) -> Path:
        """Write `meta.json`, and rename the folder to its final name.

        Raises:
            ConfigError: there are no rows, or another process made the set meanwhile.
            OSError: no space left.
        """
        with naming(self.output):
            return self._close(meta)

    def _close(self, meta: dict[str, Any]) -> Path:
        self._close_files()
        if not self.rows:
            shutil.rmtree(self._staged)
            raise ConfigError(f"the data gives no full sequence of {self.sequence_length} tokens; nothing written")
        record = {
            **{name: value for name, value in meta.items() if name != "borders"},
            "sequence_length": self.sequence_length,
            "rows": self.rows,
            "vocabulary": self.vocabulary,
            "dtype": self.dtype.name,
        }
        if self._borders is not None:
            record["borders"] = self._documents
        record["hashes"] = {file.name: content_hash(file) for file in sorted(self._staged.glob("*.bin"))}
        record["hashes"]["meta.json"] = _record_hash(record)
        (self._staged / "meta.json").write_text(json.dumps(record, indent=2, ensure_ascii=False) + "\n")
        try:
            os.rename(self._staged, self.output)
        except OSError as error:
            if not self.output.exists():
                raise
            raise ConfigError(
                f"output {self.output} was made by another process meanwhile; this one's is dropped"
            ) from error
        return self.output

    def _close_files(self) -> None:
        self._tokens.close()
        for file in (self._weights, self._borders):
            if file is not None:
                file.close()

    def __enter__(self) -> PackedWriter:
        return self

    def __exit__(self, *error: object) -> None:
        try:
            with naming(self.output):
                self._close_files()  # which writes what is still in memory
        finally:
            shutil.rmtree(self._staged, ignore_errors=True)  # gone already after a successful close


_CHECKED_TOKENS = 2**24  # that are looked at together


class TokenRows(Protocol):
    """The interface of training data: rows of tokens, with the weight of every token as a target."""

    weighted: bool  # whether any weight may differ from 1

    @property
    def longest(self) -> int:
        """The number of tokens of the longest row."""
        ...

    def __len__(self) -> int: ...

    def row(self, index: int) -> tuple[IntArray, IntArray]:
        """Tokens [T] and loss weights [T] of one row."""
        ...

    def check(self, vocabulary: int) -> None:
        """Raise a ConfigError for rows that a model with `vocabulary` embeddings cannot be trained on."""
        ...


class PackedDataset:
    """A packed set on disk; `tokens` is a memory map [n, sequence_length].

    `borders` is the record of where documents begin, a memory map [number of documents]; None: there is none.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        try:
            self.meta: dict[str, Any] = json.loads((self.path / "meta.json").read_text())
            shape = (_whole(self.meta, "rows", 1), _whole(self.meta, "sequence_length", 2))
            if self.meta["dtype"] not in _DTYPES:
                raise ValueError(f"dtype: {self.meta['dtype']!r} is not one of {', '.join(_DTYPES)}")
            dtype = np.dtype(self.meta["dtype"])
            documents = _whole(self.meta, "borders", 0) if "borders" in self.meta else None
            if "vocabulary" in self.meta:
                _whole(self.meta, "vocabulary", 1)
            hashes = self.meta.get("hashes", {})
            if not isinstance(hashes, dict):
                raise ValueError(f"hashes: {shortened(repr(hashes), 80)} is no block of names and hashes")
            if "hashes" in self.meta and hashes.get("meta.json") != _record_hash(self.meta):
                raise ValueError("content: it was changed after it was written")
        except (AttributeError, KeyError, TypeError, ValueError, RecursionError) as error:
            raise ConfigError(f"dataset {self.path} is no packed set: meta.json without a usable {error}") from None
        self.tokens = self._map("tokens.bin", dtype, shape)
        weights = self.path / "loss_weight.bin"
        self.loss_weight = self._map(weights.name, np.dtype(np.uint8), shape) if weights.exists() else None
        self.weighted = self.loss_weight is not None
        self.borders = None if documents is None else self._map("borders.bin", np.dtype("<i8"), (documents,))
        for name in hashes.keys() - {"meta.json"}:
            if kept_hash(self.path / name) != hashes[name]:
                raise ConfigError(f"dataset {self.path} is damaged: the content of {name} changed after it was written")

    def _map(self, name: str, dtype: np.dtype[Any], shape: tuple[int, ...]) -> npt.NDArray[Any]:
        file = self.path / name
        expected = math.prod(shape) * dtype.itemsize
        if not file.exists() or file.stat().st_size != expected:
            size = file.stat().st_size if file.exists() else 0
            raise ConfigError(f"dataset {self.path} is damaged: {name} has {size} bytes, expected {expected}")
        if not expected:
            return np.empty(shape, dtype)  # nothing to map
        return np.memmap(file, dtype=dtype, mode="r", shape=shape)

    @property
    def sequence_length(self) -> int:
        return int(self.tokens.shape[1])

    @property
    def longest(self) -> int:
        return self.sequence_length

    def __len__(self) -> int:
        return int(self.tokens.shape[0])

    def row(self, index: int) -> tuple[IntArray, IntArray]:
        tokens = np.asarray(self.tokens[index], dtype=np.int64)
        if self.loss_weight is None:
            return tokens, np.ones_like(tokens)
        return tokens, np.asarray(self.loss_weight[index], dtype=np.int64)

    def document_starts(self, index: int) -> IntArray | None:
        """The places in a row at which documents begin, ascending; None where the set keeps no record of them.

        There is none at 0 where the row goes on with the document of the row before.
        """
        if self.borders is None:
            return None
        begin = index * self.sequence_length
        low, high = np.searchsorted(self.borders, (begin, begin + self.sequence_length))
        return np.asarray(self.borders[low:high], np.int64) - begin

    def check(self, vocabulary: int) -> None:
        """Raise an error for token ids that are not below `vocabulary`, the number of a model's embeddings.

        The tokens are read only where the set was made for more ids than that.

        Raises:
            ConfigError: there is such an id.
        """
        if self.meta.get("vocabulary", vocabulary + 1) <= vocabulary:
            return
        for first in range(0, len(self), rows := max(1, _CHECKED_TOKENS // self.sequence_length)):
            block = self.tokens[first : first + rows]
            if block.max() >= vocabulary:
                row = first + int((block.max(axis=1) >= vocabulary).argmax())
                check_ids(self.tokens[row], vocabulary, row, str(self.path))


def open_packed(path: str | Path) -> PackedDataset:
    """Open a packed set.

    Raises:
        ConfigError: no such folder, not a packed set, or files shorter than `meta.json` says.
    """
    if not (Path(path) / "meta.json").is_file():
        raise ConfigError(f"dataset {path} is not a packed set (no meta.json); make one with tokenization.py")
    return PackedDataset(path)


_PARTS = ("tokens.bin", "borders.bin", "loss_weight.bin", "meta.json")


def is_part(path: str | Path) -> bool:
    """Whether a folder is there and holds nothing but files of a packed set, all of them or some."""
    path = Path(path)
    return path.is_dir() and not path.is_symlink() and {entry.name for entry in path.iterdir()} <= set(_PARTS)


def remove_half_made(path: str | Path) -> str | None:
    """Remove a packed set that lacks a part of itself, so that it can be made again.

    Returns:
        What was wrong with it; None where nothing was removed: there is no folder, the set is whole, or the folder
        holds something else.
    """
    if not is_part(path):
        return None
    try:
        open_packed(path)
    except ConfigError as error:
        shutil.rmtree(path)
        return str(error)
    return None


def open_rows(name: str, split: str = "train", subset: str | None = None) -> TokenRows:
    """Open tokenized data: a packed set, a folder that `datasets` saved, or a hub dataset.

    Args:
        name: folder or hub name.
        split: split of a hub dataset, or of a saved one that has several.
        subset: configuration of a hub dataset.

    Raises:
        ConfigError: no such data, no `input_ids`, or a subset of local data.
    """
    check_subset(name, subset)
    name = expanded(name)
    path = Path(name)
    if (path / "meta.json").is_file():
        with naming(path):
            return PackedDataset(path)
    if is_local(name):
        if not path.exists():
            raise ConfigError(f"dataset {name} does not exist; make it with tokenization.py (prepare in a recipe)")
        if not path.is_dir() or not any((path / f).exists() for f in ("dataset_info.json", "dataset_dict.json")):
            raise ConfigError(f"dataset {name} is no tokenized set; make one with tokenization.py")
        table = import_datasets(name).load_from_disk(name)
    else:
        table = load_hub(name, split, subset)
    if hasattr(table, "keys"):  # a DatasetDict
        if split not in table:
            raise unknown(f"split of dataset {name!r}:", split, table)
        table = table[split]
    return ColumnDataset(table, name)
