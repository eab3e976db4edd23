"""Texts that an earlier release of a package lacks."""

from __future__ import annotations

from pathlib import Path, PurePosixPath

import pytest

from scaled_rope.texts import recent
from tests.texts.test_corpora import tarball


def lines(word: str, count: int) -> str:
    return "".join(f"{word} number {n} stands in a line of some length\n" for n in range(count))


@pytest.fixture
def archives(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, Path]:
    monkeypatch.setattr(recent, "LEAST", 2000)
    old = {"package/docs/a/1.md": lines("old", 100), "package/README.md": "short\n"}
    new = {
        "package/docs/a/1.md": lines("old", 100),  # as it was
        "package/docs/a/2.mdx": lines("old", 20).replace(" ", "  ") + lines("new", 100),  # a sixth is old
        "package/docs/b/2.md": lines("second", 50),
        "package/docs/b/1.md": lines("first", 30) + lines("old", 2),
        "package/docs/b/3.txt": lines("no documentation", 100),
        "package/docs/c/1.md": lines("skipped", 100),
        "package/docs/d.md": lines("brief", 10),
        "package/docs/e.md": lines("alone", 60),
        "package/docs/f.md": "# Title\n" * 1000,  # nothing that counts
        "package/other/a.md": lines("elsewhere", 100),
    }
    return tarball(tmp_path / "new.tgz", new), tarball(tmp_path / "old.tgz", old)


def test_new_files_of_a_section_are_a_document(archives: tuple[Path, Path]) -> None:
    found = dict(recent.new_documents(*archives, "docs", without=("c",)))
    assert list(found) == ["b", "e"]
    assert found["b"].startswith("first number 0") and found["b"].index("second number 0") > found["b"].index("old")
    assert found["e"] == lines("alone", 60)


def test_an_archive_without_documentation_shows_nothing(archives: tuple[Path, Path], tmp_path: Path) -> None:
    bare = tarball(tmp_path / "bare.tgz", {"package/index.js": lines("code", 9)})
    with pytest.raises(ValueError, match="no documentation to compare with"):
        list(recent.new_documents(archives[0], bare, "docs"))


def test_the_share_that_is_new() -> None:
    known = {" ".join(line.split()) for line in lines("old", 5).splitlines()}
    assert recent.share_new(lines("old", 5), known) == 0
    assert recent.share_new(lines("old", 5) + lines("new", 5), known) == pytest.approx(0.5)
    assert recent.share_new("brief\n", known) == 0


def test_release_notes(archives: tuple[Path, Path]) -> None:
    assert list(recent.release_notes(archives[0], "docs/e.md")) == [("e", lines("alone", 60))]
    assert PurePosixPath("README.md") in recent.texts_of(archives[1])
