"""Read documents from files of text, JSON lines or Parquet, or from a hub dataset."""

from __future__ import annotations

import functools
import hashlib
import io
import json
import os
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from scaled_rope.errors import ConfigError
from scaled_rope.texts.archives import MARK
from scaled_rope.texts.corpora import STANDIN, standin
from scaled_rope.texts.hub import hub_records

# --------------------------------------------------------------------------------------------------- reading text


def _text_of(record: Any, feature: str, where: str) -> str:
    text = record.get(feature) if isinstance(record, dict) else None
    if not isinstance(text, str):
        fields = ", ".join(sorted(record)) if isinstance(record, dict) else type(record).__name__
        raise ConfigError(f"feature {feature!r} is not a text field of {where}; it has: {fields}")
    return text


#: suffixes of files that are read, each of them but Parquet's also with `ZSTD` behind it
_SUFFIXES = (".txt", ".jsonl", ".json", ".parquet")
ZSTD = ".zst"


def _suffix(path: Path) -> str:
    """The suffix of a file's content, compressed or not, in lower case; "" if it is none of `_SUFFIXES`."""
    compressed = path.suffix.lower() == ZSTD
    suffix = (Path(path.stem) if compressed else path).suffix.lower()
    return suffix if suffix in _SUFFIXES and not (suffix == ".parquet" and compressed) else ""


def files_of(folder: str | Path) -> tuple[list[Path], list[Path]]:
    """The files of a folder and its sub-folders that are read, in order, and those that are not.

    Hidden files and folders, whose names begin with a dot, are neither, nor is the record that a fetched folder has of
    its archives. Links to folders are not followed.
    """
    read: list[Path] = []
    others: list[Path] = []
    for place, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        linked = [name for name in folders if Path(place, name).is_symlink()]
        for path in (Path(place, name) for name in [*names, *linked] if not name.startswith(".") and name != MARK):
            (read if _suffix(path) and path.is_file() else others).append(path)
    return sorted(read), sorted(others)


_NAMED = 5  # files that the note on what is not read names


@functools.cache
def _tell_others(folder: str, others: tuple[Path, ...], count: int) -> None:
    """Say on stderr, once, which files of a folder are not read."""
    kinds = Counter(path.suffix.lower() or "no suffix" for path in others)
    said = ", ".join(f"{number} {kind}" for kind, number in kinds.most_common())
    names = ", ".join(str(path.relative_to(folder)) for path in others[:_NAMED])
    more = ", ..." if len(others) > _NAMED else ""
    print(
        f"note: dataset {folder}: {len(others)} of {len(others) + count} files are not read ({said}): {names}{more}",
        file=sys.stderr,
    )


@contextmanager
def _opened(path: Path) -> Iterator[BinaryIO]:
    """Open a file's bytes, decompressed bit by bit if its name ends in `ZSTD`.

    Raises:
        ConfigError: pyarrow is missing, or the compressed file is truncated or something else.
    """
    if path.suffix.lower() != ZSTD:
        with path.open("rb") as file:
            yield file
        return
    pyarrow = _import_pyarrow(path)
    try:
        with io.BufferedReader(pyarrow.input_stream(str(path), compression="zstd")) as file:
            yield file
    except OSError as error:
        raise ConfigError(f"dataset {path} is not a whole zstd file: {str(error).splitlines()[0]}") from None


def _read_text(path: Path) -> str:
    with _opened(path) as file:
        data = file.read()
    try:
        return data.decode("utf-8-sig")  # a byte-order mark is no text
    except UnicodeDecodeError as error:
        raise ConfigError(f"dataset {path} is not UTF-8 text (byte {error.start})") from None


def read_json_lines(source: str) -> Iterator[tuple[Any, str]]:
    """Yield the records of a file of JSON lines, each with its place, "FILE line 3". It may be compressed (.zst).

    Raises:
        ConfigError: a line that is not JSON.
    """
    with _opened(Path(source)) as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            place = f"{source} line {number}"
            try:
                record = json.loads(line)
            except ValueError as error:  # not JSON, or not UTF-8
                raise ConfigError(f"dataset {place} is not JSON: {error}") from None
            yield record, place


def _read_parquet(path: Path, feature: str) -> Iterator[str]:
    pyarrow = _import_pyarrow(path)
    from pyarrow import parquet

    try:
        with parquet.ParquetFile(path) as file:
            columns = file.schema_arrow.names
            for batch in file.iter_batches(batch_size=64, columns=[feature] if feature in columns else columns):
                yield from (_text_of(record, feature, str(path)) for record in batch.to_pylist())
    except pyarrow.ArrowException as error:
        raise ConfigError(f"dataset {path} is not a whole Parquet file: {str(error).splitlines()[0]}") from None


