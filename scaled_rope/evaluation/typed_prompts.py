"""Prompts that are typed into a terminal or piped in, alone or appended to a file's text. Knows nothing of models."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

from scaled_rope.errors import ConfigError


def read_file(path: str) -> str:
    """The text of the input file.

    Raises:
        ConfigError: it cannot be read, or is no text.
    """
    try:
        return Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"--input-file {path!r} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"--input-file {path!r} is not UTF-8 text (byte {error.start})") from error


def typed_lines() -> Iterator[str]:
    """Yield lines from the terminal or the pipe, until they end. Ctrl-C at an empty prompt begins a new one."""
    interactive = sys.stdin.isatty()
    if interactive:
        try:
            import readline  # noqa: F401  (input() then edits lines and remembers them)
        except ImportError:
            pass
    while True:
        try:
            yield input("> " if interactive else "")
        except EOFError:
            if interactive:
                print()
            return
        except UnicodeDecodeError as error:
            raise ConfigError(f"standard input is not UTF-8 text (byte {error.start})") from error
        except KeyboardInterrupt:
            if not interactive:
                raise
            print()


def prompts(input_file: str | None, lines: Iterator[str]) -> Iterator[str]:
    """Yield whole prompts: for each line, the file's text, if any, and the line; without lines, the file once."""
    empty = True
    for line in lines:
        empty = False
        if input_file is None:
            if line.strip():
                yield line
        elif line.strip():
            yield f"{read_file(input_file).rstrip()}\n{line}"
        else:
            yield read_file(input_file)
    if empty and input_file is not None and not sys.stdin.isatty():
        yield read_file(input_file)
