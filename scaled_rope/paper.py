"""Measured rows beside the tables of the YaRN paper, cell by cell: reproduced, different, or not run.

The published numbers are data (`data/paper.json`), typed from the paper and, where "exact", from the released files.
"""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from scaled_rope.errors import ConfigError, unknown
from scaled_rope.results import Row

PUBLISHED = Path(__file__).resolve().parents[1] / "data" / "paper.json"
REPRODUCED, DIFFERS, NOT_RUN = "reproduced", "differs", "not run"


@dataclass(frozen=True)
class Cell:
    """One number of the paper, and ours."""

    published: float | None
    """None where the paper has no number."""
    above: bool = False
    """Whether the paper only says that the value is above `published`."""
    row: Row | None = None
    """The row that was measured."""
    measured: float | None = None
    """None: not run, or run and too large for a number."""
    status: str = NOT_RUN

    @property
    def printed(self) -> str:
        """The published number as the tables show it."""
        if self.published is None:
            return "-"
        return f">{self.published:g}" if self.above else f"{self.published:g}"

    @property
    def ours(self) -> str:
        """Our number as the tables show it; empty when there is none."""
        if self.row is None:
            return ""
        return "overflow" if self.measured is None else f"{self.measured:.4g}" if self.measured < 1e5 else "1e5+"


@dataclass(frozen=True)
class PaperTable:
    """A table of the paper with what was measured."""

    name: str
    title: str
    note: str
    tolerance: float
    columns: list[str]
    lines: list[tuple[str, list[Cell]]]

    @property
    def counts(self) -> dict[str, int]:
        """How many cells have which status; cells without a published number are left out."""
        cells = [cell for _, line in self.lines for cell in line if cell.published is not None]
        return {status: sum(cell.status == status for cell in cells) for status in (REPRODUCED, DIFFERS, NOT_RUN)}


def load_published(path: Path = PUBLISHED) -> dict[str, Any]:
    """The paper's tables as data.

    Raises:
        ConfigError: the file is missing or is not JSON.
    """
    try:
        published: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"file {str(path)!r} with the published tables cannot be read: {error}") from error
    return published


def compare(rows: Sequence[Row], tables: Sequence[str] | None = None) -> list[PaperTable]:
    """The paper's tables with the rows that measure the same thing.

    A row belongs to a cell when it has the model (by hub name, or a folder of that name), the model's own scaling, the
    protocol, the number of documents and the length. Of several, the last one counts. The text is not compared: rows
    name it.

    Args:
        tables: their numbers, "1" to "6"; default: all.

    Raises:
        ConfigError: an unknown table.
    """
    published = load_published()
    for name in tables or ():
        if name not in published["tables"]:
            raise unknown("table", name, published["tables"])
    return [
        _compare(name, table, published["tolerance"], rows)
        for name, table in published["tables"].items()
        if tables is None or name in tables
    ]


def _compare(name: str, table: Mapping[str, Any], tolerances: Mapping[str, float], rows: Sequence[Row]) -> PaperTable:
    kind = "accuracy" if table["metric"] == "passkey_context" else table["metric"]
    tolerance = float(tolerances[kind])
    candidates = [row for row in rows if row.get("metric") == table["metric"] and row.get("carried")]
    candidates = [row for row in candidates if _same_protocol(row, table.get("protocol", {}))]
    lines = []
    for line in table["rows"]:
        mine = [row for row in candidates if _same_model(row["model"], line["model"])]
        values = line.get("exact", line["values"])
        cells = [
            _cell(value, _find(table["metric"], column, mine), table["metric"], column, tolerance)
            for column, value in zip(table["columns"], values, strict=True)
        ]
        # The table shows what the paper prints; the status is decided by the exact number where there is one.
        shown = [_with_printed(cell, value) for cell, value in zip(cells, line["values"], strict=True)]
        lines.append((str(line["label"]), shown))
    columns = [str(column) for column in table["columns"]]
    return PaperTable(name, table["title"], table.get("note", ""), tolerance, columns, lines)


