"""Whether models use the context that they were extended to: rows of perplexity beside those of their controls."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields

from scaled_rope.evaluation.controls import Change, Control, compare, counted
from scaled_rope.report.tables import Cell, Column, Section, Series, Table, beside, tables_of, title_of
from scaled_rope.results import Row

_HEADING = "against the last tokens only"


@dataclass(frozen=True)
class AcrossPrecisions(Change):
    """A change against a base that was computed in another precision, as its text says."""

    precisions: str = ""
    """See `precisions`."""

    def __str__(self) -> str:
        return f"{super().__str__()} ({self.precisions})"


@dataclass(frozen=True)
class ContextUse:
    """One series over one text, beside its control and its base's.

    Attributes:
        control: the windows of the control.
        buckets: position buckets beyond the control's window, in order, with the change against the same weights.
        total: the change over those up to the length that the scaling is for, together; over all of them where the
            scaling names none.
        against_base: likewise against the base's control; None where the base has none under the same windows.
        works_to: the end of the last bucket up to which the perplexity, as measured, is at or below that of the same
            weights reading the last tokens only; the control's window if it is above in the first one.
        measured_to: the end of the last bucket.
        precisions: how the base differs in precision, see `precisions`.
    """

    series: Series
    control: Control
    buckets: dict[Column, Change | None]
    total: Change | None
    base_buckets: dict[Column, Change | None]
    against_base: Change | None
    works_to: int
    measured_to: int
    precisions: str = ""


def base_of(section: Section, series: Series, base: str | None = None) -> Series | None:
    """The unscaled series to compare with: that of the model `base`, of the same model, or the only one.

    Of several of one model, the one counts that was loaded as `series` was, or else plainly, and then the one in its
    precision. Where there is none in its precision, one in another counts; `precisions` says so.
    """
    unscaled = [one for one in section.rows if one.scaling.method == "default" and base in (None, one.model)]
    same = [one for one in unscaled if one.model == series.model]
    found = same or unscaled
    if len({one.model for one in found}) == 1:
        alike = [one for one in found if one.loading == series.loading] or [one for one in found if not one.loading]
        found = alike if same else alike or found
        found = [one for one in found if _dtypes(section, one) & _dtypes(section, series)] or found
    return found[0] if len(found) == 1 else None


def _dtypes(section: Section, series: Series) -> set[str]:
    return {row["dtype"] for row in section.rows.get(series, {}).values()}


def precisions(section: Section, series: Series, reference: Series | None) -> str:
    """How a base and a model differ in precision: "base in bfloat16, model in float32"; "" where they don't."""
    mine, others = _dtypes(section, series), set() if reference is None else _dtypes(section, reference)
    if not others or mine & others:
        return ""
    return f"base in {' and '.join(sorted(others))}, model in {' and '.join(sorted(mine))}"


def _told(change: Change | None, words: str) -> Change | None:
    """A change against a base, which says in its text how the two differ in precision, if they do."""
    if change is None or not words:
        return change
    return AcrossPrecisions(**{one.name: getattr(change, one.name) for one in fields(change)}, precisions=words)


def context_use(section: Section, series: Series, base: str | None = None) -> ContextUse | None:
    """Compare a series with its controls; None where it has none.

    Of several controls of the series the one at its trained length counts, otherwise the one that was measured last.
    Of buckets that overlap, because they were measured with several sets of lengths, the finest set counts.
    """
    controls = section.controls.get(series, {})
    if not controls or series not in section.rows:
        return None
    trained = series.scaling.original_max_position_embeddings
    control = next((one for one in reversed(controls) if one.window == trained), list(controls)[-1])
    rows, cut = section.rows[series], controls[control]
    sliding = section.topic.setting("name") == "sliding"
    lines = [sorted(rows)] if sliding else section.partitions(series)
    line = max(lines, key=lambda columns: sum(column in cut for column in columns))
    columns = [column for column in line if column in cut]
    if not columns:
        return None
    ends = counted([length for length, _ in columns], control.window, series.made_for)
    within = [column for column in columns if column[0] in ends]
    if sliding:
        within = within[-1:]  # each length of windows scores all tokens
    reference = base_of(section, series, base)
    base_cut = section.controls.get(reference, {}).get(control, {}) if reference else {}
    common = [column for column in columns if column in base_cut]
    differ = precisions(section, series, reference) if common else ""

    def against(found: dict[Column, Row], chosen: Sequence[Column]) -> Change | None:
        return compare([(rows[column], found[column]) for column in chosen])

    buckets = {column: against(cut, [column]) for column in columns}
    works_to = control.window
    for (length, _), change in buckets.items():
        if change is None or not change.at_or_below:
            break
        works_to = length
    return ContextUse(
        series,
        control,
        buckets,
        against(cut, within),
        {column: _told(against(base_cut, [column]), differ) for column in common},
        _told(against(base_cut, within), differ) if set(within) <= set(common) else None,
        works_to,
        columns[-1][0],
        differ,
    )


