"""Evaluators run in this process."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from scaled_rope.results import Row, read_rows


def evaluate(main: Callable[[list[str]], int], output: Path, *argv: str) -> list[Row]:
    """Run an evaluator in this process and read back its rows."""
    assert main([*argv, "--device", "cpu", "--hide-progress", "--output", str(output)]) == 0
    return read_rows(output)
