"""Parts of Markdown pages that a script writes: what stands between two marks, which are HTML comments."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from scaled_rope.command_line import Parser
from scaled_rope.errors import ConfigError
from scaled_rope.files import write_atomic


def with_block(page: str, begin: str, end: str, text: str, name: str) -> str:
    """The page with `text` between its marks.

    Args:
        page: the whole page.
        begin, end: the marks, the line breaks after them included where they have one.
        name: the page, in the error.

    Raises:
        ConfigError: the page lacks the marks.
    """
    before, found, rest = page.partition(begin)
    _, ended, after = rest.partition(end)
    if not (found and ended):
        raise ConfigError(f"page {name} has no place for this: {begin.strip()} and {end.strip()}")
    return f"{before}{begin}{text}{end}{after}"


def only_check(prog: str, description: str | None, argv: Sequence[str] | None = None) -> bool:
    """Whether a script that writes pages is only to compare them, by its one flag, --check.

    argv: the words after the script's name; None: those of the process.

    Raises:
        ConfigError: other words.
    """
    parser = Parser(prog, description)
    parser.add_argument("--check", action="store_true", help="write nothing; exit code 1 where a page shows other ones")
    return bool(parser.parse_args(argv).check)


def rewrite(page: Path, begin: str, end: str, text: str, rows: Path, command: str, check: bool) -> int:
    """Write a block into its page, or compare; return the exit code, 1 where the page has another one.

    rows: the file that the block is made from; command: what makes it, both for what is said then.

    Raises:
        ConfigError: as `with_block` does.
    """
    old = page.read_text(encoding="utf-8")
    new = with_block(old, begin, end, text, page.name)
    if not check:
        write_atomic(page, new)
    elif new != old:
        print(f"{page.name} shows other rows than {rows.name}; run {command}", file=sys.stderr)
        return 1
    return 0
