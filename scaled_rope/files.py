"""Files that are whole or not there, paths that can be written to, and folders that one run has for itself.

Knows nothing of what is written.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import functools
import hashlib
import os
import platform
import re
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from scaled_rope.errors import ConfigError, check_name


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
