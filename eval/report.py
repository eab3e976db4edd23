"""Tables, figures and a verdict from result rows, and the paper's tables and figures beside them.

    python eval/report.py rows.jsonl --output out/report
    python eval/report.py rows.jsonl --paper --published FOLDER --output out/paper
    python eval/report.py --table 2                        # the published numbers alone, in the terminal

prints the tables and writes `report.html`, one page that needs no other file and no network, `report.csv` with every
number, and each figure as PNG and PDF. Data sets and protocols have a table and a figure each.

Tables of the paper (and figure 5) are shown where rows belong to them; with --paper all of them, with --table the named
ones. A cell shows the published number, ours, and a status: `=` reproduced within the stated tolerance, `!` different,
`.` not run. --published adds whole curves from a copy of the released CSV files to figures 1 and 6.

With `--verdict demo` the exit code is 1 when the claim of the demo doesn't hold.
"""

from __future__ import annotations

import argparse
import math
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from scaled_rope.command_line import Parser, refuse_early, run_cli
from scaled_rope.errors import ConfigError
from scaled_rope.results import portable_model, read_rows, write_atomic


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
from scaled_rope.checkpoint import display_name
from scaled_rope.report import paper
from scaled_rope.report.figures import figure_of, loss_figure, paper_figure, wavelength_figure
from scaled_rope.report.html import PageSection, build_page, figure_html, paper_table_html, provenance_html, table_html
from scaled_rope.report.paper import PaperFigure, PaperTable
from scaled_rope.report.tables import (
    ReportRows,
    Section,
    Series,
    csv_text,
    describe,
    load_results,
    tables_of,
    title_of,
    to_csv,
)

TOLERANCE = 1.10


# ---------------------------------------------------------------------------------------------------------- verdict


@dataclass(frozen=True)
class Verdict:
    holds: bool
    line: str


def _only(what: str, candidates: Sequence[Series]) -> Series:
    if len(candidates) != 1:
        names = ", ".join(f"{display_name(one.model)} {one.label}" for one in candidates) or "none"
        raise ConfigError(f"verdict: exactly one series must be {what}; found: {names} (see --base, --finetuned)")
    return candidates[0]


def demo_verdict(results: ReportRows, base: str | None = None, finetuned: str | None = None) -> Verdict:
    """Whether fine-tuning with YaRN extended the context.

    1. The fine-tuned model's perplexity in the position bucket that ends at its extended context is at most 1.10 times
       the unscaled base's in its own trained context.
    2. It is below position interpolation and NTK-aware scaling without fine-tuning in every bucket beyond that.

    Of several texts, the one that was measured last counts.

    Args:
        base: the model that is read without fine-tuning; default: the one with unscaled rows.
        finetuned: the model that carries its scaling; default: the only one that does.

    Raises:
        ConfigError: a row that the claim needs is missing, or buckets that are compared begin at different positions.
    """
    base, finetuned = (None if name is None else portable_model(name) for name in (base, finetuned))
    sections = [one for one in results.of("perplexity") if one.topic.setting("name") != "sliding"]
    if not sections:
        raise ConfigError("verdict: there are no perplexities")
    order = {id(row): index for index, row in enumerate(results.rows)}
    section = max(sections, key=lambda one: max(order[id(r)] for cells in one.rows.values() for r in cells.values()))
    scored = list(section.rows)
    unscaled = [one for one in scored if one.scaling.method == "default" and base in (None, one.model)]
    reference = _only("the unscaled base", unscaled)
    carried = [one for one in scored if one.carried and one.scaling.method != "default"]
    tuned = _only("the fine-tuned model under its own scaling", [o for o in carried if finetuned in (None, o.model)])
    rivals = [
        _only(f"the base under static {method}", [o for o in scored if o.model == reference.model and _is(o, method)])
        for method in ("linear", "ntk")
    ]
    trained, target = reference.scaling.original_max_position_embeddings, tuned.scaling.max_position_embeddings
    first, last = _bucket(section, reference, trained), _bucket(section, tuned, target)
    share = last / first
    line = (
        f"{tuned.label} at {target} tokens (bucket {_span(section, tuned, target)}): {last:.2f}, "
        f"{share:.2f}x the unscaled base within its {trained} tokens ({first:.2f}; allowed {TOLERANCE:.2f}x)"
    )
    beyond = [length for length in section.lengths(tuned) if length > (trained or 0)]
    if not beyond:
        raise ConfigError(f"verdict: {tuned.name} has no perplexity beyond {trained} tokens; evaluate it there")
    for length in beyond:
        spans = {_span(section, one, length) for one in (tuned, *rivals)}
        if len(spans) > 1:
            raise ConfigError(f"verdict: buckets {' and '.join(sorted(spans))} differ; evaluate all with one --lengths")
    margins = [(_bucket(section, rival, n) / _bucket(section, tuned, n), rival, n) for n in beyond for rival in rivals]
    worst, rival, length = min(margins, key=lambda margin: margin[0])
    line += (
        f"; {'below' if worst > 1 else 'NOT below'} PI and NTK-aware in {'all' if worst > 1 else 'some of the'} "
        f"{len(beyond)} buckets beyond (closest: {_bucket(section, tuned, length):.2f} against "
        f"{_bucket(section, rival, length):.2f} of {rival.label}, {_span(section, rival, length)})"
    )
    holds = share <= TOLERANCE and worst > 1
    return Verdict(holds, f"{'PASS' if holds else 'FAIL'}: {line}")


