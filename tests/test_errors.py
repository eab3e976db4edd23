"""Messages of exceptions in one line."""

from __future__ import annotations

from scaled_rope.errors import first_line, type_and_line


def test_a_message_that_only_announces_another_line_is_given_with_it() -> None:
    assert first_line(ValueError("no such file\nat all")) == "no such file"
    assert first_line(ValueError("Validation error for field 'x':\n\n  must be a dictionary\nmore")) == (
        "Validation error for field 'x': must be a dictionary"
    )


def test_an_exception_without_a_message_is_named() -> None:
    for empty in (KeyError(), ValueError(""), ValueError(" \n")):
        assert first_line(empty) == type_and_line(empty) == type(empty).__name__
    assert type_and_line(ValueError("\nno such file\nat all")) == "ValueError: no such file"
