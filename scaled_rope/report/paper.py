"""Measured rows beside the tables and figures of the YaRN paper: reproduced, different, or not run.

The published numbers are data (`data/paper.json`), typed from the paper and, where "exact", from the released files.
So are the protocols, from which

    python -m scaled_rope.report.paper table2 --shell

makes what eval.sh runs: the evaluator, its flags, and the models.
"""

from __future__ import annotations

import csv
import json
import math
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from scaled_rope.bundled import bundled
from scaled_rope.command_line import Parser, run_cli
from scaled_rope.errors import ConfigError, unknown
from scaled_rope.evaluation.formatting import format_table
from scaled_rope.evaluation.paper_benchmarks import PAPER
from scaled_rope.report.cut_prompts import cut_words
from scaled_rope.report.loading import Loading
from scaled_rope.results import OUT_OF_MEMORY, Row
from scaled_rope.scaling.record import RopeScaling

PUBLISHED = bundled("data/paper.json")
REPRODUCED, DIFFERS, NOT_RUN = "reproduced", "differs", "not run"
SIGNS = {REPRODUCED: "=", DIFFERS: "!", NOT_RUN: "."}
"""One character for each status, so that color alone never says it."""


@dataclass(frozen=True)
class PaperCell:
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
    digits: int = 0
    """The least number of decimals that the paper prints."""

    @property
    def printed(self) -> str:
        """The published number as the paper shows it."""
        if self.published is None:
            return "-"
        shortest = f"{self.published:.7g}"
        if self.above or len(shortest.partition(".")[2]) >= self.digits:
            return f">{shortest}" if self.above else shortest
        return f"{self.published:.{self.digits}f}"

    @property
    def ours(self) -> str:
        """Our number as the tables show it; empty when there is none."""
        if self.row is None:
            return ""
        if self.row.get("error"):
            return "OOM" if self.row["error"] == OUT_OF_MEMORY else str(self.row["error"])
        if self.measured is None:
            return "none" if self.row["metric"] == "passkey_context" else "overflow"
        return f"{self.measured:.4g}" if self.measured < 1e4 else f"{self.measured:.6g}"


@dataclass(frozen=True)
class PaperTable:
    """A table of the paper, or the numbers of a figure, with what was measured."""

    name: str
    title: str
    note: str
    tolerance: float
    columns: list[str]
    lines: list[tuple[str, list[PaperCell]]]

    @property
    def heading(self) -> str:
        """ "Table 2", "Figure 5"."""
        return self.name.capitalize().replace("Figure", "Figure ") if self.name[0] == "f" else f"Table {self.name}"

    @property
    def counts(self) -> dict[str, int]:
        """Status -> the number of cells that have it; cells without a published number are left out."""
        return _count([cell for _, line in self.lines for cell in line])

    @property
    def measured(self) -> bool:
        """Whether any cell has a measured row."""
        return any(cell.row for _, cells in self.lines for cell in cells)

    @staticmethod
    def verdict(cells: Sequence[PaperCell]) -> tuple[str, str]:
        """A line's status, and the status with counts where they differ: ("differs", "2 of 5 differ")."""
        counts = _count(cells)
        total, run = sum(counts.values()), counts[REPRODUCED] + counts[DIFFERS]
        if not run:
            return NOT_RUN, NOT_RUN
        if counts[DIFFERS]:
            return DIFFERS, DIFFERS if counts[DIFFERS] == total else f"{counts[DIFFERS]} of {run} differ"
        return REPRODUCED, REPRODUCED if run == total else f"reproduced, {run} of {total} run"

    def text(self) -> str:
        """The table for a terminal: "published ours=" in each cell."""
        lines = [
            [label, *(f"{c.printed} {c.ours}{SIGNS[c.status]}" for c in cells), self.verdict(cells)[1]]
            for label, cells in self.lines
        ]
        counts = ", ".join(f"{count} {status}" for status, count in self.counts.items())
        note = f"{self.note}\n" if self.note else ""
        table = format_table(["", *self.columns, "status"], lines)
        return f"{self.heading}. {self.title}\n{note}{table}\n{counts}; tolerance {self.tolerance:g}"


