"""The one error that users cause, and how an entry script reports it.

Knows nothing of the rest of the package.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable
from numbers import Integral, Real


class ConfigError(ValueError):
    """Input that cannot be used. The message is one line: field, value, what is allowed."""


def unknown(kind: str, name: object, known: Iterable[str]) -> ConfigError:
    """An error for a name that is not in `known`, with the nearest ones suggested."""
    # A name with a line break must not break the line.
    names = [name if name.isprintable() else repr(name) for name in sorted(map(str, known))]
    return ConfigError(f"unknown {kind} {name!r}; {suggestion(name, names)}known: {', '.join(names)}")


def suggestion(name: object, known: Iterable[str]) -> str:
    """Ask "did you mean ...? " with the names in `known` nearest to `name`; ends with a blank; "" when none is near."""
    near = difflib.get_close_matches(str(name), list(known), n=2)
    return f"did you mean {' or '.join(map(repr, near))}? " if near else ""


def first_line(error: BaseException) -> str:
    """An exception's message in one line: its first, and the next where the first only announces it; the exception's
    type where it has no message."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    return f"{lines[0]} {lines[1]}" if lines[0].endswith(":") and len(lines) > 1 else lines[0]


def type_and_line(error: BaseException) -> str:
    """An exception's type and its message in one line; the type alone where it has no message."""
    name, line = type(error).__name__, first_line(error)
    return name if line == name else f"{name}: {line}"


def is_number(value: object) -> bool:
    """Whether a value is a finite number that a float can hold; true and false are not numbers."""
    try:
        return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(float(value))
    except OverflowError:
        return False


def is_positive_whole(value: object) -> bool:
    """Whether a value is a whole number of at least 1."""
    return isinstance(value, Integral) and not isinstance(value, bool) and int(value) >= 1


def shortened(text: str, most: int = 2000) -> str:
    """A message of about `most` characters at the most; a longer one, which quotes some value, loses its middle."""
    if len(text) <= most:
        return text
    half = most // 2
    return f"{text[:half]} ... ({len(text) - 2 * half} characters left out) ... {text[-half:]}"


def check_name(path: object, what: str) -> None:
    """Raise a ConfigError for a path that is to be made and whose name would be a trap for people or programs.

    what: the field or flag that it was given with.
    """
    text = str(path)
    too_long = any(len(part.encode(errors="surrogateescape")) > 255 for part in text.split("/"))
    if not text.strip() or not text.isprintable() or too_long:
        raise ConfigError(
            f"{what} {shortened(repr(text), 80)} is not allowed; a name without line breaks and control characters,"
            f" each part of 1 to 255 bytes"
        )