def _is(series: Series, method: str) -> bool:
    return series.scaling.method == method and not series.scaling.dynamic


def _bucket(section: Section, series: Series, length: int | None) -> float:
    """Perplexity in the position bucket that ends at `length`; infinite when it overflowed."""
    row = section.lengths(series).get(length or 0)
    if row is None:
        raise ConfigError(f"verdict: {series.name} has no perplexity at length {length}; evaluate it there")
    return math.inf if row["perplexity_bucket"] is None else float(row["perplexity_bucket"])


def _span(section: Section, series: Series, length: int | None) -> str:
    low, high = section.lengths(series)[length or 0]["bucket"]
    return f"{low}-{high}"


def read_losses(path: str) -> list[tuple[int, float]]:
    """Step and loss from JSON lines with these two fields, or from comma-separated losses.

    Raises:
        ConfigError: the file is missing or is neither.
    """
    try:
        text = Path(path).read_text().strip()
        if text.startswith("{"):
            return [(int(row["step"]), float(row["loss"])) for row in read_rows(path)]
        return list(enumerate(map(float, text.replace("\n", ",").split(",")), start=1))
    except (OSError, ValueError, KeyError) as error:
        raise ConfigError(f"train-log {path!r} holds no losses: {error}") from error


# ------------------------------------------------------------------------------------------------------------- page


@dataclass(frozen=True)
class Report:
    """What goes into the page and the CSV file."""

    results: ReportRows | None
    """None: no row files."""
    tables: list[PaperTable]
    figures: list[PaperFigure]
    losses: list[tuple[int, float]]

    def csv(self) -> str:
        measured = [table for section in self.sections for table in tables_of(section)]
        return csv_text([*paper.to_csv(self.tables), *to_csv(measured)])

    @property
    def sections(self) -> list[Section]:
        return self.results.sections if self.results else []