def _count(cells: Sequence[PaperCell]) -> dict[str, int]:
    compared = [cell for cell in cells if cell.published is not None]
    return {status: sum(cell.status == status for cell in compared) for status in SIGNS}


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


def _numbers(published: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The tables "1" to "6", and "figure5", the only figure with numbers that no table has."""
    tables: dict[str, dict[str, Any]] = published["tables"]
    return tables | {f"figure{n}": f for n, f in published["figures"].items() if "table" not in f}


def compare(rows: Sequence[Row], tables: Sequence[str] | None = None) -> list[PaperTable]:
    """The paper's tables, filled in with the rows that measure the same thing.

    A row belongs to a cell when it has the model (by hub name, or a folder of that name), the model's own scaling (or
    the one that the table names), the data set by name, the protocol, the number of documents and the length. Of
    several, the last one counts, but none with an adapter, fewer bits, another window or other layers beside one
    without.

    Args:
        tables: "1" to "6" and "figure5"; default: all.

    Raises:
        ConfigError: an unknown table.
    """
    published = load_published()
    known = _numbers(published)
    for name in tables or ():
        if name not in known:
            raise unknown("table", name, known)
    return [
        _compare(name, table, published["tolerance"], rows)
        for name, table in known.items()
        if tables is None or name in tables
    ]


def _compare(name: str, table: Mapping[str, Any], tolerances: Mapping[str, float], rows: Sequence[Row]) -> PaperTable:
    kind = "accuracy" if table["metric"] == "passkey_context" else table["metric"]
    tolerance = float(tolerances[kind])
    lines = []
    for line in table["rows"]:
        mine = _rows_of(line, table, rows)
        values = line.get("exact", line["values"])
        cells = [
            _cell(value, _find(table["metric"], column, mine), table["metric"], column, tolerance)
            for column, value in zip(table["columns"], values, strict=True)
        ]
        # The table shows what the paper prints; the status is decided by the exact number where there is one.
        shown = [
            _with_printed(cell, value, table["metric"], column)
            for cell, value, column in zip(cells, line["values"], table["columns"], strict=True)
        ]
        lines.append((str(line["label"]), shown))
    columns = [str(column) for column in table["columns"]]
    return PaperTable(name, table["title"], table.get("note", ""), tolerance, columns, lines)


def _rows_of(line: Mapping[str, Any], table: Mapping[str, Any], rows: Sequence[Row]) -> list[Row]:
    """The rows of a line's model under its scaling that follow the table's protocol."""
    found = [row for row in rows if row.get("metric") == table["metric"] and _same_model(row["model"], line["model"])]
    if "scaling" in line:
        wanted = RopeScaling.from_spec(line["scaling"], RopeScaling("default", original_max_position_embeddings=4096))
        found = [row for row in found if row.get("label") == wanted.label]
    else:
        found = [row for row in found if row.get("carried")]
    found = [row for row in found if _same_protocol(row, table["protocol"])]
    # Of several the last one counts: of a model that was loaded plainly, where there is one.
    return sorted(found, key=lambda row: not Loading.of(row))


def _same_model(measured: str, published: str) -> bool:
    parts = Path(measured).parts
    return measured == published or (bool(parts) and parts[-1].lower() == published.rpartition("/")[2].lower())


def _same_protocol(row: Row, wanted: Mapping[str, Any]) -> bool:
    protocol, data = row.get("protocol", {}), row.get("data", {})
    # A truncated document is one window, so both weightings are the same number.
    found = {"weighting": "token", **protocol, "documents": data.get("documents")}
    if any(found.get(name) != wanted[name] for name in _COMPARED if name in wanted):
        return False
    if "wording" in protocol or protocol.get("chat_template"):
        return False  # other words than the released ones are another test
    if "dataset" in wanted and Path(data.get("name", "")).name.lower() != wanted["dataset"].rpartition("/")[2].lower():
        return False
    # The passkey context, and the accuracy up to it, depend on which lengths were tried.
    return "lengths" not in data or data["lengths"] == _grid(wanted)


_COMPARED = ("name", "stride", "weighting", "documents", "iterations")


def _grid(protocol: Mapping[str, Any]) -> list[int]:
    return list(range(protocol["min_tokens"], protocol["max_tokens"] + 1, protocol["tokens_step"]))


def _find(metric: str, column: Any, rows: Sequence[Row]) -> Row | None:
    if metric == "benchmark":
        rows = [row for row in rows if _is_whole(row, column)]
    elif metric == "perplexity":
        rows = [row for row in rows if row["length"] == column]
    return rows[-1] if rows else None


def _is_whole(row: Row, task: str) -> bool:
    """Whether a row is of all documents of a task, uncut, with the paper's number of examples and no chat template."""
    protocol = row["protocol"]
    if protocol.get("task") != task or protocol.get("limit") is not None or protocol.get("chat_template"):
        return False
    partial = str(row.get("data", {}).get("source", "")).endswith("partial")
    return not partial and not cut_words(row) and protocol.get("num_fewshot") == PAPER[task].num_fewshot


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