def _import_pyarrow(path: Path) -> Any:
    try:
        import pyarrow
    except ImportError:
        raise ConfigError(f"reading {path} needs pyarrow: pip install 'scaled-rope[train]'") from None
    return pyarrow


def is_local(name: str) -> bool:
    """Whether a name means something on this disk, rather than a data set of the hub.

    It does if it exists, if it is a stand-in's, and if it can only be a path: hub names have at most two parts and no
    suffix, and A/B is a path if there is a folder A here (or A is data or out).
    """
    path = Path(name)
    if name.startswith((".", "/", "~", STANDIN)) or len(path.parts) > 2 or _suffix(path) or path.exists():
        return True
    return len(path.parts) == 2 and (path.parts[0] in ("data", "out") or path.parent.is_dir())


def check_there(name: str) -> None:
    """Raise an error for a name that means something on this disk and does not exist, instead of asking the hub for it.

    Raises:
        ConfigError: there is no such file or folder.
    """
    if is_local(name) and not name.startswith(STANDIN) and not Path(name).expanduser().exists():
        raise ConfigError(f"dataset {name} does not exist")


def read_documents(
    source: str, feature: str = "text", split: str = "train", as_json: bool = False, subset: str | None = None
) -> Iterator[str]:
    """Yield the texts of a source: a .txt, .jsonl or .parquet file, a sorted folder of such files, or a hub dataset.

    A folder is read with its sub-folders, see `files_of`; other files in it are named on stderr. Text and JSON lines
    may be compressed (.jsonl.zst). Only one text and a buffer are in memory.

    Args:
        source: local path, hub name, or standin:NAME; NAME:FOLDER for one folder of a hub dataset's repository.
        feature: the field that holds the text, where records have fields.
        split: split of a hub dataset.
        as_json: read files as JSON lines whatever their suffix.
        subset: configuration of a hub dataset.

    Raises:
        ConfigError: no such source, an unreadable record, a field that does not exist, or a subset of a local source.
    """
    check_subset(source, subset)
    if source.startswith(STANDIN):
        yield from read_documents(str(standin(source)))
        return
    path = Path(source)
    if path.is_dir():
        files, others = files_of(path)
        if not files:
            there = f"; it has {', '.join(each.name for each in others[:_NAMED])}" if others else ""
            raise ConfigError(f"dataset {source} is a folder without .txt, .jsonl or .parquet files{there}")
        if others:
            _tell_others(str(path), tuple(others), len(files))
        for file in files:
            yield from read_documents(str(file), feature, split, as_json)
    elif path.is_file():
        if as_json or _suffix(path) in (".jsonl", ".json"):
            for record, place in read_json_lines(str(path)):
                yield _text_of(record, feature, place)
        elif _suffix(path) == ".parquet":
            yield from _read_parquet(path, feature)
        else:
            yield _read_text(path)
    else:
        check_there(source)
        for record in hub_records(source, split, subset):
            yield _text_of(record, feature, f"dataset {source!r}")


def check_subset(name: str, subset: str | None) -> None:
    """Raise ConfigError for a subset of a source that is no dataset of the hub."""
    if subset is not None and is_local(name):
        raise ConfigError(f"subset {subset!r} is for hub datasets; {name!r} is none")


@dataclass(frozen=True)
class TextSource:
    """One part of a mixture: where the documents come from, and the share of them that is kept."""

    path: str
    fraction: float = 1.0

    @classmethod
    def parse(cls, text: str) -> TextSource:
        """Parse `path` or `path,fraction`.

        Raises:
            ConfigError: a fraction that is no number in (0, 1].
        """
        path, comma, share = text.rpartition(",")
        if not comma:
            return cls(text)
        try:
            fraction = float(share)
        except ValueError:
            fraction = 0.0
        if not 0.0 < fraction <= 1.0:
            raise ConfigError(f"dataset fraction {share!r} of {path!r} is not allowed; a number in (0, 1]")
        return cls(path, fraction)


def is_sampled(seed: int, source: int, document: int, fraction: float) -> bool:
    """Whether a document is in the sampled share, by a hash of its place, so order and process count do not matter."""
    if fraction >= 1.0:
        return True
    digest = hashlib.blake2b(f"{seed}/{source}/{document}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") / 2**64 < fraction
