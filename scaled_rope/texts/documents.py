"""Read documents from files of text, JSON or Parquet, or from a hub dataset."""

from __future__ import annotations

import bz2
import functools
import gzip
import hashlib
import io
import itertools
import json
import lzma
import os
import re
import sys
import zlib
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from scaled_rope.content_hash import kept_hash, record_hash
from scaled_rope.errors import ConfigError, first_line
from scaled_rope.texts.archives import MARK
from scaled_rope.texts.corpora import STANDIN, standin
from scaled_rope.texts.hub import hub_records

# --------------------------------------------------------------------------------------------------- reading text


def has_half_a_pair(text: str) -> bool:
    """Whether a text has a lone surrogate: half of a pair of UTF-16, no character, and nothing that tokenizers read.

    JSON can express it, as "\\ud83d", and programs that cut texts within an emoji write it.
    """
    if text.isascii():
        return False
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return True
    return False


_SURROGATES = re.compile("[\ud800-\udfff]")


_CONTROL = re.compile("[\0-\x08\x0e-\x1f\x7f-\x84\x86-\x9f]")
_LOOKED_AT = 2**16  # characters of a text in which control characters are counted


def _is_binary(text: str) -> bool:
    """Whether more than half of a text's beginning is control characters, tabs and line ends not counted, or almost
    half NUL, as where UTF-16 was read as something else."""
    start = text[:_LOOKED_AT]
    return 2 * len(_CONTROL.findall(start)) > len(start) or 5 * start.count("\0") > 2 * len(start)


def _text_of(record: Any, feature: str, where: str, replace_surrogates: bool = False) -> str:
    text = record.get(feature) if isinstance(record, dict) else None
    if not isinstance(text, str):
        if not isinstance(record, dict):
            found = f"a record there is a {type(record).__name__}, not an object with fields"
        elif feature in record:
            found = f"there it is {'null' if text is None else f'a {type(text).__name__}'}"
        else:
            found = f"it has: {', '.join(sorted(map(str, record)))}"
        raise ConfigError(f"feature {feature!r} is not a text field of {where}; {found}")
    if has_half_a_pair(text):
        if not replace_surrogates:
            place = _SURROGATES.search(text)
            assert place is not None
            raise ConfigError(
                f"{where}: character {place.start()} of {feature!r} is U+{ord(place[0]):04X}, half of a surrogate pair,"
                f" which no tokenizer reads; tokenization.py --replace-surrogates puts U+FFFD in its place"
            )
        text = _SURROGATES.sub("\ufffd", text)
    return text


#: suffixes of files that are read, each of them but Parquet's also with a suffix of `COMPRESSED` behind it
_TEXT, JSON_SUFFIXES, _PARQUET = (".txt", ".md"), (".jsonl", ".ndjson", ".json"), ".parquet"
READABLE = ".txt, .md, .jsonl, .ndjson, .json or .parquet"
#: suffix of compressed files -> name of the format
COMPRESSED = {".gz": "gzip", ".xz": "xz", ".bz2": "bzip2", ".zst": "zstd"}

#: names of files that tell about the data of a folder and are none of it, without suffix, in lower case
_ABOUT = {
    "readme", "license", "licence", "copying", "notice", "citation", "changelog", "contributing", "code_of_conduct",
    "security", "authors",
}  # fmt: skip
#: metadata that `datasets` and others write beside data
_METADATA = {
    "dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json", "croissant.json", "metadata.json",
    "package.json",
}  # fmt: skip


def suffix_of(path: Path) -> str:
    """The suffix of a file's content, compressed or not, in lower case; "" if it is none that is read."""
    compressed = path.suffix.lower() in COMPRESSED
    suffix = (Path(path.stem) if compressed else path).suffix.lower()
    readable = (*_TEXT, *JSON_SUFFIXES) if compressed else (*_TEXT, *JSON_SUFFIXES, _PARQUET)
    return suffix if suffix in readable else ""


def _is_about_data(path: Path) -> bool:
    """Whether a file's name says that it tells about the data beside it: README.md, LICENSE-MIT.txt, state.json."""
    name = path.name.lower()
    return name in _METADATA or (suffix_of(path) in _TEXT and re.split("[.-]", name)[0] in _ABOUT)


