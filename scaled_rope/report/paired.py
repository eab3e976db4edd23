"""The cost of an extension on benchmarks: the same questions asked of a model and of its base, compared in pairs."""

from __future__ import annotations

from dataclasses import replace

from scaled_rope.evaluation.statistics import Difference, paired_difference
from scaled_rope.report.context_use import base_of, precision_remarks, precisions
from scaled_rope.report.cut_prompts import cut_words
from scaled_rope.report.tables import Cell, Column, ReportRows, Section, Series, Table, title_of
from scaled_rope.results import Row

_SETTINGS = ("max_length",)  # differ between a model and its base


def paired(mine: Row, others: Row) -> Difference | str:
    """A model's row beside its base's: the difference over the same questions, or why there is none."""
    if mine.get("error") or others.get("error"):
        return "one of the two was not measured"
    if mine["data"].get("fingerprint") != others["data"].get("fingerprint") or _settings(mine) != _settings(others):
        return "the two were asked different questions"
    limits = {row["protocol"].get("max_length") for row in (mine, others)}
    if len(limits) > 1 and (mine.get("truncated") or others.get("truncated")):
        return "prompts were cut to different lengths"
    if not mine.get("outcomes") or not others.get("outcomes"):
        return "rows don't list the outcome of each question; measure them anew"
    try:
        return paired_difference(mine["outcomes"], others["outcomes"])
    except ValueError as error:
        return str(error)


def _settings(row: Row) -> dict[str, object]:
    return {name: value for name, value in row["protocol"].items() if name not in _SETTINGS}


def differences(section: Section, series: Series, base: str | None = None) -> dict[Column, Difference | str]:
    """The difference to the unscaled base in each column that both have; {} where there is no base.

    base: as for `base_of`.
    """
    reference = base_of(section, series, base)
    if reference is None or reference is series:
        return {}
    mine, others = section.rows[series], section.rows[reference]
    return {column: paired(mine[column], others[column]) for column in mine if column in others}


def paired_table(section: Section, base: str | None = None) -> Table | None:
    """The differences of all series of a section of benchmarks; None where there are none."""
    if section.topic.metric != "benchmark" or section.topic.by_length:
        return None
    found = {series: differences(section, series, base) for series in section.rows}
    columns = [column for column in section.columns if any(column in each for each in found.values())]
    if not columns:
        return None
    lines, reasons = [], dict[str, list[str]]()
    for series, each in found.items():
        if not each:
            continue
        cells = []
        for column in columns:
            change = each.get(column)
            row = section.rows[series].get(column)
            if isinstance(change, Difference):
                bounds = None if change.interval is None else (100 * change.interval[0], 100 * change.interval[1])
                cut = "" if row is None else cut_words(row)  # the base's prompts are the same, cut likewise
                cells.append(Cell(change.points, row, 100 * change.value, bounds, cut=cut))
            elif change is not None:
                cells.append(Cell("–", row))
                reasons.setdefault(change, []).append(f"{series.name} on {column[1]}")
            else:
                cells.append(Cell())
        name = f"{series.name}, against the base"
        lines.append((replace(series, name=name, aside=True), cells))
    left = tuple(f"Not compared: {', '.join(where)}, since {why}." for why, where in reasons.items())
    compared = [one for one, each in found.items() if any(isinstance(change, Difference) for change in each.values())]
    left += precision_remarks({one.name: precisions(section, one, base_of(section, one, base)) for one in compared})
    note = (
        "Percentage points by which a model answers the same questions better (+) or worse (−) than the unscaled base, "
        "with the 95 % interval over resampled questions."
    )
    heads = [name for _, name in columns]
    return Table(
        f"{title_of(section)}, against the base on the same questions", note, section, heads, lines, None, left
    )


def short_costs(results: ReportRows, series: Series, base: str | None = None) -> list[tuple[str, Difference]]:
    """Task -> difference to the base, of the benchmarks that were compared.

    A task's name says whether prompts were cut, and how the two differ in precision.
    """
    found = []
    for section in results.of("benchmark"):
        if section.topic.by_length or series not in section.rows:
            continue
        differ = precisions(section, series, base_of(section, series, base))
        for column, change in differences(section, series, base).items():
            if isinstance(change, Difference):
                row = section.rows[series][column]
                more = ", ".join(filter(None, ["prompts cut" if cut_words(row) else "", differ]))
                found.append((f"{row['protocol']['task']}{f' ({more})' if more else ''}", change))
    return found
