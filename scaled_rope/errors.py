"""The one error that users cause, and how an entry script reports it."""

from __future__ import annotations

import argparse
import difflib
import errno
import os
import signal
import sys
from collections.abc import Callable, Iterable
from typing import NoReturn


class ConfigError(ValueError):
    """Input that cannot be used. The message is one line: field, value, what is allowed."""


def unknown(kind: str, name: object, known: Iterable[str]) -> ConfigError:
    """An error for a name that is not in `known`, with the nearest ones suggested."""
    # A name with a line break must not break the line.
    names = [name if name.isprintable() else repr(name) for name in sorted(map(str, known))]
    near = difflib.get_close_matches(str(name), names, n=2)
    hint = f"did you mean {' or '.join(map(repr, near))}? " if near else ""
    return ConfigError(f"unknown {kind} {name!r}; {hint}known: {', '.join(names)}")


class Parser(argparse.ArgumentParser):
    """A parser for an entry script: its description is laid out as written, and a bad flag is a `ConfigError`."""

    def __init__(self, prog: str, description: str | None = None) -> None:
        layout = argparse.RawDescriptionHelpFormatter
        super().__init__(prog=prog, description=description, formatter_class=layout, allow_abbrev=False)

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message} (see {self.prog} --help)")


def run_cli(main: Callable[[], int | None]) -> int:
    """Run an entry script: bad input is one line on stderr and exit code 2, never a traceback."""
    try:
        return main() or 0
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # the reader of our output (head, less) has gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            print(f"error: no space left to write {error.filename or 'output'}", file=sys.stderr)
            return 2
        if error.filename is None:
            raise
        print(f"error: {error.filename}: {error.strerror}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; run the same command again to continue", file=sys.stderr)
        return 130