def files_of(folder: str | Path) -> tuple[list[Path], list[Path]]:
    """The files of a folder and its sub-folders that are read, in order, and those that are not.

    What tells about data, such as README.md and dataset_infos.json, is not read unless it is named itself. Hidden files
    and folders, whose names begin with a dot, are neither, nor is the record that a fetched folder has of its archives.
    Links to folders are not followed.

    Raises:
        ConfigError: one of these folders cannot be read.
    """
    read: list[Path] = []
    others: list[Path] = []

    def refuse(error: OSError) -> None:
        raise ConfigError(f"dataset {folder}: folder {error.filename} cannot be read: {error.strerror or error}")

    for place, folders, names in os.walk(folder, onerror=refuse):
        folders[:] = [name for name in folders if not name.startswith(".")]
        linked = [name for name in folders if Path(place, name).is_symlink()]
        for path in (Path(place, name) for name in [*names, *linked] if not name.startswith(".") and name != MARK):
            (read if suffix_of(path) and path.is_file() and not _is_about_data(path) else others).append(path)
    return sorted(read), sorted(others)


def files_hash(source: str) -> str | None:
    """A hash of all that a local source holds and that is read: names and content of its files; None for the hub's.

    Raises:
        ConfigError: a folder of it cannot be read.
    """
    path = standin(source) if source.startswith(STANDIN) else Path(expanded(source))
    if path.is_file():
        return kept_hash(path)
    if not path.is_dir():
        return None
    return record_hash({file.relative_to(path).as_posix(): kept_hash(file) for file in files_of(path)[0]})


_NAMED = 5  # files that the note on what is not read names


def chosen_files(folder: Path, suffixes: Collection[str] | None = None, readable: str = READABLE) -> list[Path]:
    """The files of a folder to read, of those of `files_of`; the others are named on stderr, once.

    Args:
        suffixes: results of `suffix_of` to read; None: all.
        readable: their names in an error.

    Raises:
        ConfigError: there is none, a file is there beside its compressed copy, or a sub-folder cannot be read.
    """
    files, others = files_of(folder)
    if suffixes is not None:
        others = sorted([*others, *(file for file in files if suffix_of(file) not in suffixes)])
        files = [file for file in files if suffix_of(file) in suffixes]
    if not files:
        there = f"; it has {', '.join(each.name for each in others[:_NAMED])}" if others else ""
        raise ConfigError(f"dataset {folder} is a folder without {readable} files{there}")
    for file in files:
        if file.suffix.lower() in COMPRESSED and (same := file.with_suffix("")) in files:
            raise ConfigError(
                f"dataset {folder} holds {same.relative_to(folder)} and {file.relative_to(folder)}, which are one text"
                f" by their names; remove one"
            )
    if others:
        _tell_others(str(folder), tuple(others), len(files))
    return files


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


def _open_zstd(path: Path) -> BinaryIO:
    return io.BufferedReader(_import_pyarrow(path).input_stream(str(path), compression="zstd"))


class _Streams(io.RawIOBase):
    """The content of a file of compressed streams, one after another.

    What follows a stream and begins none is an error. `bz2.open` and `lzma.open` take it for the end of the file, and
    with it all streams behind one that is damaged.

    Args:
        make: makes the decompressor of one stream.
        padding: bytes that may stand between streams and after the last.
    """

    def __init__(self, path: Path, make: Callable[[], Any], padding: bytes = b"") -> None:
        self._file, self._make, self._padding = path.open("rb"), make, padding
        self._stream = make()
        self._begun = True  # whether the stream has any bytes yet; there must be one

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        found = b""
        while not found:
            given = b""
            if self._stream.eof:
                given = self._stream.unused_data
                self._stream, self._begun = self._make(), False
            if not given and self._stream.needs_input:
                given = self._file.read(io.DEFAULT_BUFFER_SIZE)
                if not given and self._begun:
                    raise EOFError("it ends within a stream")
                if not given:
                    return 0
            if not self._begun:
                given = given.lstrip(self._padding) if self._padding else given
                self._begun = bool(given)
            found = self._stream.decompress(given, len(buffer)) if self._begun else b""
        buffer[: len(found)] = found
        return len(found)

    def close(self) -> None:
        self._file.close()
        super().close()


def _open_bzip2(path: Path) -> BinaryIO:
    return io.BufferedReader(_Streams(path, bz2.BZ2Decompressor))


def _open_xz(path: Path) -> BinaryIO:
    with path.open("rb") as file:
        older = file.read(1) == b"\x5d"  # the format before xz, which zeros would be taken for as well
    form = lzma.FORMAT_ALONE if older else lzma.FORMAT_XZ
    return io.BufferedReader(_Streams(path, lambda: lzma.LZMADecompressor(form), padding=b"\0"))


