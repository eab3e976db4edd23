"""Tables, figures and a verdict from result rows, and the paper's tables and figures beside them.

    python eval/report.py rows.jsonl --output out/report
    python eval/report.py rows.jsonl --paper --published FOLDER --output out/paper
    python eval/report.py --table 2                        # the published numbers alone, in the terminal

prints a summary (to which length the models work, and what was not measured) and the tables, and writes `report.html`,
one page that needs no other file and no network, `report.csv` with every number, and each figure as PNG and PDF. Data
sets and protocols have a table and a figure each.

Tables of the paper (and figure 5) are shown where rows belong to them; with --paper all of them, with --table the named
ones. A cell shows the published number, ours, and a status: `=` reproduced within the stated tolerance, `!` different,
`.` not run. --published adds whole curves from a copy of the released CSV files to figures 1 and 6.

With `--verdict demo` the page opens with what the demo claims, in plain words, and the exit code is 1 when the claim
doesn't hold, or when its control or its passkeys were not measured.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from scaled_rope.command_line import Parser, refuse_early, run_cli
from scaled_rope.errors import ConfigError, check_name
from scaled_rope.files import write_atomic
from scaled_rope.flags.shared import check_folder


def build_parser() -> Parser:
    parser = Parser("eval/report.py", __doc__ or "")
    add = parser.add_argument
    add("rows", nargs="*", metavar="ROWS", help="row files of the evaluators; none: the published tables alone")
    add("--output", metavar="FOLDER", help="report.html, report.csv and the figures go here (default: terminal only)")
    add("--title", default="Context extension, measured", help="heading of the page (default %(default)r)")
    add("--paper", action="store_true", help="all tables and figures of the paper, measured or not")
    add("--table", action="append", metavar="N", help="a table of the paper: 1 to 6, or figure5; repeatable")
    add("--published", metavar="FOLDER", help="a copy of the released CSV files, for their full curves")
    add("--verdict", choices=("demo",), help="decide a claim; exit code 1 when it doesn't hold")
    add("--base", metavar="MODEL", help="the model without fine-tuning (default: the one with unscaled rows)")
    add("--finetuned", metavar="MODEL", help="the fine-tuned model (default: the one that carries a scaling)")
    add("--train-log", metavar="FILE", help="losses: JSON lines with step and loss, or comma-separated")
    return parser


if __name__ == "__main__":
    refuse_early(build_parser().parse_args)

# What takes seconds to import stands below the flags.
from scaled_rope.report.contents import lead, parts, read_report
from scaled_rope.report.demo_opening import demo_opening
from scaled_rope.report.html import build_page, summary_part
from scaled_rope.report.summary import summarize
from scaled_rope.report.verdict import demo_verdict


def main(argv: Sequence[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    if args.output:
        check_name(args.output, "--output")
        check_folder(args.output)
    if args.verdict and not args.rows:
        raise ConfigError("verdict: no row files were given")
    report = read_report(args.rows, args.finetuned, args.table, args.paper, args.published, args.train_log, args.base)
    results = report.results
    verdict = demo_verdict(results, args.base, args.finetuned) if args.verdict and results else None
    summary = summarize(results, args.base) if results else None
    opening = demo_opening(results, verdict) if results and verdict else None
    for note in results.notes if results else []:
        print(f"note: {note}", file=sys.stderr)
    if args.output:
        folder = Path(args.output)
        said = (verdict.holds, verdict.line) if verdict else None
        # The demo opens with its own table; that of any report follows.
        below = [summary_part(summary)] if opening and summary else []
        page = build_page(args.title, lead(report), said, [*below, *parts(report, folder)], opening or summary)
        write_atomic(folder / "report.html", page)
        write_atomic(folder / "report.csv", report.csv())
    for first in filter(None, (opening, summary)):
        print(f"{first.text()}\n")
    print("\n\n".join([table.text() for table in report.measured] + [table.text() for table in report.tables]))
    if args.output:
        print(f"\nreport: {folder / 'report.html'}")
    if verdict is not None:
        print(verdict.line)
    return 0 if verdict is None or verdict.holds else 1


if __name__ == "__main__":
    sys.exit(run_cli(main))
