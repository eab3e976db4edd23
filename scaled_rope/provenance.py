"""Where a result comes from: code, versions, machine, time and arguments, in a form that other machines can read.

Knows nothing of what is measured.
"""

from __future__ import annotations

import functools
import importlib.metadata
import json
import os
import platform
import shlex
import subprocess
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

_ROOT = Path(__file__).resolve().parents[1]
_PACKAGES = ("scaled-rope", "torch", "transformers", "tokenizers", "numpy")


def _git(*arguments: str) -> str | None:
    """Output of a git command in the folder of this file, or None when git, a repository or a commit is missing."""
    try:
        done = subprocess.run(
            ["git", "-C", str(Path(__file__).parent), *arguments], capture_output=True, text=True, timeout=30
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


@functools.cache
def _commit() -> str | None:
    """The commit of this package's source, with "-dirty" appended when tracked files differ from it.

    Outside its repository, the value of the environment variable SCALED_ROPE_COMMIT if it is set; else None.
    """
    # An installed copy may lie inside somebody else's repository: only a file that git tracks has a commit.
    if _git("ls-files", "--error-unmatch", Path(__file__).name) is None or (head := _git("rev-parse", "HEAD")) is None:
        return os.environ.get("SCALED_ROPE_COMMIT")
    return head + ("-dirty" if _git("status", "--porcelain", "--untracked-files=no") else "")


def package_version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _device_name(device: object) -> str:
    kind = str(device).split(":")[0]
    if kind == "cuda":
        import torch

        return torch.cuda.get_device_name(str(device))
    return cpu_name() if kind == "cpu" else kind


def cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:  # not Linux
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def portable(text: str, parts: int = 1) -> str:
    """Return a path in the form that rows record, which other machines can read too.

    An absolute path becomes relative to this repository or, outside of it, is cut to its last `parts` names. Relative
    paths and text that is no path are returned unchanged.
    """
    path = Path(text)
    if not path.is_absolute():
        return text
    return str(path.relative_to(_ROOT)) if path.is_relative_to(_ROOT) else "/".join(path.parts[1:][-parts:])


def portable_model(name: str) -> str:
    """Return a model's name or folder in the form that rows record.

    A folder outside this repository keeps its last two names, since the last may be "model" or a step's number.
    """
    return portable(name, parts=2)


def portable_command(words: Iterable[str]) -> str:
    """Return a command line in the form that rows record, with `portable` paths."""
    flags = (word.partition("=") for word in words)
    return shlex.join(
        f"{flag}={portable(value)}" if equals and flag.startswith("--") else portable(flag + equals + value)
        for flag, equals, value in flags
    )


_FOLDERS = ("model", "adapter", "evaluator", "dataset")
"""Arguments that are often folders of one name, of which rows keep two."""


def _portable_values(value: Any, parts: int = 1) -> Any:
    if isinstance(value, Mapping):
        return {name: _portable_values(entry, 2 if name in _FOLDERS else 1) for name, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_portable_values(entry, parts) for entry in value]
    return portable(str(value), parts) if isinstance(value, (str, Path)) else value


def provenance(device: object, seed: int | None, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Where a result came from: code, versions, machine, time and arguments.

    Args:
        device: the torch device (or its name) that computed.
        seed: the seed of whatever was drawn, None when nothing was.
        arguments: the command-line arguments; values that JSON cannot hold become text, paths as `portable` says.
    """
    return {
        "commit": _commit(),
        "versions": {"python": platform.python_version(), **{name: package_version(name) for name in _PACKAGES}},
        "device": _device_name(device),
        "cpu_count": os.cpu_count(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "seed": seed,
        "arguments": json.loads(json.dumps(_portable_values(arguments), default=str)),
    }
