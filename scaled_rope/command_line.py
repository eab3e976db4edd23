"""How an entry script reads its flags and reports bad input.

Knows nothing of what the script does.
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import os
import signal
import sys
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import NoReturn

from scaled_rope.errors import ConfigError, shortened, suggestion
from scaled_rope.versions import check_versions


def _word(value: object) -> str:
    """A value as a flag takes it; 20.0 is 20."""
    return str(int(value)) if isinstance(value, float) and value.is_integer() and abs(value) < 1e15 else str(value)


class Parser(argparse.ArgumentParser):
    """A parser for an entry script: its description is laid out as written, and a bad flag is a `ConfigError`."""

    def __init__(self, prog: str, description: str | None = None) -> None:
        layout = argparse.RawDescriptionHelpFormatter
        super().__init__(prog=prog, description=description, formatter_class=layout, allow_abbrev=False)

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message} (see {self.prog} --help)")

    def parse_args(  # type: ignore[override]
        self, args: Sequence[str] | None = None, namespace: argparse.Namespace | None = None
    ) -> argparse.Namespace:
        """Like the base class, but the error for an unknown flag names the flags nearest to it."""
        found, left = self.parse_known_args(args, namespace)
        if left:
            flag = next((word.partition("=")[0] for word in left if word.startswith("-")), "")
            self.error(f"unrecognized arguments: {' '.join(left)}; {suggestion(flag, self._flags())}".rstrip("; "))
        return found

    def _get_value(self, action: argparse.Action, text: str) -> object:
        # argparse says "invalid int value", and of any other type the name of its function.
        try:
            return super()._get_value(action, text)
        except argparse.ArgumentError as error:
            allowed = {int: "a whole number", float: "a number"}.get(action.type)  # type: ignore[call-overload]
            if allowed is not None:
                raise argparse.ArgumentError(action, f"{text!r} is not allowed; {allowed}") from None
            if isinstance(error.__context__, ConfigError):
                raise argparse.ArgumentError(action, str(error.__context__)) from None
            raise

    def repeat(self, args: argparse.Namespace) -> list[str]:
        """The words that repeat a call: the name of the program, and what differs from the defaults."""
        given: list[str] = []
        flags: list[str] = []
        for action in self._actions:
            value = getattr(args, action.dest, action.default)
            if isinstance(action, argparse._HelpAction) or action.dest == "hide_progress":
                continue
            if not action.option_strings:
                given.append(_word(value))
            elif action.required or value != action.default:
                for each in value if isinstance(value, list) else [value]:
                    flags += [action.option_strings[-1], *([] if action.nargs == 0 else [_word(each)])]
        return [*self.prog.split(), *given, *flags]

    def _flags(self) -> list[str]:
        """The flags that the help shows, those of subcommands included."""
        flags = []
        for action in self._actions:
            if isinstance(action, argparse._SubParsersAction):
                flags += [flag for sub in action.choices.values() for flag in sub._flags()]
            elif action.help != argparse.SUPPRESS:
                flags += [flag for flag in action.option_strings if flag.startswith("--")]
        return flags


def run_cli(main: Callable[[], int | None]) -> int:
    """Run an entry script: bad input is one line on stderr and exit code 2, never a traceback."""
    try:
        return main() or 0
    except ConfigError as error:
        print(f"error: {shortened(str(error))}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # the reader of our output (head, less) has gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE  # as shells report a program that died of a signal
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            print(f"error: no space left to write {error.filename or 'output'}", file=sys.stderr)
            return 2
        if error.filename is None:
            raise
        print(f"error: {error.filename}: {error.strerror}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; run the same command again to continue", file=sys.stderr)
        return 130  # 128 + SIGINT


def _end_quietly(kind: type[BaseException], error: BaseException, place: TracebackType | None) -> None:
    """`sys.excepthook` of scripts: Ctrl-C while they import is no traceback. They end as killed by SIGINT.

    Python does that too, but not always: where an import passed the interrupt on, its exit code can be 1.
    """
    if issubclass(kind, KeyboardInterrupt):
        print("interrupted; run the same command again to continue", file=sys.stderr, flush=True)
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGINT)
    else:
        sys.__excepthook__(kind, error, place)


def refuse_early(check: Callable[[], object]) -> None:
    """End the process with exit code 2 and one line if `check` raises `ConfigError`, or torch is too old; for scripts.

    A script calls this between its flags and the imports that take seconds. Of several processes that a launcher
    started on one machine, with the same flags and files, one says why.
    """

    def checked() -> None:
        check()
        check_versions("torch", "transformers")

    sys.excepthook = _end_quietly
    with contextlib.ExitStack() as stack:
        if os.environ.get("LOCAL_RANK", "0") != "0":
            stack.enter_context(contextlib.redirect_stderr(stack.enter_context(open(os.devnull, "w"))))
        code = run_cli(checked)
    if code:
        sys.exit(code)