def _cell(value: Any, row: Row | None, metric: str, column: Any, tolerance: float) -> PaperCell:
    above = isinstance(value, Mapping)
    published = value["above"] if above else value
    if row is None or published is None or row.get("error"):  # out of memory: neither reproduced nor different
        return PaperCell(published, above, row, None if row is None else _measured(row, metric, column))
    measured = _measured(row, metric, column)
    if column == "passkey context":
        same = measured == published
    elif above:
        same = measured is None or measured > published
    else:
        same = measured is not None and math.isfinite(measured) and abs(measured - published) <= tolerance + 1e-9
    return PaperCell(published, above, row, measured, REPRODUCED if same else DIFFERS)


def _with_printed(cell: PaperCell, value: Any, metric: str, column: Any) -> PaperCell:
    published = value["above"] if isinstance(value, Mapping) else value
    digits = 1
    if metric == "perplexity" and published is not None:
        digits = 2 if published < 10 else 1
    elif column == "passkey context":
        digits = 0
    return replace(cell, published=published, digits=digits)


def to_csv(tables: Sequence[PaperTable]) -> list[list[str]]:
    """One line per cell, under `tables.CSV_HEADER`."""
    lines = []
    for table in tables:
        for label, cells in table.lines:
            for column, cell in zip(table.columns, cells, strict=True):
                record = (cell.row or {}).get("provenance", {})
                measured = cell.ours if cell.measured is None else repr(cell.measured)
                where = [f"{table.heading} of the paper", label, "", column, cell.printed, measured, "", "", ""]
                lines.append([*where, cell.status, record.get("commit") or "", record.get("date") or ""])
    return lines


# ---------------------------------------------------------------------------------------------------------- figures


@dataclass(frozen=True)
class PaperLine:
    """One line of a figure."""

    label: str
    measured: Mapping[int, Row]
    """By context length in tokens."""
    published: Mapping[int, float]
    """The values that the paper prints, by context length."""
    curve: Mapping[int, float] = field(default_factory=dict)
    """The whole published curve, where the released files are at hand."""


@dataclass(frozen=True)
class PaperFigure:
    """A figure of the paper: 1, 5 or 6."""

    name: str
    title: str
    note: str
    source: str
    """Name of the table with its numbers."""
    lines: list[PaperLine]
    highest: float
    """The perplexity at which the figure is cut off."""
    tick: int
    """Distance in tokens between the marks of the x axis."""


def figures(
    rows: Sequence[Row], tables: Sequence[str] | None = None, published: str | Path | None = None
) -> list[PaperFigure]:
    """The paper's figures, with the rows that measure the same thing at any length.

    Args:
        tables: only the figures that show these tables' numbers ("2", "6", "figure5"); default: all.
        published: a folder with the released CSV files.

    Raises:
        ConfigError: no such folder, or its files are not the released ones.
    """
    facts = load_published()
    curves = {} if published is None else read_curves(published)
    made = []
    for name, figure in facts["figures"].items():
        source = figure.get("table", f"figure{name}")
        if tables is not None and source not in tables:
            continue
        table = _numbers(facts)[source]
        lines = []
        for line in table["rows"]:
            measured = {row["length"]: row for row in _rows_of(line, table, rows)}
            numbers = zip(table["columns"], line["values"], strict=True)
            values = {column: value for column, value in numbers if isinstance(value, (int, float))}
            curve = {} if "scaling" in line else curves.get(line["model"], {})
            lines.append(PaperLine(line["label"], measured, values, curve))
        made.append(
            PaperFigure(name, figure["title"], figure.get("note", ""), source, lines, figure["highest"], figure["tick"])
        )
    return made


