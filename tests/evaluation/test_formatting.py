"""Tables and numbers as text."""

from __future__ import annotations

from scaled_rope.evaluation.formatting import format_perplexity, format_table


def test_columns_are_as_wide_as_their_widest_cell() -> None:
    lines = format_table(["", "256", "512"], [["yarn x8", "72.70", "9.1"], ["unscaled", "1", "10000"]]).splitlines()
    assert len({len(line.rstrip()) for line in lines[:1]}) == 1 and len(lines) == 4
    assert lines[2].split() == ["yarn", "x8", "72.70", "9.1"] and lines[3].split() == ["unscaled", "1", "10000"]
    # Numbers end in the same column.
    assert lines[2].rindex("9.1") + 3 == lines[3].rindex("10000") + 5


def test_perplexity_of_any_size_is_short() -> None:
    assert all(len(format_perplexity(value)) <= 9 for value in (1.0, 72.7123, 999.99, 123456.0, 3e12))
