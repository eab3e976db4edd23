"""Files: whole or not there, places that can be written to, and folders of one run."""

from __future__ import annotations

import os
import platform
from pathlib import Path

import pytest

from scaled_rope import files
from scaled_rope.errors import ConfigError, check_name
from scaled_rope.files import check_writable, folder_lock, write_atomic


def test_a_refused_run_leaves_no_folder(tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    for name in ("there/a/b/c", "there"):
        with pytest.raises(ConfigError, match="refused"), folder_lock(tmp_path / name):
            raise ConfigError("refused")
    assert [path.name for path in tmp_path.rglob("*") if path.is_dir()] == ["there"]


def test_write_atomic_replaces_or_leaves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "sub" / "table.csv"
    write_atomic(path, "old")
    write_atomic(path, b"new")
    assert path.read_text() == "new"

    def fail(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files.os, "fsync", fail)
    with pytest.raises(OSError, match="No space left"):
        write_atomic(path, "newest")
    assert path.read_text() == "new"
    assert os.listdir(path.parent) == ["table.csv"]


def test_a_place_where_no_file_can_be_made_is_told_from_one_where_it_can(tmp_path: Path) -> None:
    there = tmp_path / "rows.jsonl"
    there.write_text("{}\n")
    for path in (there, tmp_path / "new.jsonl", tmp_path / "new" / "folder" / "rows.jsonl", "/dev/null"):
        check_writable(path)
    assert [path.name for path in tmp_path.iterdir()] == ["rows.jsonl"] and there.read_text() == "{}\n"
    with pytest.raises(ConfigError, match="rows.jsonl is no folder that can be written to"):
        check_writable(there / "x.jsonl")
    with pytest.raises(ConfigError, match="cannot be used: Is a directory"):
        check_writable(tmp_path)
    if Path("/proc/self").exists():  # all may write there, by its permissions, if root asks
        with pytest.raises(ConfigError, match="/proc is no folder that can be written to"):
            check_writable("/proc/rows.jsonl")


@pytest.mark.parametrize("name", ["", " ", "a\nb", "a\x1b[2Jb", "x" * 300, "out/" + "é" * 150])
def test_names_that_would_be_traps_are_refused(name: str) -> None:
    with pytest.raises(ConfigError, match="--output .* is not allowed; a name without line breaks") as raised:
        check_name(name, "--output")
    assert str(raised.value).isprintable() and len(str(raised.value)) < 300
    for good in ("out/my runs/rows.jsonl", "Ergebnisse/größer.jsonl", "x" * 255, "/tmp/a//b"):
        check_name(good, "--output")


def test_what_dead_processes_left_is_removed_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "_tidied", set())
    node, dead = files._process_place(), 2**22 + 5  # beyond the largest process id
    other = f".set.{platform.node()}-0123abcd-{dead}.partial"  # of a container whose name is the same
    (tmp_path / other).mkdir()
    for name in (f".a.json.{node}-{dead}.tmp", f".a.json.{node}-{os.getppid()}.tmp", f".a.json.other-{dead}.tmp", "b"):
        (tmp_path / name).write_text("x")
    (tmp_path / f".set.{node}-{dead}.partial").mkdir()
    (tmp_path / f".set.{node}-{dead}.partial" / "tokens.bin").write_text("x")
    write_atomic(tmp_path / "a.json", "whole")
    left = {f".a.json.{node}-{os.getppid()}.tmp", f".a.json.other-{dead}.tmp", "a.json", "b", other}
    assert {path.name for path in tmp_path.iterdir()} == left
