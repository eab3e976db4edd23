"""Hashes of the content of files, all of it, and the folder where this project keeps what it can make again."""

from __future__ import annotations

import contextlib
import json
import mmap
import os
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from scaled_rope import blake3_numpy
from scaled_rope.errors import ConfigError
from scaled_rope.files import write_atomic

try:
    from blake3 import blake3
except ImportError:  # a container to which nothing can be added
    blake3 = None  # type: ignore[assignment, misc]

_KEPT = 64 * 2**20  # bytes from which a file's hash is kept on disk
_TOLD = 10 * 2**30  # bytes from which it is said that hashing takes a while


def cache_dir() -> Path:
    """The folder for fetched texts and kept hashes: SCALED_ROPE_CACHE, or scaled-rope in the user's cache folder."""
    if own := os.environ.get("SCALED_ROPE_CACHE"):
        return Path(own)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "scaled-rope"


def _hash_of(data: bytes) -> str:
    return blake3_numpy.hexdigest(data) if blake3 is None else blake3(data).hexdigest()


def content_hash(path: Path) -> str:
    """The BLAKE3 hash of a file, read by as many threads as there are processors."""
    if path.stat().st_size == 0:
        return _hash_of(b"")  # nothing can be mapped into memory
    if blake3 is None:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
            with memoryview(mapped) as view:
                return blake3_numpy.hexdigest(view)
    return blake3(max_threads=blake3.AUTO).update_mmap(path).hexdigest()


def record_hash(record: Mapping[str, Any]) -> str:
    """The BLAKE3 hash of a record of JSON values, whatever the order of its fields."""
    return _hash_of(json.dumps(record, sort_keys=True).encode())


def kept_hash(path: Path) -> str:
    """`content_hash`, and of a large file only once for the same path, inode, size and time of change."""
    found = path.stat()
    if found.st_size < _KEPT:
        return content_hash(path)
    key = f"{path.resolve()}\n{found.st_ino} {found.st_size} {found.st_mtime_ns} {found.st_ctime_ns}"
    place = cache_dir() / "hashes" / _hash_of(key.encode())
    with contextlib.suppress(OSError):
        digest = place.read_text()
        if len(digest) == 64:
            return digest
    began = time.perf_counter()
    digest = content_hash(path)
    if found.st_size >= _TOLD:
        seconds = time.perf_counter() - began
        print(
            f"{path}: {found.st_size / 1e9:.0f} GB hashed in {seconds:.0f} s, {found.st_size / 1e9 / seconds:.1f} GB/s",
            file=sys.stderr,
        )
    with contextlib.suppress(OSError, ConfigError):  # a cache that cannot be written only costs time
        write_atomic(place, digest)
    return digest