_OPEN: dict[str, Callable[[Path], Any]] = {
    ".gz": gzip.open, ".xz": _open_xz, ".bz2": _open_bzip2, ".zst": _open_zstd,
}  # fmt: skip


@contextmanager
def _opened(path: Path) -> Iterator[BinaryIO]:
    """Open a file's bytes, decompressed bit by bit if its name ends in a suffix of `COMPRESSED`.

    Raises:
        ConfigError: the file cannot be read, pyarrow is missing, or a compressed file is truncated or something else.
    """
    kind = path.suffix.lower()
    try:
        with path.open("rb") if kind not in COMPRESSED else _OPEN[kind](path) as file:
            yield file
    except (OSError, EOFError, zlib.error, lzma.LZMAError) as error:
        if kind not in COMPRESSED or isinstance(error, PermissionError):
            raise ConfigError(f"dataset {path} cannot be read: {getattr(error, 'strerror', error)}") from None
        raise ConfigError(f"dataset {path} is not a whole {COMPRESSED[kind]} file: {first_line(error)}") from None


def _read_text(path: Path) -> str:
    with _opened(path) as file:
        data = file.read()
    try:
        return data.decode("utf-8-sig")  # a byte-order mark is no text
    except UnicodeDecodeError as error:
        raise ConfigError(f"dataset {path} is not UTF-8 text (byte {error.start})") from None


