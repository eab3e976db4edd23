"""Which cases a test takes where all combinations would be many that say the same."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

Row = TypeVar("Row")
Column = TypeVar("Column")


def in_turn(rows: Sequence[Row], columns: Sequence[Column], each: int) -> list[tuple[Row, Column]]:
    """Pairs in which each row has `each` columns, in rotation: all rows and columns come in, columns equally often."""
    return [(row, columns[(index + k) % len(columns)]) for index, row in enumerate(rows) for k in range(each)]
