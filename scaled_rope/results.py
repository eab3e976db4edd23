"""Result rows: one JSON object per line, appended as results come, each with what is needed to trust and repeat it.

A row is identified by what was measured (`IDENTITY`), not by when or where, so an interrupted evaluation that is run
again computes only the missing rows. Several processes may append to one file.

Knows nothing of what is measured.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import functools
import hashlib
import importlib.metadata
import json
import os
import platform
import re
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from scaled_rope.errors import ConfigError, check_name

Row = dict[str, Any]
IDENTITY = ("metric", "model_fingerprint", "dtype", "scaling", "data", "protocol", "length")
"""Fields that say what a row measured. Two rows that agree on them report the same thing."""
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
    return _cpu_name() if kind == "cpu" else kind


def _cpu_name() -> str:
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


def check_writable(path: str | Path) -> None:
    """Raise an error for a file that cannot be written to, before hours are spent; leaves nothing behind.

    Raises:
        ConfigError: no permission, not a file, a place where no file can be made, or a name that is not allowed.
    """
    check_name(path, "file")
    path = Path(path)
    if path.exists():
        try:
            if path.is_file() or path.is_dir():  # opening a pipe would wait for its reader
                open(path, "ab").close()
        except OSError as error:
            raise ConfigError(f"file {str(path)!r} cannot be used: {error.strerror or error}") from error
        return
    parent = next(parent for parent in path.parents if parent.exists())
    try:
        # Permissions don't say it: root may do everything, and yet no file can be made in /proc.
        with tempfile.TemporaryFile(dir=parent):
            pass
    except OSError as error:
        raise ConfigError(f"file {str(path)!r} cannot be used: {parent} is no folder that can be written to") from error


def row_key(row: Mapping[str, Any]) -> str:
    """A stable hash of what the row measured: its `IDENTITY` fields."""
    identity = {field: row.get(field) for field in IDENTITY}
    return hashlib.sha256(json.dumps(identity, sort_keys=True, allow_nan=False).encode()).hexdigest()


def rows_so_far(path: str | Path) -> list[Row]:
    """Like `read_rows`, but an empty list when the file does not exist yet."""
    return read_rows(path) if Path(path).exists() else []


def finished_keys(path: str | Path) -> set[str]:
    """The `row_key` of every row in `path`; empty when the file does not exist yet."""
    return {row_key(row) for row in rows_so_far(path)}


@contextlib.contextmanager
def naming(path: Path) -> Iterator[None]:
    """Report an unusable path as bad input. A full disk keeps its own error, which entry scripts already report."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            error.filename = error.filename or str(path)
            raise
        raise ConfigError(f"file {str(path)!r} cannot be used: {error.strerror or error}") from error


def _complete(data: bytes) -> int:
    """Bytes of `data` up to and including its last newline."""
    return data.rfind(b"\n") + 1


def _is_row(line: bytes) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except ValueError:
        return False


def _begins_a_row(fragment: bytes) -> bool:
    """Whether a last line without its end can be what a killed process left of a row; nothing can, and blanks, and the
    NULs that a crash leaves."""
    return b'{"'.startswith(fragment.strip(b" \t\r\0")[:2])


def _no_rows(path: str | Path, line: int) -> ConfigError:
    return ConfigError(f"file {str(path)!r} holds no rows: its line {line} is not a JSON object")


def read_rows(path: str | Path) -> list[Row]:
    """All rows of a file. A last line that was cut off while being written is left out.

    Raises:
        ConfigError: the file cannot be read, or a line other than the last is not a JSON object, or it has no rows and
            the last is not the beginning of one.
    """
    path = Path(path)
    with naming(path):
        data = path.read_bytes()
    end = _complete(data)
    lines = data[:end].split(b"\n") + ([data[end:]] if _is_row(data[end:]) else [])
    rows: list[Row] = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        if not _is_row(line) and not rows:
            raise _no_rows(path, number)
        if not _is_row(line):
            raise ConfigError(f"file {str(path)!r}, line {number} is not a JSON object; remove that line")
        rows.append(json.loads(line))
    if not rows and not _begins_a_row(data[end:]):
        raise _no_rows(path, len(lines))
    return rows


def _heal(descriptor: int, path: Path) -> None:
    """Make the file end with a newline: add one to a complete last row, cut off an incomplete one.

    Raises:
        ConfigError: nothing in the file is a row or the beginning of one, so it is something else.
    """
    size = os.fstat(descriptor).st_size
    if size == 0 or os.pread(descriptor, 1, size - 1) == b"\n":
        return
    data = os.pread(descriptor, size, 0)
    end = _complete(data)
    if _is_row(data[end:]):
        os.write(descriptor, b"\n")
    elif not _begins_a_row(data[end:]) and not any(map(_is_row, data[:end].split(b"\n"))):
        raise _no_rows(path, data.count(b"\n") + 1)
    else:
        os.ftruncate(descriptor, end)


def append_row(path: str | Path, row: Mapping[str, Any], once: bool = False) -> bool:
    """Append one row and wait until it is on disk. Safe for several processes at once.

    once: leave it out where the file holds a row of the same `row_key`, as when another process measured the same.
        Returns whether the row was written.

    An incomplete last line, left by a process that was killed, is cut off first. When the disk fills up, nothing of
    the row remains.

    Raises:
        ConfigError: the path cannot be written to, the row holds a number that is not finite, or the file ends in an
            unfinished line and holds no rows.
        OSError: no space left.
    """
    path = Path(path)
    try:
        line = (json.dumps(dict(row), allow_nan=False) + "\n").encode()
    except ValueError as error:
        raise ConfigError(f"a row for {str(path)!r} cannot be written: {error}") from error
    with naming(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)  # released on close
            _heal(descriptor, path)
            size = os.fstat(descriptor).st_size
            if once and row_key(row) in _keys_in(descriptor, size):
                return False
            try:
                if os.write(descriptor, line) < len(line):  # a disk that fills up can take a part without an error
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
                os.fsync(descriptor)
            except OSError:
                os.ftruncate(descriptor, size)
                raise
        finally:
            os.close(descriptor)
    return True


