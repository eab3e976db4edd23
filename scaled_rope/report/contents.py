"""The contents of a report: the paper's tables beside the measured ones, figures, and where the numbers come from."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from scaled_rope.checkpoint import display_name
from scaled_rope.errors import ConfigError, unknown
from scaled_rope.provenance import portable_model
from scaled_rope.report import paper
from scaled_rope.report.context_use import all_tables, is_control
from scaled_rope.report.figures import figure_of, loss_figure, paper_figure, wavelength_figure
from scaled_rope.report.html import PageSection, figure_html, note_html, paper_table_html, provenance_html, table_html
from scaled_rope.report.paired import paired_table
from scaled_rope.report.paper import PaperFigure, PaperTable
from scaled_rope.report.ruler import ruler_tables
from scaled_rope.report.tables import (
    ReportRows,
    Section,
    Table,
    csv_text,
    describe,
    load_results,
    title_of,
    to_csv,
)
from scaled_rope.results import read_rows


@dataclass(frozen=True)
class Report:
    """The contents of the page and the CSV file."""

    results: ReportRows | None
    """None when there are no row files."""
    tables: list[PaperTable]
    figures: list[PaperFigure]
    losses: list[tuple[int, float]]
    base: str | None = None
    """The model without fine-tuning, as for `base_of`."""

    def csv(self) -> str:
        return csv_text([*paper.to_csv(self.tables), *to_csv(self.measured)])

    @property
    def measured(self) -> list[Table]:
        """All tables of measured numbers."""
        tables = ruler_tables(self.results) if self.results else []
        return [*tables, *(table for section in self.sections for table in self.tables_of(section))]

    def tables_of(self, section: Section) -> list[Table]:
        """The tables of a section, the comparisons with controls and with the base included."""
        compared = paired_table(section, self.base)
        return [*all_tables(section), *([compared] if compared else [])]

    @property
    def sections(self) -> list[Section]:
        return self.results.sections if self.results else []


def parts(report: Report, folder: Path) -> Iterator[PageSection]:
    """Yield the parts of the page, and write each figure's PNG and PDF into `folder`."""
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
    if tables := ruler_tables(report.results):
        measured.append(PageSection("RULER", "", [table_html(table) for table in tables]))
    base = None
    for section, name in zip(report.sections, names, strict=True):
        if section.topic.base != base:
            measured.append(PageSection(title_of(section), describe(section)))
            base = section.topic.base
        figure = figure_of(section, name, keys)
        measured[-1].body += [figure_html(figure, folder)] if figure else []
        measured[-1].body += [
            table_html(table, folded=index > 0 and not is_control(table) and not section.topic.metric == "benchmark")
            for index, table in enumerate(report.tables_of(section))
        ]
    yield from measured
    longest = max(row["length"] or 0 for row in report.results.rows)
    more = [wavelength_figure(report.results.series, "wavelengths", longest)]
    if report.losses:
        more.append(loss_figure(report.losses, "loss"))
    for extra in filter(None, more):
        yield PageSection(extra.heading, "", [figure_html(extra, folder)])
    yield PageSection(
        "Where the numbers come from", "", [*map(note_html, report.results.notes), provenance_html(report.results.rows)]
    )


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


def lead(report: Report) -> str:
    """The sentence under the page's heading."""
    if report.results is None:
        return "The numbers that the paper prints. Nothing was measured."
    names = list(dict.fromkeys(display_name(series.model) for series in report.results.series))
    what = ", ".join(names) if len(names) <= 3 else f"{len(names)} models"
    labels = len({series.label.removesuffix(series.words) for series in report.results.series})
    dates = sorted(row["provenance"]["date"][:10] for row in report.results.rows)
    when = dates[0] if dates[0] == dates[-1] else f"{dates[0]} to {dates[-1]}"
    count = f"{labels} scaling{'s' if labels != 1 else ''}"
    return f"{what}; {count}; measured {when}. Hover, tap or focus a number to see where it comes from."


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


def read_report(
    files: Sequence[str],
    finetuned: str | None = None,
    tables: Sequence[str] | None = None,
    whole_paper: bool = False,
    published: str | None = None,
    train_log: str | None = None,
    base: str | None = None,
) -> Report:
    """Collect the contents of a report.

    Args:
        files: row files; without any, the report has the published tables alone.
        finetuned: the model that carries its scaling, as for `load_results`.
        tables: names of the paper's tables; None: those for which something was measured.
        whole_paper: show all of the paper's tables, measured or not.
        published: folder of the released CSV files.
        train_log: file of losses, as for `read_losses`.
        base: the model without fine-tuning (default: the one with unscaled rows).

    Raises:
        ConfigError: a file that cannot be read, an unknown table, or a model that no row is about.
    """
    results = load_results(files, finetuned) if files else None
    for flag, name in (("base", base), ("finetuned", finetuned)) if results else ():
        models = {series.model for series in results.series} if results else set()
        if name is not None and portable_model(name) not in models:
            raise unknown(f"{flag} model", portable_model(name), models)
    rows = results.rows if results else []
    compared = paper.compare(rows, tables)
    if results is not None and not (whole_paper or tables):
        compared = [table for table in compared if table.measured]
    figures = paper.figures(rows, [table.name for table in compared], published)
    return Report(
        results, compared, figures, read_losses(train_log) if train_log else [], base and portable_model(base)
    )
