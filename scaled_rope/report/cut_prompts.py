"""Prompts that were cut to fit: what a row says of them, in words."""

from __future__ import annotations

from typing import Any

from scaled_rope.errors import is_number
from scaled_rope.results import Row

CUT_MARK = "†"
"""Stands behind a number some of whose prompts were cut."""


def cut_words(*rows: Row) -> str:
    """How many of the prompts of some rows were cut, and to what; "" where none was.

    A question with four endings is four prompts. Rows that don't say how many they have are counted by questions.
    """
    cut = [row for row in rows if _cut_prompts(row)]
    if not cut:
        return ""
    count = sum(map(_cut_prompts, cut))
    asked: list[Any] = [row.get("n" if row["metric"] == "quality" else "requests") for row in rows]
    limits = {row["protocol"].get("max_tokens" if row["metric"] == "quality" else "max_length") for row in cut}
    fit = " or ".join(str(limit) for limit in sorted(filter(is_number, limits)))
    if all(map(is_number, asked)):
        some = f"{count:,} of {sum(asked):,} prompts"
    else:
        questions = sum(row.get("n") or 0 for row in rows)
        some = f"{count:,} {'prompt' if count == 1 else 'prompts'} of {questions:,} questions"
    return f"{some} {'was' if count == 1 else 'were'} cut{f' to fit {fit} tokens' if fit else ''}"


def _cut_prompts(row: Row) -> int:
    """The number of a row's prompts that were cut, as far as it says so."""
    count: Any = row.get("cut" if row["metric"] == "quality" else "truncated")
    return int(count) if is_number(count) else 0
