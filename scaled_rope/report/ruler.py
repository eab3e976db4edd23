"""RULER's tasks by length, and to which length a model keeps its score on them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from scaled_rope.evaluation.effective_length import KEPT, THRESHOLDS, EffectiveLength, effective_length
from scaled_rope.evaluation.task_presets import RULER
from scaled_rope.report.cut_prompts import cut_words
from scaled_rope.report.tables import UNSCALED, Cell, ReportRows, Section, Series, Table, Topic, share_cell
from scaled_rope.results import Row

_PER_TASK = ("task", "version", "num_fewshot")  # settings that differ between tasks of one measurement


@dataclass(frozen=True)
class RulerScores:
    """RULER's tasks as one series was measured on them.

    Attributes:
        rows: task -> length in tokens -> row, in RULER's order.
        settings: what all rows have in common, such as the number of prompts.
        effective: None where nothing was measured at the trained length, or that is unknown.
    """

    series: Series
    rows: dict[str, dict[int, Row]]
    settings: dict[str, Any]
    effective: EffectiveLength | None

    @property
    def lengths(self) -> list[int]:
        """All lengths in tokens."""
        return sorted({length for found in self.rows.values() for length in found})

    @property
    def trained(self) -> int | None:
        """The length in tokens that the base was trained on."""
        return self.series.scaling.original_max_position_embeddings

    @property
    def standing(self) -> str:
        """The tasks that the effective length stands on, in words, and how many of their prompts were cut."""
        return "; ".join(filter(None, [self.tasks, self.cut]))

    @property
    def tasks(self) -> str:
        """The tasks that the effective length stands on, in words."""
        assert self.effective is not None
        tasks = self.effective.tasks
        if len(tasks) == len(RULER):
            return f"all {len(RULER)} tasks"
        return f"{len(tasks)} of {len(RULER)} tasks: {', '.join(tasks)}"

    @property
    def cut(self) -> str:
        """How many of the prompts that the effective length stands on were cut; "" where none was."""
        assert self.effective is not None
        return "; ".join(filter(None, dict.fromkeys(self.cut_at(length) for length in self.effective.scores)))

    def cut_at(self, length: int) -> str:
        """The same, of the prompts of one length in tokens."""
        assert self.effective is not None
        rows = [self.rows[task].get(length) for task in self.effective.tasks]
        return cut_words(*(row for row in rows if row is not None))


def ruler_scores(results: ReportRows, series: Series) -> RulerScores | None:
    """RULER's rows of a series; of several measurements, with another limit say, the one with the most rows."""
    groups: dict[tuple[tuple[str, Any], ...], list[Section]] = {}
    for section in results.of("benchmark"):
        topic = section.topic
        if topic.by_length and topic.data in RULER and any(not row.get("error") for row in _rows(section, series)):
            common = tuple((name, value) for name, value in topic.protocol if name not in _PER_TASK)
            groups.setdefault(common, []).append(section)
    if not groups:
        return None
    settings, sections = max(groups.items(), key=lambda item: sum(len(_rows(one, series)) for one in item[1]))
    found = {section.topic.data: section.lengths(series) for section in sections}
    rows = {task: found[task] for task in RULER if task in found}
    trained = series.scaling.original_max_position_embeddings
    outcomes: dict[int, dict[str, Sequence[float]]] = {}
    for task, cells in rows.items():
        for length, row in cells.items():
            if not row.get("error"):
                outcomes.setdefault(length, {})[task] = _outcomes(row)
    effective = None if trained is None else effective_length(outcomes, trained)
    return RulerScores(series, rows, dict(settings), effective)


def _rows(section: Section, series: Series) -> list[Row]:
    return list(section.rows.get(series, {}).values())


def _outcomes(row: Row) -> list[float]:
    """Each prompt's score, 0 to 1; the mean alone for rows from before they were listed, which have no interval."""
    listed = [value for values in row.get("outcomes", {}).values() for value in values]
    return listed or [row["value"] / 100]


def ruler_tables(results: ReportRows) -> list[Table]:
    """The effective lengths of all series, then the tasks by length of each; [] where nothing of RULER was measured."""
    found = [scores for series in results.series if (scores := ruler_scores(results, series)) is not None]
    if not found:
        return []
    section = Section(Topic("benchmark", "RULER", ()))
    return [_effective_table(section, found), *(_scores_table(section, scores) for scores in found)]


