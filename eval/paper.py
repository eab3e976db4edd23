"""The tables of the paper beside what was measured.

    python eval/paper.py out/rows.jsonl                      # all six tables, in the terminal
    python eval/paper.py out/rows.jsonl --table 2 --output out/paper --published FOLDER

Every cell shows the published number, ours, and a verdict: `=` reproduced within the stated tolerance, `!` different,
`.` not run. With --output the tables go to `paper.csv`, and perplexities against context length to `paper.png`, with
the published numbers as markers and, with --published (a copy of the released CSV files), the published curves.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from scaled_rope.errors import ConfigError, Parser, run_cli
from scaled_rope.evaluation import format_table
from scaled_rope.loading import display_name
from scaled_rope.paper import DIFFERS, REPRODUCED, PaperTable, compare, read_curves, to_csv
from scaled_rope.results import Row, read_rows, write_atomic

_SIGNS = {REPRODUCED: "=", DIFFERS: "!"}
_COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#8a8a8a")


def show(table: PaperTable) -> str:
    """A table for the terminal: "published ours=" in each cell."""
    lines = []
    for label, cells in table.lines:
        shown = [f"{cell.printed} {cell.ours}{_SIGNS.get(cell.status, '.')}" for cell in cells]
        lines.append([label, *shown])
    counts = ", ".join(f"{count} {status}" for status, count in table.counts.items())
    text = format_table(["", *table.columns], lines)
    note = f"{table.note}\n" if table.note else ""
    return f"Table {table.name}. {table.title}\n{note}{text}\n{counts}; tolerance {table.tolerance:g}"


def draw(rows: Sequence[Row], tables: Sequence[PaperTable], published: str | None, path: Path) -> None:
    """Perplexity against context length: lines are measured, markers and thin lines published.

    Raises:
        ConfigError: matplotlib is missing.
    """
    try:
        import matplotlib
    except ImportError:
        raise ConfigError("the figure needs matplotlib: pip install 'scaled-rope[eval]'") from None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    curves = read_curves(published) if published else {}
    ours: dict[str, dict[int, float]] = {}
    for row in rows:
        if row.get("metric") == "perplexity" and row.get("carried") and row.get("perplexity") is not None:
            ours.setdefault(display_name(row["model"]), {})[row["length"]] = row["perplexity"]
    figure, axes = pyplot.subplots(figsize=(8, 5), layout="constrained")
    names = list(dict.fromkeys([*ours, *(display_name(name) for name in curves)]))
    colors = {name: _COLORS[index % len(_COLORS)] for index, name in enumerate(names)}
    for name, curve in ours.items():
        axes.plot(sorted(curve), [curve[n] for n in sorted(curve)], color=colors[name], marker="o", ms=4, label=name)
    for name, curve in curves.items():
        short = display_name(name)
        values = [curve[n] for n in sorted(curve)]
        axes.plot(sorted(curve), values, color=colors[short], lw=0.8, ls="--", label=f"{short} (published)")
    for table in tables:
        for _, cells in table.lines:
            points = [
                (int(column), cell.published)
                for column, cell in zip(table.columns, cells, strict=True)
                if column.isdigit() and cell.published is not None and not cell.above and any(c.row for c in cells)
            ]
            if points and table.name != "3":
                axes.scatter(*zip(*points, strict=True), marker="x", color="#222222", zorder=3)
    axes.set(xscale="log", yscale="log", xlabel="context length (tokens)", ylabel="perplexity")
    axes.grid(alpha=0.25)
    if names:
        axes.legend(fontsize=8)
    scratch = path.with_suffix(".tmp.png")
    figure.savefig(scratch, dpi=150)
    write_atomic(path, scratch.read_bytes())
    scratch.unlink()


def main(argv: Sequence[str] | None = None) -> int:
    parser = Parser("eval/paper.py", __doc__ or "")
    add: Any = parser.add_argument
    add("rows", nargs="*", metavar="ROWS", help="row files of the evaluators; none: the published tables alone")
    add("--table", action="append", metavar="N", help="1 to 6; repeatable (default: all)")
    add("--output", metavar="FOLDER", help="write paper.csv and paper.png there")
    add("--published", metavar="FOLDER", help="a copy of the released CSV files, for their full curves")
    args = parser.parse_args(argv)
    rows = [row for path in args.rows for row in read_rows(path)]
    tables = compare(rows, args.table)
    print("\n\n".join(map(show, tables)))
    if args.output:
        folder = Path(args.output)
        write_atomic(folder / "paper.csv", to_csv(tables))
        draw(rows, tables, args.published, folder / "paper.png")
        print(f"\nwritten: {folder / 'paper.csv'}, {folder / 'paper.png'}")
    return 0


if __name__ == "__main__":
    sys.exit(run_cli(main))