def read_json_lines(source: str) -> Iterator[tuple[Any, str]]:
    """Yield the records of a file of JSON lines, each with its place, "FILE line 3". It may be compressed.

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
            except (ValueError, RecursionError) as error:  # not JSON, not UTF-8, or nested too deeply
                raise ConfigError(f"dataset {place} is not JSON: {error}") from None
            yield record, place


def read_json(source: str) -> Iterator[tuple[Any, str]]:
    """Yield the records of a file of JSON in any layout, each with its place: "FILE line 3", "FILE line 3 entry 2".

    Lines are records or lists of them. A file whose first line is no JSON by itself is read as a whole: a list of
    records, or records one after another, over as many lines as they take.

    Raises:
        ConfigError: it is not JSON.
    """
    lines = read_json_lines(source)
    try:
        first = next(lines, None)
    except ConfigError as error:
        values = _read_values(source, error)
    else:
        values = lines if first is None else itertools.chain((first,), lines)
    for value, place in values:
        if isinstance(value, list):
            yield from ((record, f"{place} entry {number}") for number, record in enumerate(value, 1))
        else:
            yield value, place


def _read_values(source: str, first: ConfigError) -> Iterator[tuple[Any, str]]:
    """Yield the values of a file of JSON that goes over lines, each with its place, "FILE line 3", where it begins.

    first: the error of the first line.
    """
    text, decoder, place = _read_text(Path(source)), json.JSONDecoder(), 0
    if not text.lstrip().startswith(("{", "[")):
        raise first
    while (place := len(text) - len(text[place:].lstrip())) < len(text):
        line = f"{source} line {text.count(chr(10), 0, place) + 1}"
        try:
            value, place = decoder.raw_decode(text, place)
        except (ValueError, RecursionError) as error:
            # An error in the first two lines is more likely one of JSON lines.
            if getattr(error, "lineno", 1) <= 2:
                raise first from None
            raise ConfigError(f"dataset {source} is not JSON: {error}") from None
        yield value, line


def _read_parquet(path: Path, feature: str) -> Iterator[str]:
    pyarrow = _import_pyarrow(path)
    from pyarrow import parquet

    number = 0
    try:
        with parquet.ParquetFile(path) as file:
            columns = file.schema_arrow.names
            for batch in file.iter_batches(batch_size=64, columns=[feature] if feature in columns else columns):
                for record in batch.to_pylist():
                    number += 1
                    yield _text_of(record, feature, f"{path} row {number}")
    except (pyarrow.ArrowException, OSError) as error:
        raise ConfigError(f"dataset {path} is not a whole Parquet file: {first_line(error)}") from None
    except UnicodeDecodeError:
        raise ConfigError(f"dataset {path} after row {number} has text that is not UTF-8") from None


def _import_pyarrow(path: Path) -> Any:
    try:
        import pyarrow
    except ImportError:
        raise ConfigError(f"reading {path} needs pyarrow: pip install 'scaled-rope[train]'") from None
    return pyarrow


def expanded(name: str) -> str:
    """A name with the home folder in the place of a "~" at its beginning, which shells leave in quotes as it is."""
    return os.path.expanduser(name)


def is_local(name: str) -> bool:
    """Whether a name means something on this disk, rather than a data set of the hub.

    It does if it exists, if it is a stand-in's, and if it can only be a path: hub names have at most two parts and no
    suffix, and A/B is a path if there is a folder A here (or A is data or out).
    """
    path = Path(name)
    if name.startswith((".", "/", "~", STANDIN)) or len(path.parts) > 2 or suffix_of(path) or path.exists():
        return True
    return len(path.parts) == 2 and (path.parts[0] in ("data", "out") or path.parent.is_dir())


def check_there(name: str) -> None:
    """Raise an error for a name that means something on this disk and does not exist, instead of asking the hub for it.

    Raises:
        ConfigError: there is no such file or folder.
    """
    if is_local(name) and not name.startswith(STANDIN) and not Path(expanded(name)).exists():
        raise ConfigError(f"dataset {name} does not exist")


def read_documents(
    source: str,
    feature: str = "text",
    split: str = "train",
    as_json: bool = False,
    subset: str | None = None,
    replace_surrogates: bool = False,
) -> Iterator[str]:
    """Yield the texts of a source: a file of text, JSON or Parquet, a sorted folder of such files, or a hub dataset.

    Files are told apart by their suffix, whatever its case: .txt and .md are one text each; .jsonl, .ndjson and .json
    hold records; all of these may be compressed (.jsonl.zst, and .gz, .xz, .bz2). A folder is read with its
    sub-folders, see `files_of`; other files in it are named on stderr. Only one text and a buffer are in memory, but a
    file of JSON that is not one record per line is read as a whole. Texts that are empty or blank are left out, and
    counted on stderr, and so are those that begin with more control characters than others, which are no text.

    Args:
        source: local path, hub name, or standin:NAME; NAME:FOLDER for one folder of a hub dataset's repository.
        feature: the field that holds the text, where records have fields.
        split: split of a hub dataset.
        as_json: read files as JSON whatever their suffix.
        subset: configuration of a hub dataset.
        replace_surrogates: put U+FFFD in the place of a lone surrogate, instead of refusing it.

    Raises:
        ConfigError: no such source, an unreadable record, a field that does not exist or is no text, a lone surrogate,
            or a subset of a local source.
    """
    check_subset(source, subset)
    name = str(standin(source)) if source.startswith(STANDIN) else expanded(source)
    empty = binary = 0
    for text in _read(name, feature, split, as_json, subset, replace_surrogates):
        if not text or text.isspace():
            empty += 1
        elif _is_binary(text):
            binary += 1
        else:
            yield text
    if empty:
        print(f"note: dataset {source}: {empty} empty documents are left out", file=sys.stderr)
    if binary:
        said = f"{binary} documents are left out: most of their characters are control characters"
        print(f"note: dataset {source}: {said}", file=sys.stderr)


def _read(
    source: str, feature: str, split: str, as_json: bool, subset: str | None, replace_surrogates: bool
) -> Iterator[str]:
    """Yield the texts of a source, empty ones as well."""
    path = Path(source)
    if path.is_dir():
        for file in chosen_files(path):
            yield from _read(str(file), feature, split, as_json, None, replace_surrogates)
    elif path.is_file():
        if as_json or suffix_of(path) in JSON_SUFFIXES:
            for record, place in read_json(str(path)):
                yield _text_of(record, feature, place, replace_surrogates)
        elif suffix_of(path) == _PARQUET:
            yield from _read_parquet(path, feature)
        else:
            if not suffix_of(path):
                print(f"note: dataset {path} is read as one text; its suffix is none of {READABLE}", file=sys.stderr)
            yield _read_text(path)
    else:
        check_there(source)
        for number, record in enumerate(hub_records(source, split, subset), 1):
            yield _text_of(record, feature, f"dataset {source!r} record {number}", replace_surrogates)


def check_subset(name: str, subset: str | None) -> None:
    """Raise ConfigError for a subset of a source that is no dataset of the hub."""
    if subset is not None and is_local(name):
        raise ConfigError(f"subset {subset!r} is for hub datasets; {name!r} is none")


def _is_here(name: str) -> bool:
    """Whether a name is that of a stand-in, or of something that exists on this disk."""
    return name.startswith(STANDIN) or Path(expanded(name)).exists()


_SPLIT_WORDS = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("test", "testing"), "test"),
    **dict.fromkeys(("validation", "valid", "val", "dev"), "validation"),
}
_SPLIT_FILE = re.compile(rf"({'|'.join(_SPLIT_WORDS)})([-_.]?\d+([-_]of[-_]\d+)?)?")


def _split_of(path: Path) -> str | None:
    """The split that a file's name, or a folder's in its path, says, as hub data sets name theirs; None: none."""
    words = [path.name.lower().partition(".")[0], *(part.lower() for part in path.parts[:-1])]
    said = (_SPLIT_FILE.fullmatch(word) for word in words)
    return next((_SPLIT_WORDS[match[1]] for match in said if match), None)


def check_split(name: str, split: str | None) -> None:
    """Say on stderr, once, that a split chooses nothing in a source on this disk; None: no split was asked for.

    A folder in which `datasets` saved several splits has them. A source that is not there is left alone.

    Raises:
        ConfigError: files of a folder are named as another split is, and would be read as well.
    """
    path = Path(expanded(name))
    if split is None or not _is_here(name) or (path / "dataset_dict.json").is_file():
        return
    files = (
        [] if name.startswith(STANDIN) or not path.is_dir() else [file.relative_to(path) for file in files_of(path)[0]]
    )
    splits = {file: _split_of(file) for file in files}
    wanted = _SPLIT_WORDS.get(split.partition("[")[0], split)
    for file, of in splits.items():
        if of not in (None, wanted):
            raise ConfigError(
                f"split {split!r} does not choose among files, and {name!r} holds {file} as well; name the files"
            )
    if not splits or None in splits.values():
        _tell_split(name, split)


@functools.cache
def _tell_split(name: str, split: str) -> None:
    if int(os.environ.get("RANK", "0")) == 0:
        print(f"note: dataset {name} has no splits: all of it is read, not {split!r} alone", file=sys.stderr)


PACKED_FILE, SAVED_FILES = "meta.json", ("dataset_info.json", "dataset_dict.json")
"""Files that only the folder of a packed set has, and of what `datasets` saved: one table, or one for each split."""


def check_feature(names: Iterable[str], feature: str, as_json: bool = False, tokenized: bool = False) -> None:
    """Raise ConfigError for a field, other than the default's "text", where none of the sources has records.

    A source that is not there is left alone, since it may be one of the hub's, and so is what `datasets` saved.

    Args:
        as_json: files are read as JSON whatever their suffix.
        tokenized: the sources are tokenized sets, not text.
    """
    if feature == "text" or as_json:
        return
    names = list(names)
    for name in names:
        path = Path(expanded(name))
        is_set = tokenized or (path / PACKED_FILE).is_file()
        saved = any((path / file).is_file() for file in SAVED_FILES)
        if not _is_here(name) or (saved and not is_set):
            return
        files = files_of(path)[0] if path.is_dir() else [path]
        if not is_set and any(suffix_of(file) in (*JSON_SUFFIXES, _PARQUET) for file in files):
            return
    if names:
        raise ConfigError(
            f"feature {feature!r} is for records of JSON or Parquet; {', '.join(map(repr, names))} "
            f"{'holds' if len(names) == 1 else 'hold'} none"
        )


@dataclass(frozen=True)
class TextSource:
    """One part of a mixture: where the documents come from, and the share of them that is kept."""

    path: str
    fraction: float = 1.0

    @classmethod
    def parse(cls, text: str) -> TextSource:
        """Parse `path` or `path,fraction`; a text that is the name of a file or folder here is a path, comma or not.

        Raises:
            ConfigError: a fraction that is no number in (0, 1].
        """
        text = expanded(text)
        path, comma, share = text.rpartition(",")
        if not comma or os.path.lexists(text):
            return cls(text)
        try:
            fraction = float(share)
        except ValueError:
            fraction = 0.0
        if not 0.0 < fraction <= 1.0:
            raise ConfigError(
                f"dataset fraction {share!r} of {path!r} is not allowed; a number in (0, 1], or the name of a file or"
                f" folder as a whole"
            )
        return cls(path, fraction)


def is_sampled(seed: int, source: int, document: int, fraction: float) -> bool:
    """Whether a document is in the sampled share, by a hash of its place, so order and process count do not matter."""
    if fraction >= 1.0:
        return True
    digest = hashlib.blake2b(f"{seed}/{source}/{document}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") / 2**64 < fraction
