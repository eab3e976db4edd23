"""Hashes of whole files, kept for large ones until the file changes."""

from __future__ import annotations

import os
import random
from pathlib import Path

import pytest
from blake3 import blake3

from scaled_rope import blake3_numpy, content_hash
from scaled_rope.checkpoint import weights_hash


def test_the_hash_of_a_file(tmp_path: Path) -> None:
    for size in (0, 1, 5000):
        (tmp_path / "file").write_bytes(bytes(range(250)) * size)
        assert content_hash.content_hash(tmp_path / "file") == blake3(bytes(range(250)) * size).hexdigest()


@pytest.mark.parametrize("size", [0, 1, 64, 65, 1023, 1024, 1025, 2049, 3 * 1024, 31 * 1024 + 5, 2**16 + 1])
def test_without_the_package_hashes_are_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    """One block, one chunk, trees of every shape, and several subtrees, of which the last is whole or not."""
    monkeypatch.setattr(content_hash, "blake3", None)
    monkeypatch.setattr(blake3_numpy, "_TOGETHER", 4)
    data = random.Random(size).randbytes(size)
    (tmp_path / "file").write_bytes(data)
    assert content_hash.content_hash(tmp_path / "file") == blake3(data).hexdigest()
    assert content_hash.record_hash({"b": size, "a": 1}) == blake3(f'{{"a": 1, "b": {size}}}'.encode()).hexdigest()


def test_every_byte_of_a_checkpoint_counts(tmp_path: Path) -> None:
    """Between the pieces that were looked at once, 95,000 bytes could change unseen."""
    path = tmp_path / "model.safetensors"
    path.write_bytes(bytes(12_000_000))
    before = weights_hash(tmp_path)
    with path.open("r+b") as file:
        file.seek(100_000)
        file.write(b"\x01")
    assert weights_hash(tmp_path) != before


@pytest.mark.parametrize("part", ["", "train"])
def test_the_rows_of_a_saved_table_count(tmp_path: Path, part: str) -> None:
    datasets = pytest.importorskip("datasets")

    def saved(rows: list[list[int]]) -> str:
        table = datasets.Dataset.from_dict({"input_ids": rows})
        if part:
            table = datasets.DatasetDict({part: table})
        table.save_to_disk(tmp_path / "table")
        return weights_hash(tmp_path / "table")

    first, other = saved([[1, 2, 3]]), saved([[1, 2, 4]])
    assert first != other
    (tmp_path / "table" / part / "cache-0123456789abcdef.arrow").write_bytes(b"what map() keeps")
    assert weights_hash(tmp_path / "table") == other


def test_a_large_files_hash_is_kept_until_it_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SCALED_ROPE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(content_hash, "_KEPT", 1000)
    path = tmp_path / "large"
    path.write_bytes(bytes(2000))
    first = content_hash.kept_hash(path)
    assert first == content_hash.content_hash(path)
    with monkeypatch.context() as patch:
        patch.setattr(content_hash, "content_hash", lambda path: pytest.fail("it was to be kept"))
        assert content_hash.kept_hash(path) == first
    time = path.stat().st_mtime_ns
    path.write_bytes(b"\x01" + bytes(1999))
    os.utime(path, ns=(time, time))  # the time of the last change of its record still tells
    assert content_hash.kept_hash(path) == content_hash.content_hash(path) != first
    (kept, *_) = (tmp_path / "cache" / "hashes").iterdir()
    for file in (tmp_path / "cache" / "hashes").iterdir():
        file.write_text("half")
    assert content_hash.kept_hash(path) == content_hash.content_hash(path)
    monkeypatch.setenv("SCALED_ROPE_CACHE", str(path))  # a file, where nothing can be kept
    assert content_hash.kept_hash(path) == content_hash.content_hash(path)
    assert kept.name


def test_cache_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "/x")
    monkeypatch.delenv("SCALED_ROPE_CACHE", raising=False)
    assert content_hash.cache_dir() == Path("/x/scaled-rope")
    monkeypatch.setenv("SCALED_ROPE_CACHE", "/y")
    assert content_hash.cache_dir() == Path("/y")
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.delenv("SCALED_ROPE_CACHE")
    monkeypatch.setenv("HOME", "/home/one")
    assert content_hash.cache_dir() == Path("/home/one/.cache/scaled-rope")