def _same_model(measured: str, published: str) -> bool:
    parts = Path(measured).parts
    return measured == published or (bool(parts) and parts[-1].lower() == published.rpartition("/")[2].lower())


def _same_protocol(row: Row, wanted: Mapping[str, Any]) -> bool:
    protocol = row.get("protocol", {})
    if wanted.get("name") not in (None, protocol.get("name")):
        return False
    if wanted.get("stride") != protocol.get("stride") and "stride" in wanted:
        return False
    # A truncated document is one window, so both weightings are the same number.
    if "weighting" in wanted and protocol.get("weighting", "token") != wanted["weighting"]:
        return False
    return "documents" not in wanted or row.get("data", {}).get("documents") == wanted["documents"]


def _find(metric: str, column: Any, rows: Sequence[Row]) -> Row | None:
    if metric == "benchmark":
        rows = [row for row in rows if row["protocol"].get("task") == column and row["protocol"].get("limit") is None]
    elif metric == "perplexity":
        rows = [row for row in rows if row["length"] == column]
    return rows[-1] if rows else None


def _measured(row: Row, metric: str, column: Any) -> float | None:
    if metric == "benchmark":
        value = row.get("value")
    elif metric == "passkey_context":
        value = row.get("context") if column == "passkey context" else row.get("accuracy")
        if value is not None and column != "passkey context":
            value = 100 * value
    else:
        value = row.get("perplexity")
    return None if value is None else float(value)


def _cell(value: Any, row: Row | None, metric: str, column: Any, tolerance: float) -> Cell:
    above = isinstance(value, Mapping)
    published = value["above"] if above else value
    if row is None or published is None:
        return Cell(published, above, row, None if row is None else _measured(row, metric, column))
    measured = _measured(row, metric, column)
    if column == "passkey context":
        same = measured == published
    elif above:
        same = "error" not in row and (measured is None or measured > published)
    else:
        same = measured is not None and math.isfinite(measured) and abs(measured - published) <= tolerance + 1e-9
    return Cell(published, above, row, measured, REPRODUCED if same else DIFFERS)


def _with_printed(cell: Cell, value: Any) -> Cell:
    published = value["above"] if isinstance(value, Mapping) else value
    return Cell(published, cell.above, cell.row, cell.measured, cell.status)


def to_csv(tables: Sequence[PaperTable]) -> str:
    """One line per cell: table, line, column, published, measured, status."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["table", "model", "column", "published", "measured", "status"])
    for table in tables:
        for label, cells in table.lines:
            for column, cell in zip(table.columns, cells, strict=True):
                measured = "" if cell.measured is None else repr(cell.measured)
                writer.writerow([table.name, label, column, cell.printed, measured, cell.status])
    return text.getvalue()


def read_curves(folder: str | Path) -> dict[str, dict[int, float]]:
    """Published curves from a folder of the released CSV files: model -> length (tokens) -> perplexity.

    Each file has the layout `,L1,L2,...` and a line `name,value,value,...` per model.

    Raises:
        ConfigError: no such folder, no CSV file in it, or a line that is not numbers.
    """
    files = sorted(Path(folder).glob("*.csv"))
    if not files:
        raise ConfigError(f"published={str(folder)!r}: must be a folder with the released CSV files")
    curves: dict[str, dict[int, float]] = {}
    for path in files:
        with path.open(newline="") as file:
            lines = list(csv.reader(file))
        try:
            lengths = [int(cell) for cell in lines[0][1:]]
            for line in filter(None, lines[1:]):
                values = zip(lengths, line[1:], strict=False)
                found = {length: float(cell) for length, cell in values if cell.strip()}
                curves.setdefault(line[0], {}).update({k: v for k, v in found.items() if math.isfinite(v)})
        except (ValueError, IndexError) as error:
            raise ConfigError(f"published curves {path.name}: not a table of perplexities ({error})") from None
    return curves