def read_curves(folder: str | Path) -> dict[str, dict[int, float]]:
    """Published curves from a folder of the released CSV files: model -> length (tokens) -> perplexity.

    Each file has the layout `,L1,L2,...` and a line `name,value,value,...` per model. A file with one length, which
    is that of table 4, holds no curves: sliding windows over other documents.

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
                if len(lengths) == 1:
                    continue
                curves.setdefault(line[0], {}).update({k: v for k, v in found.items() if math.isfinite(v)})
        except (ValueError, IndexError) as error:
            raise ConfigError(f"published curves {path.name}: not a table of perplexities ({error})") from None
    return {model: dict(sorted(curve.items())) for model, curve in curves.items()}


# --------------------------------------------------------------------------------------------------------- commands

_EVALUATORS = {"perplexity": "perplexity", "passkey_context": "passkey", "benchmark": "harness"}
_FLAGS = {"name": "--protocol", "documents": "--samples", "dataset": "--tokenized"}
"""Protocol entry -> flag, where their names differ; the evaluators have the flags of the released scripts."""


@dataclass(frozen=True)
class PaperRun:
    """The evaluation that eval.sh runs for a table."""

    name: str
    table: str
    """Its name among the tables that `compare` knows."""
    title: str
    evaluator: str
    flags: list[str]
    data: list[str]
    """The flags that name the text, which may be replaced."""
    models: list[str]

    @property
    def command(self) -> str:
        """The command line with MODEL in place of a model, for people to read."""
        return shlex.join(["python", f"eval/{self.evaluator}.py", "-m", "MODEL", *self.data, *self.flags])


def runs() -> dict[str, PaperRun]:
    """Evaluations by name: table1 to table6, figure5, and figure1 and figure6, which are those of tables 2 and 6."""
    facts = load_published()
    made: dict[str, PaperRun] = {}
    for key, table in _numbers(facts).items():
        flags: list[str] = []
        for line in table["rows"]:
            if "scaling" in line:
                flags += ["--scaling", line["scaling"]]
        data: list[str] = []
        for name, value in table["protocol"].items():
            into = data if name in ("dataset", "split") else flags
            into += [_FLAGS.get(name, f"--{name.replace('_', '-')}"), str(value)]
        name = key if key.startswith("figure") else f"table{key}"
        models = list(dict.fromkeys(line["model"] for line in table["rows"] if not line.get("released_only")))
        made[name] = PaperRun(name, key, table["title"], _EVALUATORS[table["metric"]], flags, data, models)
    for number, figure in facts["figures"].items():
        if "table" in figure:
            made[f"figure{number}"] = made[f"table{figure['table']}"]
    return made


def main(argv: Sequence[str] | None = None) -> int:
    parser = Parser("python -m scaled_rope.report.paper", __doc__)
    parser.add_argument("name", nargs="?", help="table1 to table6, figure1, figure5, figure6")
    parser.add_argument("--list", action="store_true", help="names and titles")
    parser.add_argument("--shell", action="store_true", help="assignments for a shell script to eval")
    args = parser.parse_args(argv)
    known = runs()
    if args.shell and (args.list or args.name is None):
        raise ConfigError("--shell is not allowed without a name or with --list; it is for one table or figure")
    if args.list or args.name is None:
        for name, run in known.items():
            same = "" if name == run.name else f" (the runs of {run.name})"
            print(f"{name:<24} {run.title}{same}")
        return 0
    if args.name not in known:
        raise unknown("table or figure", args.name, known)
    run = known[args.name]
    if args.shell:
        arrays = {"flags": run.flags, "data": run.data, "models": run.models}
        print(
            "\n".join(
                [
                    f"evaluator={run.evaluator}",
                    f"table={run.table}",
                    *(f"{n}=({shlex.join(v)})" for n, v in arrays.items()),
                ]
            )
        )
    else:
        print("\n".join([run.command, *(f"  {model}" for model in run.models)]))
    return 0


if __name__ == "__main__":
    sys.exit(run_cli(main))
