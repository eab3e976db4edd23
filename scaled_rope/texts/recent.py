"""Long documents that are younger than most models: documentation and release notes that an earlier release lacks.

A model that has read a text in training predicts it better, far context or not. That these texts are young does not
rest on dates: each line is compared with an earlier release of the same package, and files that it had are left out.
"""

from __future__ import annotations

import tarfile
from collections.abc import Collection, Iterator
from pathlib import Path, PurePosixPath

SHORT = 30
"""Lines of fewer characters are no evidence: headings and code that everybody writes."""
NEW = 0.9
"""The least share of a file's characters, in lines that count, that the earlier release must lack."""
LEAST = 20_000
"""Characters of the shortest document, about 5,000 tokens."""
_SUFFIXES = (".md", ".mdx", ".rst")


def texts_of(archive: Path, folder: str = "") -> dict[PurePosixPath, str]:
    """The documentation files of a package archive (.tgz or .tar.gz) by their place in it, in order.

    folder: only those in this folder of the package.
    """
    found: dict[PurePosixPath, str] = {}
    with tarfile.open(archive) as members:
        for member in members:
            inner = PurePosixPath(*PurePosixPath(member.name).parts[1:])  # without the archive's outermost folder
            if not member.isfile() or inner.suffix not in _SUFFIXES or not inner.is_relative_to(folder):
                continue
            file = members.extractfile(member)
            assert file is not None  # a file
            found[inner] = file.read().decode("utf-8", errors="replace").replace("\r\n", "\n")
    return dict(sorted(found.items()))


def _lines(text: str) -> list[str]:
    """The lines that count as evidence, without differences in blanks."""
    return [line for line in (" ".join(line.split()) for line in text.splitlines()) if len(line) >= SHORT]


def share_new(text: str, known: set[str]) -> float:
    """The share of a text's characters in lines that are not `known`; 0 for a text without such lines."""
    lines = _lines(text)
    total = sum(map(len, lines))
    return sum(len(line) for line in lines if line not in known) / total if total else 0.0


def new_documents(newer: Path, earlier: Path, folder: str, without: Collection[str] = ()) -> Iterator[tuple[str, str]]:
    """Yield title and text of long documents that a release has and an earlier one lacks.

    The files of each section (a folder within `folder`) that are new are one document, in the order of their names.

    Args:
        newer, earlier: archives of two releases.
        folder: the folder of the package with its documentation.
        without: sections to leave out.
    """
    known = {line for text in texts_of(earlier).values() for line in _lines(text)}
    if not known:
        raise ValueError(f"{earlier.name} has no documentation to compare with")
    sections: dict[str, list[str]] = {}
    for path, text in texts_of(newer, folder).items():
        if share_new(text, known) >= NEW:
            section = path.relative_to(folder).parts[0]
            if section not in without:
                sections.setdefault(section, []).append(text.strip())
    for section, texts in sections.items():
        document = "\n\n".join(texts) + "\n"
        if len(document) >= LEAST:
            yield PurePosixPath(section).stem, document


def release_notes(archive: Path, file: str) -> Iterator[tuple[str, str]]:
    """Yield title and text of one file of a package."""
    yield PurePosixPath(file).stem.lower(), texts_of(archive)[PurePosixPath(file)]