def short_loss(section: Section, series: Series, window: int, base: str | None = None) -> Change | None:
    """The change of perplexity within the first `window` tokens against the unscaled base; None if not measured."""
    reference = base_of(section, series, base)
    if reference is None or reference is series:
        return None
    mine, others = section.rows[series], section.rows[reference]
    change = compare([(mine[one], others[one]) for one in mine if one[0] <= window and one in others])
    return _told(change, precisions(section, series, reference))


def control_table(section: Section) -> Table | None:
    """The change by context beyond the control's window, by position bucket; None where no control was measured."""
    found = [use for series in section.rows if (use := context_use(section, series)) is not None]
    columns = sorted({column for use in found for column in use.buckets})
    if not columns:
        return None

    def cell(series: Series, column: Column, change: Change | None) -> Cell:
        row = section.rows[series][column]
        if change is None:
            return Cell("–", row)
        bounds = None if change.interval is None else (100 * change.interval[0], 100 * change.interval[1])
        return Cell(change.short, row, 100 * change.share, bounds)

    lines: list[tuple[Series, list[Cell]]] = []
    for use in found:
        last = max((column for column in use.buckets), key=lambda column: column[0])
        for name, changes, total in (
            (f"{use.series.name}, against itself", use.buckets, use.total),
            (f"{use.series.name}, against the base", use.base_buckets, use.against_base),
        ):
            if not changes or (changes is use.base_buckets and base_of(section, use.series) is use.series):
                continue
            cells = [cell(use.series, column, changes[column]) if column in changes else Cell() for column in columns]
            whole = cell(use.series, last, total)
            said = "–" if total is None else Change.__str__(total)  # a remark says how precisions differ
            lines.append((_named(use, name), [*cells, Cell(said, whole.row, whole.value, whole.interval)]))
    windows = sorted({(use.control.window, use.control.stride) for use in found})
    how = "; ".join(f"{window - stride} to {window - 1} tokens before each" for window, stride in windows)
    sliding = section.topic.setting("name") == "sliding"
    before = "what stands in a window" if sliding else "the whole text"
    note = (
        f"Perplexity with {before} before a token, over that with the last tokens only; below 0 the text further "
        f"back helps. Against itself: the same weights, cut ({how}; stride {', '.join(str(s) for _, s in windows)}). "
        "Against the base: the unscaled base, cut likewise; what truncation alone would give. All: up to the length "
        "that the scaling is for, with the 95 % interval over documents, or over windows where there is one document."
    )
    heads = [*(span or str(length) for length, span in columns), "all"]
    told = precision_remarks({use.series.name: use.precisions for use in found})
    return Table(f"{title_of(section)}, {_HEADING}", note, section, heads, lines, None, told)


def precision_remarks(found: Mapping[str, str]) -> tuple[str, ...]:
    """Remarks on comparisons across precisions. found: name of a series -> `precisions`."""
    where: dict[str, list[str]] = {}
    for name, words in found.items():
        if words:
            where.setdefault(words, []).append(name)
    return tuple(
        f"Against the base: {words} ({', '.join(names)}), so a part of the change may be rounding."
        for words, names in where.items()
    )


def _named(use: ContextUse, name: str) -> Series:
    line = beside(use.series, use.control)
    line.name, line.label, line.dashed, line.marker = name, name, use.series.dashed, use.series.marker
    return line


def all_tables(section: Section) -> list[Table]:
    """The tables of a section, that of its controls included."""
    control = control_table(section)
    first, *others = tables_of(section)
    return [first, *([control] if control else []), *others]


def is_control(table: Table) -> bool:
    """Whether a table is that of `control_table`."""
    return table.title.endswith(_HEADING)
