"""Result rows: one JSON object per line, appended as results come, each with what is needed to trust and repeat it.

A row is identified by what was measured (`IDENTITY`), not by when or where, so an interrupted evaluation that is run
again computes only the missing rows. Several processes may append to one file.

Knows nothing of what is measured.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from scaled_rope.errors import ConfigError
from scaled_rope.files import naming

Row = dict[str, Any]
IDENTITY = ("metric", "model_fingerprint", "dtype", "scaling", "data", "protocol", "length")
"""Fields that say what a row measured. Two rows that agree on them report the same thing."""


def row_key(row: Mapping[str, Any]) -> str:
    """A stable hash of what the row measured: its `IDENTITY` fields."""
    identity = {field: row.get(field) for field in IDENTITY}
    return hashlib.sha256(json.dumps(identity, sort_keys=True, allow_nan=False).encode()).hexdigest()


def rows_so_far(path: str | Path) -> list[Row]:
    """Like `read_rows`, but an empty list when the file does not exist yet."""
    return read_rows(path) if Path(path).exists() else []


def finished_keys(path: str | Path) -> set[str]:
    """The `row_key` of every row in `path`; empty when the file does not exist yet."""
    return {row_key(row) for row in rows_so_far(path)}


def _complete(data: bytes) -> int:
    """Bytes of `data` up to and including its last newline."""
    return data.rfind(b"\n") + 1


def _is_row(line: bytes) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except ValueError:
        return False


def _begins_a_row(fragment: bytes) -> bool:
    """Whether a last line without its end can be what a killed process left of a row; nothing can, and blanks, and the
    NULs that a crash leaves."""
    return b'{"'.startswith(fragment.strip(b" \t\r\0")[:2])


def _no_rows(path: str | Path, line: int) -> ConfigError:
    return ConfigError(f"file {str(path)!r} holds no rows: its line {line} is not a JSON object")


def read_rows(path: str | Path) -> list[Row]:
    """All rows of a file. A last line that was cut off while being written is left out.

    Raises:
        ConfigError: the file cannot be read, or a line other than the last is not a JSON object, or it has no rows and
            the last is not the beginning of one.
    """
    path = Path(path)
    with naming(path):
        data = path.read_bytes()
    end = _complete(data)
    lines = data[:end].split(b"\n") + ([data[end:]] if _is_row(data[end:]) else [])
    rows: list[Row] = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        if not _is_row(line) and not rows:
            raise _no_rows(path, number)
        if not _is_row(line):
            raise ConfigError(f"file {str(path)!r}, line {number} is not a JSON object; remove that line")
        rows.append(json.loads(line))
    if not rows and not _begins_a_row(data[end:]):
        raise _no_rows(path, len(lines))
    return rows


def _heal(descriptor: int, path: Path) -> None:
    """Make the file end with a newline: add one to a complete last row, cut off an incomplete one.

    Raises:
        ConfigError: nothing in the file is a row or the beginning of one, so it is something else.
    """
    size = os.fstat(descriptor).st_size
    if size == 0 or os.pread(descriptor, 1, size - 1) == b"\n":
        return
    data = os.pread(descriptor, size, 0)
    end = _complete(data)
    if _is_row(data[end:]):
        os.write(descriptor, b"\n")
    elif not _begins_a_row(data[end:]) and not any(map(_is_row, data[:end].split(b"\n"))):
        raise _no_rows(path, data.count(b"\n") + 1)
    else:
        os.ftruncate(descriptor, end)


def append_row(path: str | Path, row: Mapping[str, Any], once: bool = False) -> bool:
    """Append one row and wait until it is on disk. Safe for several processes at once.

    once: leave it out where the file holds a row of the same `row_key`, as when another process measured the same.
        Returns whether the row was written.

    An incomplete last line, left by a process that was killed, is cut off first. When the disk fills up, nothing of
    the row remains.

    Raises:
        ConfigError: the path cannot be written to, the row holds a number that is not finite, or the file ends in an
            unfinished line and holds no rows.
        OSError: no space left.
    """
    path = Path(path)
    try:
        line = (json.dumps(dict(row), allow_nan=False) + "\n").encode()
    except ValueError as error:
        raise ConfigError(f"a row for {str(path)!r} cannot be written: {error}") from error
    with naming(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)  # released on close
            _heal(descriptor, path)
            size = os.fstat(descriptor).st_size
            if once and row_key(row) in _keys_in(descriptor, size):
                return False
            try:
                if os.write(descriptor, line) < len(line):  # a disk that fills up can take a part without an error
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
                os.fsync(descriptor)
            except OSError:
                os.ftruncate(descriptor, size)
                raise
        finally:
            os.close(descriptor)
    return True


_read_keys: dict[tuple[int, int], tuple[int, bytes, set[str]]] = {}
"""Device and inode of a file -> how far this process has read its keys, the bytes before that place, and the keys."""
_COMPARED = 4096
"""Bytes that must still be there for a file to be the one whose keys were read: rows differ by far fewer."""


def _keys_in(descriptor: int, size: int) -> set[str]:
    """The keys of the rows of a file, which ends with a newline, but for measurements that failed.

    Rows are appended by the thousand, so only what is new since the last call is read.
    """
    found = os.fstat(descriptor)
    end, before, keys = _read_keys.get((found.st_dev, found.st_ino), (0, b"", set()))
    if end > size or os.pread(descriptor, len(before), end - len(before)) != before:  # another file, or changed
        end, keys = 0, set()
    for line in os.pread(descriptor, size - end, end).split(b"\n"):
        if line.strip() and _is_row(line) and not (row := json.loads(line)).get("error"):
            keys.add(row_key(row))
    start = max(0, size - _COMPARED)
    _read_keys[found.st_dev, found.st_ino] = size, os.pread(descriptor, size - start, start), keys
    return keys


OUT_OF_MEMORY = "out of memory"
"""The `error` field of a row whose measurement ran out of memory."""
