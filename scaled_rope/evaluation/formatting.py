"""Numbers and tables as text."""

from __future__ import annotations

from collections.abc import Sequence


def format_table(header: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """Plain text with aligned columns: the first to the left, numbers to the right."""
    widths = [max(map(len, column)) for column in zip(header, *lines, strict=True)]
    rule = ["-" * width for width in widths]
    return "\n".join(
        "  ".join([line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])]).rstrip()
        for line in [header, rule, *lines]
    )


def format_perplexity(value: float | None) -> str:
    """Format a perplexity for a table."""
    return "overflow" if value is None else f"{value:.2f}" if value < 1000 else f"{value:.3g}"