def parts(report: Report, folder: Path) -> Iterator[PageSection]:
    """The parts of the page; writes each figure's PNG and PDF into `folder`."""
    for table in report.tables:
        shown = [figure for figure in report.figures if figure.source == table.name]
        also = "".join(f" and figure {figure.name}" for figure in shown if table.name.isdigit())
        part = PageSection(f"{table.heading}{also} of the paper")
        part.body += [figure_html(paper_figure(one, f"paper-figure-{one.name}"), folder) for one in shown]
        part.body.append(paper_table_html(table))
        yield part
    if report.results is None:
        return
    keys = {series: f"s{index}" for index, series in enumerate(report.results.series)}
    names = file_names(report.sections)
    measured: list[PageSection] = []
    base = None
    for section, name in zip(report.sections, names, strict=True):
        if section.topic.base != base:
            measured.append(PageSection(title_of(section), describe(section)))
            base = section.topic.base
        figure = figure_of(section, name, keys)
        measured[-1].body += [figure_html(figure, folder)] if figure else []
        measured[-1].body += [table_html(table, folded=index > 0) for index, table in enumerate(tables_of(section))]
    yield from measured
    longest = max(row["length"] or 0 for row in report.results.rows)
    more = [wavelength_figure(report.results.series, "wavelengths", longest)]
    if report.losses:
        more.append(loss_figure(report.losses, "loss"))
    for extra in filter(None, more):
        yield PageSection(extra.heading, "", [figure_html(extra, folder)])
    yield PageSection("Where the numbers come from", "", [provenance_html(report.results.rows)])


def file_names(sections: Sequence[Section]) -> list[str]:
    """A name for the picture of each section: the metric, with the data set where there are several."""
    metrics = [section.topic.metric for section in sections]
    names: list[str] = []
    for section in sections:
        name = section.topic.metric
        if metrics.count(name) > 1:
            name = re.sub(r"[^a-z0-9]+", "-", f"{name}-{section.topic.data}".lower()).strip("-")
        if section.topic.setting("name") == "sliding":
            name += "-sliding"
        names.append(name if name not in names else f"{name}-{len(names)}")
    return names


def read_report(args: argparse.Namespace) -> Report:
    """Everything that the arguments name."""
    results = load_results(args.rows, args.finetuned) if args.rows else None
    if results is None and args.verdict:
        raise ConfigError("verdict: no row files were given")
    tables = paper.compare(results.rows if results else [], args.table)
    if results is not None and not (args.paper or args.table):
        tables = [table for table in tables if table.measured]
    shown = [table.name for table in tables]
    figures = paper.figures(results.rows if results else [], shown, args.published)
    return Report(results, tables, figures, read_losses(args.train_log) if args.train_log else [])


def main(argv: Sequence[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    if args.output and Path(args.output).is_file():
        raise ConfigError(f"--output {args.output} is a file; name a folder")
    report = read_report(args)
    results = report.results
    verdict = demo_verdict(results, args.base, args.finetuned) if args.verdict and results else None
    for note in results.notes if results else []:
        print(f"note: {note}", file=sys.stderr)
    if args.output:
        folder = Path(args.output)
        said = (verdict.holds, verdict.line) if verdict else None
        page = build_page(args.title, lead(report), said, list(parts(report, folder)))
        write_atomic(folder / "report.html", page)
        write_atomic(folder / "report.csv", report.csv())
    for text in [table.text() for section in report.sections for table in tables_of(section)]:
        print(f"\n{text}")
    for table in report.tables:
        print(f"\n{table.text()}")
    if args.output:
        print(f"\nreport: {folder / 'report.html'}")
    if verdict is not None:
        print(verdict.line)
    return 0 if verdict is None or verdict.holds else 1


def lead(report: Report) -> str:
    """The sentence under the heading."""
    if report.results is None:
        return "The numbers that the paper prints. Nothing was measured."
    names = list(dict.fromkeys(display_name(series.model) for series in report.results.series))
    what = ", ".join(names) if len(names) <= 3 else f"{len(names)} models"
    labels = len({series.label for series in report.results.series})
    dates = sorted(row["provenance"]["date"][:10] for row in report.results.rows)
    when = dates[0] if dates[0] == dates[-1] else f"{dates[0]} to {dates[-1]}"
    count = f"{labels} scaling{'s' if labels != 1 else ''}"
    return f"{what}; {count}; measured {when}. Hover, tap or focus a number to see where it comes from."


if __name__ == "__main__":
    sys.exit(run_cli(main))