def _effective_table(section: Section, found: Sequence[RulerScores]) -> Table:
    lines = []
    for scores in found:
        row = next(row for cells in scores.rows.values() for row in cells.values() if not row.get("error"))
        found_length = scores.effective
        if found_length is None:
            at = "an unknown length" if scores.trained is None else f"{scores.trained} tokens"
            lines.append((scores.series, [Cell(f"not measured at {at}", row), *[Cell()] * 5]))
            continue
        low_high = "" if found_length.interval is None else "{} to {}".format(*found_length.interval)
        cells = [
            Cell(_length(found_length), row, found_length.length, cut=scores.cut),
            Cell(low_high, row),
            Cell(f"{100 * found_length.scores[found_length.trained]:.1f}", row),
            *(Cell(_above(found_length, threshold), row) for threshold in THRESHOLDS.values()),
            Cell(scores.tasks, row),
        ]
        lines.append((scores.series, cells))
    heads = ["length (tokens)", "95 % interval", "mean at the trained length (%)"]
    heads += [f"above {threshold} (tokens)" for threshold in THRESHOLDS.values()]
    note = (
        "The longest length up to which, at every measured length, the mean over the tasks is at least "
        f"{100 * KEPT:.0f} % of the model's own at the trained length; the tasks are those measured there, the same at "
        "each length. The interval is over resampled prompts within each task. "
        f"Above {THRESHOLDS['chat']} and {THRESHOLDS['base']}: RULER's own thresholds, what Llama-2-7B-chat and "
        "Llama-2-7B score at 4096 tokens on all 13 tasks by the authors' prompts; given for all 13 tasks only."
    )
    return Table("Benchmarks, RULER, effective length", note, section, [*heads, "tasks"], lines)


def _length(found: EffectiveLength) -> str:
    if found.length is None:
        return "none: scores 0 at the trained length"
    return f"{found.length}, the longest measured" if found.length == found.measured_to else str(found.length)


def _above(found: EffectiveLength, threshold: float) -> str:
    if len(found.tasks) < len(RULER):
        return "–"
    length = found.above(threshold)
    return "none" if length is None else str(length)


def _scores_table(section: Section, scores: RulerScores) -> Table:
    lengths, series, effective = scores.lengths, scores.series, scores.effective

    def line(name: str) -> Series:
        return replace(series, name=name, color=UNSCALED, marker="", dashed=False, aside=True)

    lines = [
        (line(task), [share_cell(cells[length]) if length in cells else Cell() for length in lengths])
        for task, cells in scores.rows.items()
    ]
    left: list[str] = []
    if effective is not None:
        of = {length: scores.rows[effective.tasks[0]][length] for length in effective.scores}
        count = f"mean of {len(effective.tasks)}"
        shares = {one: 100 * effective.scores[one] for one in of}
        means = [
            Cell(f"{shares[one]:.1f}", of[one], shares[one], None, "%", scores.cut_at(one)) if one in of else Cell()
            for one in lengths
        ]
        lines.append((line(count), means))
        if effective.kept:
            kept = [_kept(effective, one, of[one]) if one in effective.kept else Cell() for one in lengths]
            lines.append((line(f"of that at {effective.trained}"), kept))
        if len(effective.tasks) < len(scores.rows):
            others = ", ".join(task for task in scores.rows if task not in effective.tasks)
            left.append(f"Not in the mean, since they have no result at {effective.trained} tokens: {others}.")
        for length, tasks in effective.incomplete.items():
            left.append(f"No mean at {length}: no result of {', '.join(tasks)}.")
    prompts = scores.settings.get("limit")
    note = f"In percent{f', {prompts} prompts each' if prompts else ''}."
    title, heads = f"Benchmarks, RULER, {series.name}", list(map(str, lengths))
    return Table(title, note, section, heads, lines, None, tuple(left))


def _kept(found: EffectiveLength, length: int, row: Row) -> Cell:
    text = f"{100 * found.kept[length]:.0f} %"
    if length not in found.intervals or length == found.trained:
        return Cell(text, row, 100 * found.kept[length], None, "%")
    low, high = (100 * bound for bound in found.intervals[length])
    return Cell(f"{text} [{low:.0f}, {high:.0f}]", row, 100 * found.kept[length], (low, high), "%")