_read_keys: dict[tuple[int, int], tuple[int, bytes, set[str]]] = {}
"""Device and inode of a file -> how far this process has read its keys, the bytes before that place, and the keys."""
_COMPARED = 4096
"""Bytes that must still be there for a file to be the one whose keys were read: rows differ by far fewer."""


def _keys_in(descriptor: int, size: int) -> set[str]:
    """The keys of the rows of a file, which ends with a newline, but for measurements that failed.

    Rows are appended by the thousand, so only what is new since the last call is read.
    """
    found = os.fstat(descriptor)
    end, before, keys = _read_keys.get((found.st_dev, found.st_ino), (0, b"", set()))
    if end > size or os.pread(descriptor, len(before), end - len(before)) != before:  # another file, or changed
        end, keys = 0, set()
    for line in os.pread(descriptor, size - end, end).split(b"\n"):
        if line.strip() and _is_row(line) and not (row := json.loads(line)).get("error"):
            keys.add(row_key(row))
    start = max(0, size - _COMPARED)
    _read_keys[found.st_dev, found.st_ino] = size, os.pread(descriptor, size - start, start), keys
    return keys


_tidied: set[str] = set()  # folders in which this process has looked for leftovers


@functools.cache
def _process_place() -> str:
    """The machine's name, and a hash of its running system and of the container that this process is in.

    Processes of which this is the same see each other by their ids. Containers may share a name, ids and a folder.
    """
    known = []
    with contextlib.suppress(OSError):  # not Linux
        known.append(Path("/proc/sys/kernel/random/boot_id").read_text())
        known.append(os.readlink("/proc/self/ns/pid"))
    return f"{platform.node()}-{hashlib.sha256(' '.join(known).encode()).hexdigest()[:8]}"


def scratch_path(path: Path, ending: str) -> Path:
    """A name beside `path` for what this process writes there until it is whole; it says which process that is.

    What processes that have ended left in that folder under such names is removed first, if they were in the same
    container, or on the same machine outside of any, since it was started. Of others nobody here can tell whether they
    are still at work.

    ending: "tmp" for files, "partial" for folders.
    """
    mark = f"{_process_place()}-"
    if (parent := os.path.abspath(path.parent)) not in _tidied:
        _tidied.add(parent)
        form = re.compile(rf"\..+\.{re.escape(mark)}(\d+)\.(tmp|partial)", re.DOTALL)
        for entry in os.scandir(parent) if os.path.isdir(parent) else ():
            found = form.fullmatch(entry.name)
            if found is not None and not _is_alive(int(found[1])):
                if entry.is_dir(follow_symlinks=False):
                    shutil.rmtree(entry.path, ignore_errors=True)
                else:
                    Path(entry.path).unlink(missing_ok=True)
    return path.with_name(f".{path.name}.{mark}{os.getpid()}.{ending}")


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except OSError:  # it is another user's
        pass
    return True


def write_atomic(path: str | Path, content: str | bytes) -> None:
    """Write a whole file so that readers see the old content or the new, never a part.

    Raises:
        ConfigError: the path cannot be written to.
        OSError: no space left; the old content stays.
    """
    path = Path(path)
    with naming(path):
        scratch = scratch_path(path, "tmp")  # same folder: a rename works within one file system
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with open(scratch, "wb") as file:
                file.write(content.encode() if isinstance(content, str) else content)
                file.flush()
                os.fsync(file.fileno())
            os.replace(scratch, path)
        finally:
            scratch.unlink(missing_ok=True)


@contextlib.contextmanager
def folder_lock(folder: Path, name: str = "--output", flag: str = "--output") -> Iterator[None]:
    """Lock a folder against other runs while this context lasts; it is created if it is missing.

    The kernel releases the lock when the process ends, for whatever reason; the file `.lock` may stay. A run that is
    refused before it has written anything leaves no folder behind.

    name: of the folder in errors; flag: the one that chooses another.

    Raises:
        ConfigError: another process holds it, or the folder cannot be written to.
    """
    path = folder / ".lock"
    new = [place for place in (folder, *folder.absolute().parents) if not place.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = path.open("a+")
    except OSError as error:
        raise ConfigError(f"{name} {folder} cannot be written to: {error.strerror or error}") from None
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in (errno.EAGAIN, errno.EACCES):
                raise ConfigError(f"{name} {folder} cannot be locked: {error.strerror or error}") from None
            file.seek(0)
            holder = " ".join(file.read().split()) or "unknown"
            raise ConfigError(
                f"{name} {folder} is being written by another run, process {holder}; choose another {flag}"
            ) from None
        file.truncate(0)
        file.write(f"{os.getpid()} on {platform.node()}\n")
        file.flush()
        try:
            yield
        except ConfigError:
            if new and folder.is_dir() and list(folder.iterdir()) == [path]:
                path.unlink()
                with contextlib.suppress(OSError):  # others write to one of them by now
                    for place in new:
                        place.rmdir()
            raise


OUT_OF_MEMORY = "out of memory"
"""The `error` field of a row whose measurement ran out of memory."""
