"""Arrange result rows for a report: series (a model under a scaling), topics (the subjects of tables), and tables."""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from scaled_rope.checkpoint import display_name
from scaled_rope.errors import is_number
from scaled_rope.evaluation.controls import CONTROL, Control
from scaled_rope.evaluation.formatting import format_perplexity, format_table
from scaled_rope.evaluation.passkey_context import passkey_context
from scaled_rope.evaluation.pooled_seeds import pooled
from scaled_rope.provenance import portable_model
from scaled_rope.report.cut_prompts import CUT_MARK, cut_words
from scaled_rope.report.loading import Loading, SeriesWords, origin
from scaled_rope.report.row_files import failed_models, newest, read_row_files, row_date
from scaled_rope.results import OUT_OF_MEMORY, Row
from scaled_rope.scaling.record import RopeScaling
from scaled_rope.scaling.registry import METHODS
from scaled_rope.texts.corpora import CORPORA, STANDIN, STANDINS
from scaled_rope.texts.token_documents import TokenSource

Column = tuple[int, str]
"""The key of a table's column: a context length in tokens (0 for none), and a text that tells columns of one length
apart (a benchmark's task, the positions START-END of a bucket)."""

MARKERS = "osD^vPX*"
UNSCALED = -1
"""The color of a series without scaling; others count from 0."""

# In the order of a report.
_NUMBERS = (
    "perplexity",
    "longppl",
    "passkey",
    "passkey_context",
    "passkey_hard",
    "passkey_hard_context",
    "benchmark",
    "quality",
)
_POOLED = ("passkey", "passkey_hard")
_MOST_COLUMNS = 12  # in the terminal
_IN_WORDS = 3  # series that a note on replaced rows names


@dataclass(eq=False)
class Series:
    """One model under one scaling."""

    model: str
    label: str
    scaling: RopeScaling
    carried: bool
    head_dim: int
    name: str = ""
    """The name in plots and tables: the label, with the name of the method in papers where that is another, and with
    the model where labels alone would be ambiguous."""
    method_name: str = ""
    """The scaling alone, named in the same way."""
    color: int = UNSCALED
    """Number of its color; a dynamic scaling has that of its static form."""
    marker: str = "o"
    dashed: bool = False
    aside: bool = False
    """Whether it is no series but something beside one, as its control; it is never the best of a column."""
    words: str = ""
    """The end of the label, which tells it from series of the same model and scaling that were loaded otherwise."""
    loading: Loading = Loading()
    dtype: str = ""
    """The precision, where the model was measured in several."""

    @property
    def full_name(self) -> str:
        """Model and scaling."""
        return f"{display_name(self.model)}, {self.label}"

    @property
    def tuned(self) -> bool:
        """Whether the checkpoint carries a scaling of its own."""
        return self.carried and self.scaling.method != "default"

    @property
    def made_for(self) -> int | None:
        """The length in tokens that the scaling is for; None where L is not known, or where rows don't say it: a
        checkpoint's own factor may be the least only, as Llama 3.1's."""
        if self.carried and METHODS[self.scaling.method].factor_times_original == "least":
            return None
        return self.scaling.max_position_embeddings


@dataclass(frozen=True)
class Topic:
    """The subject of one table: metric, data and protocol, which all of its rows share."""

    metric: str
    data: str
    protocol: tuple[tuple[str, Any], ...]
    text: str = ""
    """Fingerprint of the tokens, for metrics whose values over different tokens cannot be compared; else ""."""
    by_length: bool = True
    """Whether columns are context lengths."""

    @property
    def base(self) -> tuple[Any, ...]:
        """A key that passkeys share with the two figures of the paper's table 5, which are computed from them."""
        protocol = tuple((name, value) for name, value in self.protocol if name != "passed")
        return self.metric.removesuffix("_context"), self.data, protocol, self.text

    def setting(self, name: str, default: Any = None) -> Any:
        """One entry of the protocol."""
        return dict(self.protocol).get(name, default)


@dataclass
class Section:
    """The rows of one topic."""

    topic: Topic
    rows: dict[Series, dict[Column, Row]] = field(default_factory=dict)
    controls: dict[Series, dict[Control, dict[Column, Row]]] = field(default_factory=dict)
    """The same tokens after the last few only, where that was measured."""
    words: str = ""
    """Words that tell the text from another of its name, where there is one."""

    @property
    def columns(self) -> list[Column]:
        """All columns, in order of length, or as they appeared."""
        found = list(dict.fromkeys(column for cells in self.rows.values() for column in cells))
        return sorted(found, key=_order) if self.topic.by_length else found

    def lengths(self, series: Series) -> dict[int, Row]:
        """The rows of a series by context length in tokens, in ascending order.

        Of several position buckets that end at one length, one row is kept, with a value if any has one.
        """
        cells = self.rows.get(series, {})
        ordered = sorted(cells, key=lambda column: (column[0], not cells[column].get("error"), *_order(column)))
        return {column[0]: cells[column] for column in ordered}

    def partitions(self, series: Series) -> list[list[Column]]:
        """Group the position buckets of a series into lines, in which each bucket begins where the one before ends.

        Buckets that were measured with one set of lengths form one line. A bucket that several lines need is in all.
        """
        columns = sorted(self.rows.get(series, {}), key=_order)
        spans = {column: self.rows[series][column]["bucket"] for column in columns}
        left, lines = dict.fromkeys(columns), []
        while left:
            line = [next(iter(left))]
            while before := [column for column in columns if spans[column][1] == spans[line[0]][0]]:
                line.insert(0, before[-1])
            while after := [column for column in columns if spans[column][0] == spans[line[-1]][1]]:
                line.append(next((column for column in after if column in left), after[0]))
            for column in line:
                left.pop(column, None)
            lines.append(line)
        return lines


def _order(column: Column) -> tuple[int, int, str]:
    """The sort key of a column: its length, then the beginning of its bucket."""
    length, other = column
    # Shorter texts first: numbers in them then sort as numbers.
    return length, len(other), other


def topic_of(row: Row) -> Topic:
    """The topic of a row: all that it measured except for the column."""
    metric, protocol, data = row["metric"], dict(row["protocol"]), row["data"]
    protocol.pop("bucket_start", None)
    if control_of(row) is not None:  # it belongs to what it controls
        del protocol["window"], protocol["stride"]
        protocol["name"] = "truncate"
        if (stride := protocol.pop("sliding", None)) is not None:
            protocol |= {"name": "sliding", "stride": stride}
    if metric.startswith("passkey"):
        # Prompts that were drawn with several seeds count together.
        protocol.pop("seed", None)
        protocol.pop("seeds", None)
    if metric == "benchmark":
        # The documents of a task without lengths are in its column, so that all tasks share a table.
        if row["length"] is None:
            return Topic(metric, "", (), by_length=False)
        protocol.pop("metric", None)  # names the length
        return Topic(metric, str(protocol["task"]), _frozen(protocol))
    text = data["fingerprint"] if metric in ("perplexity", "longppl", "quality") else ""
    return Topic(metric, str(data.get("name", metric)), _frozen(protocol), text, not metric.endswith("_context"))


def control_of(row: Row) -> Control | None:
    """The control that a row was measured under, if any."""
    protocol = row["protocol"]
    if protocol.get("name") != CONTROL:
        return None
    return Control(protocol["window"], protocol["stride"])


def _frozen(protocol: Mapping[str, Any]) -> tuple[tuple[str, Any], ...]:
    """The entries that say something, hashable; a list or an object among them as its JSON."""
    return tuple(
        (name, _hashable(value))
        for name, value in sorted(protocol.items(), key=lambda entry: entry[0])
        if value is not None
    )


def _hashable(value: Any) -> Any:
    """A value of a row; a list or an object as its JSON."""
    return json.dumps(value, sort_keys=True) if isinstance(value, list | dict) else value


def column_of(row: Row) -> Column:
    """The column of a row in its topic's table."""
    if row["metric"] == "benchmark" and row["length"] is None:
        protocol = row["protocol"]
        limit = "" if protocol.get("limit") is None else f", first {protocol['limit']}"
        asked = ", chat template" if protocol.get("chat_template") else ""
        return (0, f"{protocol['task']}, {protocol['num_fewshot']}-shot {protocol['metric']}{limit}{asked}")
    if row["metric"].endswith("_context"):
        return 0, ""
    return int(row["length"]), "{}-{}".format(*row["bucket"]) if "bucket" in row else ""


_AMOUNTS = {"documents": "documents", "windows": "windows", "window_tokens": "tokens a window"}
"""Fields of a row's data, and their words."""


def text_read(row: Row) -> dict[str, Any]:
    """How a row's text was read: where it is, and the flags that choose a part of it, as far as the row says."""
    given = row.get("provenance", {}).get("arguments")
    found = given if isinstance(given, Mapping) else {}
    named = found.get("dataset")
    names = [str(name) for name in (named if isinstance(named, list) else [named]) if name]
    mine = [name for name in names if TokenSource(name).title == row["data"].get("name")]
    said = {"subset": row["data"].get("subset"), **{name: found.get(name) for name in ("split", "feature", "samples")}}
    return {"": mine[0] if mine else None, **{name: _hashable(value) for name, value in said.items()}}


def current_rows(rows: Sequence[Row]) -> list[Row]:
    """Leave out rows that newer ones have replaced.

    A file that is appended to keeps rows from before the weights or a text changed. For each model and metric, and each
    way in which the model was loaded, rows with the weights of the newest one are kept, and of these, for each series,
    the rows over the text that it last saw under a name, of those that were read in the same way (`text_read`).
    """
    weights = {origin(row): row["model_fingerprint"] for row in sorted(rows, key=row_date)}
    kept = [row for row in rows if weights[origin(row)] == row["model_fingerprint"]]

    def named(row: Row) -> tuple[Any, ...]:
        topic = topic_of(row)
        # Windows of another length are another measurement, not a newer one.
        window = str(row["data"].get("window_tokens"))
        series = row["model"], row["label"], Loading.of(row), row["dtype"]
        return *series, topic.metric, topic.data, topic.protocol, window, *text_read(row).items()

    texts = {named(row): topic_of(row).text for row in sorted(kept, key=row_date)}
    return [row for row in kept if texts[named(row)] == topic_of(row).text]


def _replaced(known: Sequence[Row], kept: Sequence[Row]) -> str | None:
    """The note on rows that `current_rows` left out: of what, and what about them is older; None if there are none."""
    weights = {(origin(row), row["model_fingerprint"]) for row in kept}
    ids = {id(row) for row in kept}
    left = [row for row in known if id(row) not in ids]
    groups: dict[str, list[Row]] = {}
    for row in left:
        older = "text" if (origin(row), row["model_fingerprint"]) in weights else "weights"
        name = str(row["data"].get("name") or "")
        title = row["metric"] if name in ("", row["metric"]) else f"{row['metric']} {name}"
        words = Loading.of(row).words
        series = f"{row['model']}, {row['label']}{f', {words}' if words else ''}, {row['dtype']}"
        groups.setdefault(f"{title} of {series} (older {older})", []).append(row)
    if not left:
        return None
    said = []
    for title, some in list(groups.items())[:_IN_WORDS]:
        lengths = sorted({row["length"] for row in some if row.get("length") is not None})
        said.append(f"{title}{' at ' if lengths else ''}{', '.join(map(str, lengths))}")
    more = f"; and {len(groups) - _IN_WORDS} more" if len(groups) > _IN_WORDS else ""
    count = f"{len(left)} rows of older weights or texts are" if len(left) > 1 else "1 row of older weights or texts is"
    return f"{count} left out: {'; '.join(said)}{more}"


@dataclass
class ReportRows:
    """Everything that row files hold, in order of appearance."""

    series: list[Series]
    sections: list[Section]
    rows: list[Row]
    notes: list[str]
    """Remarks on rows that were left out, and on what was measured several times."""

    def of(self, *metrics: str) -> list[Section]:
        """The sections of some metrics."""
        return [section for section in self.sections if section.topic.metric in metrics]


def load_results(paths: Sequence[str], finetuned: str | None = None) -> ReportRows:
    """Read row files. Labels of the model `finetuned` say "(fine-tuned)" instead of "(checkpoint)".

    Damaged rows are named in the notes, see `read_row_files`.

    Raises:
        ConfigError: no rows that can be shown.
    """
    finetuned = None if finetuned is None else portable_model(finetuned)
    known, notes = read_row_files(paths, _NUMBERS)
    rows = current_rows(known)
    if note := _replaced(known, rows):
        notes.append(note)
    notes += failed_models(paths, known)
    words_of = SeriesWords(rows)
    series: dict[tuple[str, str], Series] = {}
    sections: dict[Topic, Section] = {}
    drawn: dict[tuple[int, Column], list[Row]] = {}  # of several seeds
    for row in rows:
        label = row["label"].replace("(checkpoint)", "(fine-tuned)") if row["model"] == finetuned else row["label"]
        words = words_of(row)
        label += words
        scaling = RopeScaling.from_dict(row["scaling"])
        new = Series(row["model"], label, scaling, row["carried"], row["head_dim"], words=words)
        new.loading, new.dtype = Loading.of(row), words_of.precision(row)
        one = series.setdefault((row["model"], label), new)
        section = sections.setdefault(topic_of(row), Section(topic_of(row)))
        control, column = control_of(row), column_of(row)
        if control is None:
            cells = section.rows.setdefault(one, {})
        else:
            cells = section.controls.setdefault(one, {}).setdefault(control, {})
        if row["metric"] in _POOLED:
            together = drawn.setdefault((id(cells), column), [])
            together.append(row)
            cells[column] = pooled(sorted(together, key=row_date))
            continue
        # Of a benchmark's rows over other documents, too, the newest is shown.
        cells[column] = newest([cells[column], row]) if column in cells else row
    _retell_contexts(list(sections.values()))
    alone = [sections.pop(topic) for topic in list(sections) if not sections[topic].rows]
    if count := sum(len(cells) for one in alone for found in one.controls.values() for cells in found.values()):
        notes.append(f"{count} rows of controls without the measurement that they control are left out")
    notes += _tell_texts_apart(list(sections.values()))
    _style(list(series.values()))
    # By metric, then as they appeared; topics with one base stay together.
    bases = list(dict.fromkeys(topic.base for topic in sections))
    ordered = sorted(sections.values(), key=lambda one: bases.index(one.topic.base))
    ordered.sort(key=lambda one: _NUMBERS.index(one.topic.base[0]))
    return ReportRows(list(series.values()), ordered, rows, notes)


def _tell_texts_apart(sections: Sequence[Section]) -> list[str]:
    """Give sections of one title words for what differs in how their texts were read, or in how much was; where nothing
    does, for their content. Returns the note on texts of one name with different content."""
    alike: dict[str, list[str]] = {}
    groups: dict[str, list[Section]] = {}
    for section in sections:
        if section.topic.text:
            groups.setdefault(title_of(section), []).append(section)
    for some in groups.values():
        rows = [next(row for cells in one.rows.values() for row in cells.values()) for one in some]
        read = [text_read(row) | {name: row["data"].get(name) for name in _AMOUNTS} for row in rows]
        differing = [name for name in read[0] if len({str(one[name]) for one in read}) > 1]
        for section, one in zip(some, read, strict=True):
            known = [name for name in differing if one[name] is not None]
            said = [f"{one[name]} {_AMOUNTS[name]}" if name in _AMOUNTS else f"{name} {one[name]}" for name in known]
            section.words = f" ({', '.join(word.strip() for word in said)})" if said else ""
        words = [section.words for section in some]
        for section in [one for one in some if words.count(one.words) > 1]:
            content = section.topic.text[:8]
            alike.setdefault(section.topic.data or "text", []).append(content)
            section.words = f"{section.words[:-1]}, content {content})" if section.words else f" (content {content})"
    if not alike:
        return []
    said = [f"{name} ({', '.join(dict.fromkeys(found))})" for name, found in alike.items()]
    return [
        "texts of one name have different content, so that each has tables of its own, and models are compared only "
        f"over the same: {'; '.join(said)}"
    ]


def _retell_contexts(sections: Sequence[Section]) -> None:
    """Compute passkey contexts from all keys of a series: each run of the evaluator writes that of its own lengths."""
    for section in sections:
        asked = section.topic.metric.removesuffix("_context")
        keys = [one for one in sections if (one.topic.metric, one.topic.base) == (asked, section.topic.base)]
        for series, cells in section.rows.items() if asked != section.topic.metric else ():
            found = {length: row for one in keys for length, row in one.lengths(series).items() if not row.get("error")}
            for column, row in cells.items():
                if found.keys() >= set(row["data"].get("lengths") or [row["length"]]):
                    context, accuracy = passkey_context({length: found[length]["accuracy"] for length in sorted(found)})
                    data = {**row["data"], "lengths": sorted(found)}
                    cells[column] = {
                        **row,
                        "data": data,
                        "length": max(found),
                        "context": context,
                        "accuracy": accuracy,
                    }


def _style(series: Sequence[Series]) -> None:
    """Give each series its name, color and marker.

    A dynamic scaling is drawn dashed in the color of the static form beside it, where there is one.
    """
    for one in series:
        one.method_name = _method_name(one.scaling, [other.scaling for other in series])
    names = [_named(one) for one in series]
    static: dict[tuple[str, str, str], int] = {}
    taken = 0
    for one in sorted(series, key=lambda one: one.scaling.dynamic or one.scaling.method.startswith("dynamic-")):
        name = _named(one)
        one.name = name if names.count(name) == 1 else f"{display_name(one.model)}, {name}"
        one.marker = MARKERS[series.index(one) % len(MARKERS)]
        one.dashed = one.scaling.dynamic or one.scaling.method.startswith("dynamic-")
        if one.scaling.method == "default":
            continue
        method = (one.model, one.words, one.scaling.method.removeprefix("dynamic-"))
        if one.dashed and method in static:
            one.color = static.pop(method)
        else:
            one.color, taken = taken, taken + 1
            static.setdefault(method, one.color)


_IN_PAPERS = {"linear": "PI", "ntk": "NTK-aware"}
"""Methods that papers call otherwise than flags do."""
_SHORT = {
    r"beta_fast=([^,)]+), beta_slow=([^,)]+)": r"β \1 and \2",
    r"beta_(fast|slow)=": r"β \1 ",
    r"attention_factor=": "attention ",
}
"""Parameters whose names are too long for a legend."""
_WITH_BETAS = ("yarn", "ntk-by-parts")
"""Methods whose constants the paper chose for LLaMA; other models have others that fit them better."""


def _method_name(scaling: RopeScaling, others: Sequence[RopeScaling]) -> str:
    """The name of a scaling in plots and tables: "PI (linear x8)", "yarn x8", "yarn x8 (β 8 and 0.75)".

    Beside others with constants of their own, one with those of the paper says so.
    """
    label, own = scaling.label, scaling.label
    for words, shown in _SHORT.items():
        label = re.sub(words, shown, label)
    if scaling.method in _IN_PAPERS:
        return f"{_IN_PAPERS[scaling.method]} ({label})"
    if scaling.method in _WITH_BETAS and any(other.label.startswith(f"{own} (") for other in others):
        return f"{label} (constants of the paper)"
    return label


def _named(series: Series) -> str:
    """The label of a series with its scaling named as `_method_name` does."""
    own = series.scaling.label
    return series.method_name + series.label.removeprefix(own) if series.label.startswith(own) else series.label


def common_contexts(series: Iterable[Series]) -> tuple[int | None, int | None]:
    """The trained and the extended context length (tokens) that the series have in common, None where they differ."""
    known = list(series)
    trained = {one.scaling.original_max_position_embeddings for one in known}
    extended = {one.made_for for one in known if one.scaling.factor > 1}
    return (trained.pop() if len(trained) == 1 else None, extended.pop() if len(extended) == 1 else None)


# ----------------------------------------------------------------------------------------------------------- tables


@dataclass(frozen=True)
class Cell:
    """One number of a table."""

    text: str = ""
    row: Row | None = None
    value: float | None = None
    interval: tuple[float, float] | None = None
    """The 95 % interval."""
    unit: str = ""
    cut: str = ""
    """How many of its prompts were cut, see `cut_words`."""

    @property
    def marked(self) -> str:
        """The text, with a mark where prompts were cut."""
        return f"{self.text}{CUT_MARK}" if self.cut else self.text

    @property
    def share(self) -> float | None:
        """The value as a share from 0 to 1, where it is one."""
        return None if self.value is None or self.unit != "%" else self.value / 100


@dataclass(frozen=True)
class Table:
    """A topic's numbers: a line per series, a cell per column."""

    title: str
    note: str
    section: Section
    columns: list[str]
    lines: list[tuple[Series, list[Cell]]]
    lower_is_better: bool | None = None
    """None: no value is marked as the best."""
    remarks: tuple[str, ...] = ()
    """Notes on rows that are left out and why, shown wherever the table is."""

    @property
    def heading(self) -> str:
        """The title without the section's title in front."""
        short = self.title.removeprefix(f"{title_of(self.section)}, ")
        return short[:1].upper() + short[1:]

    @property
    def told(self) -> tuple[str, ...]:
        """The remarks, and one on prompts that were cut, where a cell has that mark."""
        where: dict[str, list[str]] = {}
        for series, cells in self.lines:
            for column, cell in zip(self.columns, cells, strict=True):
                if cell.cut:
                    where.setdefault(cell.cut, []).append(f"{series.name}, {column}")
        said = "; ".join(f"{words} ({'; '.join(places)})" for words, places in where.items())
        return (*self.remarks, f"{CUT_MARK} {said}.") if said else self.remarks

    @property
    def best(self) -> list[set[str]]:
        """For each column, the texts of the best values (as they are shown, so that ties are ties)."""
        found: list[set[str]] = []
        compared = [cells for series, cells in self.lines if not series.aside]
        for index in range(len(self.columns)):
            cells = [line[index] for line in compared]
            values = {cell.value for cell in cells if cell.value is not None}
            if self.lower_is_better is None or len(values) < 2:
                found.append(set())
                continue
            best = min(values) if self.lower_is_better else max(values)
            found.append({cell.text for cell in cells if cell.value == best})
        return found

    def text(self) -> str:
        """The table for a terminal; of very many columns, only every second, third and so on."""
        count = len(self.columns)
        step = -(-count // _MOST_COLUMNS)
        shown = range((count - 1) % step, count, step)
        lines = [[series.name, *(cells[index].marked for index in shown)] for series, cells in self.lines]
        some = f" (every {step}th of {count} columns)" if step > 1 else ""
        table = format_table(["", *(self.columns[index] for index in shown)], lines)
        return "\n".join([f"{self.title}{some}", table, *unmeasured(self.section), *self.told])


def _interval(row: Row, name: str = "interval", scale: float = 1.0) -> tuple[float, float] | None:
    bounds = row.get(name)
    if not bounds or None in bounds:
        return None
    return scale * bounds[0], scale * bounds[1]


def perplexity_cell(row: Row, bucket: bool) -> Cell:
    """The perplexity of the first tokens, or of those since the next shorter length."""
    if row.get("error"):
        return Cell(_error(row), row)
    value = row["perplexity_bucket" if bucket else "perplexity"]
    return Cell(format_perplexity(value), row, value, _interval(row, "interval_bucket" if bucket else "interval"))


def key_token_cell(row: Row) -> Cell:
    """The perplexity over key tokens, or that there are none."""
    if row.get("error"):
        return Cell(_error(row), row)
    if not row["key_tokens"]:
        return Cell("none", row)
    return Cell(format_perplexity(row["longppl"]), row, row["longppl"], _interval(row))


def share_cell(row: Row) -> Cell:
    """A benchmark's score, or the right answers out of all; those to questions in percent from 100 on."""
    if row.get("error"):
        return Cell(_error(row), row)
    if row["metric"] == "benchmark":
        unit = row.get("unit") or ""
        return Cell(f"{row['value']:.1f}", row, row["value"], _interval(row), unit, cut_words(row))
    percent = 100 * row["right"] / row["n"]
    counted = row["n"] < 100 or row["metric"].startswith("passkey")
    text = f"{row['right']}/{row['n']}" if counted else f"{percent:.1f}"
    return Cell(text, row, percent, _interval(row, scale=100), "%", cut_words(row))


def _error(row: Row) -> str:
    return "OOM" if row["error"] == OUT_OF_MEMORY else "not measured"


def about(title: str, cell: Cell, what: str) -> str:
    """Describe where one number comes from, in lines of text: the first is `title`, the last the command."""
    row = cell.row
    assert row is not None  # an empty cell has nothing to say
    record = row["provenance"]
    value = row.get("error") or f"{cell.text}{' %' if cell.unit == '%' and '/' not in cell.text else ''}"
    if cell.interval:
        low, high = (format_perplexity(bound) for bound in cell.interval)
        value += f" (95 % interval {low} to {high}{' %' if cell.unit == '%' else ''})"
    counted = [f"{row[name]:,} {name}" for name in ("targets", "n") if row.get(name) is not None]
    data = row["data"]
    counted += [f"{data[name]} {name}" for name in ("documents", "questions") if data.get(name) is not None]
    cost = [] if row.get("seconds") is None else [f"{row['seconds']:g} s"]
    if row.get("peak_memory"):
        cost.append(f"peak memory {row['peak_memory'] / 2**30:.2f} GiB")
    versions = record.get("versions", {})
    lines = [
        title,
        f"{what}: {value}",
        ", ".join(counted),
        cell.cut or cut_words(row),
        ", ".join([f"weights {row['model_fingerprint']}", row["dtype"], *cost]),
        f"commit {(record['commit'] or 'unknown')[:12]}, torch {versions.get('torch', 'unknown')}, {record['device']}, "
        f"{record['date']}",
        record.get("command", ""),
    ]
    return "\n".join(filter(None, lines))


def describe(section: Section) -> str:
    """Say in one sentence what was measured and how."""
    topic = section.topic
    rows = [row for cells in section.rows.values() for row in cells.values()]
    data = rows[0]["data"]
    said = []
    for name in ("documents", "windows", "questions"):
        count = data.get(name)
        if count is not None and (name != "windows" or count != data.get("documents")):
            said.append(f"{count} {name if count != 1 else name[:-1]}")
    if "window_tokens" in data:
        said.append(f"of {data['window_tokens']} tokens")
    protocol = dict(topic.protocol)
    if topic.metric == "perplexity":
        said.append(
            f"sliding windows, stride {protocol['stride']}"
            if protocol.get("name") == "sliding"
            else "cut at each length"
        )
        said.append("windows weigh the same" if protocol.get("weighting") == "window" else "tokens weigh the same")
    elif topic.metric == "longppl":
        said.append(f"key tokens chosen by {protocol['evaluator']}")
        said.append(f"which gain by what stands before the last {protocol['window']} tokens")
    else:
        if "iterations" in protocol:
            said.append(f"{protocol['iterations']} prompts per length")
        left = {name: value for name, value in protocol.items() if name not in ("name", "task", "passed", "iterations")}
        said += [f"{name.replace('_', ' ')} {value}" for name, value in left.items()]
        seeds = sorted({seed for row in rows for seed in _seeds(row)}) if topic.metric.startswith("passkey") else []
        if seeds:
            said.append(f"for each of the seeds {', '.join(map(str, seeds))}" if len(seeds) > 1 else f"seed {seeds[0]}")
    if any(row.get("error") == OUT_OF_MEMORY for row in rows):
        said.append("OOM: ran out of memory")
    name = str(data.get("name", ""))
    held_out = any(name in corpus.folders for corpus in CORPORA.values())  # a folder, though named as a stand-in is
    text = None if held_out else STANDINS.get(name.removeprefix(STANDIN))
    return "; ".join([", ".join(said), *([text.seen] if text else []), *unmeasured(section)])


def _seeds(row: Row) -> list[int]:
    """The seeds that a row's prompts were drawn with."""
    protocol = row["protocol"]
    seeds = protocol.get("seeds", [protocol.get("seed")])
    return [seed for seed in seeds if seed is not None]


def unmeasured(section: Section) -> list[str]:
    """The reasons, beside running out of memory, for which something could not be measured: a text for each."""
    where: dict[str, list[str]] = {}
    for cells in section.rows.values():
        for (length, other), row in cells.items():
            if row.get("error") and row["error"] != OUT_OF_MEMORY:
                where.setdefault(str(row["error"]), []).append(other or str(length))
    return [f"not measured at {' and '.join(dict.fromkeys(at))}: {why}" for why, at in where.items()]


_TITLES = {
    "passkey": "Passkeys found",
    "passkey_hard": "Numbered passkeys found in text",
    "passkey_context": "Passkey context",
    "passkey_hard_context": "Passkey context, numbered keys in text",
    "benchmark": "Benchmarks",
    "quality": "Long-document questions answered",
}


def title_of(section: Section) -> str:
    """A section's heading."""
    topic = section.topic
    if topic.metric == "perplexity":
        where = " in sliding windows" if topic.setting("name") == "sliding" else ""
        return f"Perplexity{where}, {topic.data or 'text'}{section.words}"
    if topic.metric == "longppl":
        return f"LongPPL, {topic.data or 'text'}{section.words}"
    title = _TITLES[topic.metric]
    if topic.setting("wording") is not None:
        title += f", {topic.setting('wording')} wording"
    plain = topic.data in ("", topic.metric, "passkey") or topic.metric.startswith("passkey_hard")
    return title + section.words if plain else f"{title}, {topic.data}{section.words}"


def tables_of(section: Section) -> list[Table]:
    """The tables of one section, one or two."""
    topic, columns = section.topic, section.columns

    def table(title: str, note: str, header: list[str], cell: Callable[[Row], Cell], lower: bool | None) -> Table:
        lines = [
            (series, [cell(cells[column]) if column in cells else Cell() for column in columns])
            for series, cells in section.rows.items()
        ]
        return Table(title, note, section, header, lines, lower)

    title = title_of(section)
    lengths = [str(length) for length in dict.fromkeys(length for length, _ in columns)]
    if topic.metric == "perplexity":
        whole = [
            (series, [perplexity_cell(found[int(one)], False) if int(one) in found else Cell() for one in lengths])
            for series, found in ((series, section.lengths(series)) for series in section.rows)
        ]
        if topic.setting("name") == "sliding":
            for series, controls in section.controls.items():
                for control, found in controls.items():
                    cells = [perplexity_cell(found[one], False) if one in found else Cell() for one in columns]
                    whole.append((beside(series, control), cells))
            return [Table(f"{title}, by window", "Every token once.", section, lengths, whole, True)]
        spans = [span for _, span in columns]
        note = "Tokens between two positions. Buckets differ in text: compare down the columns."
        by_bucket = table(f"{title}, by position bucket", note, spans, lambda r: perplexity_cell(r, True), True)
        for series, controls in section.controls.items():
            for control, found in controls.items():
                cells = [perplexity_cell(found[one], True) if one in found else Cell() for one in columns]
                by_bucket.lines.append((beside(series, control), cells))
        return [
            by_bucket,
            Table(f"{title}, by context length", "All tokens of the first L.", section, lengths, whole, True),
        ]
    if topic.metric == "longppl":
        note = "Perplexity over the tokens that only far context predicts; the evaluator's own is flattered."
        by_length = table(f"{title}, by context length", note, lengths, key_token_cell, True)
        rows = [next((row for cells in section.rows.values() if "key_tokens" in (row := cells.get(one, {}))), {})
                for one in columns]  # fmt: skip
        counts = [Cell(str(row.get("key_tokens", ""))) for row in rows]
        by_length.lines.append((_aside(section, "key tokens"), counts))
        return [by_length]
    if topic.metric.endswith("_context"):
        return [_context_table(section, title)]
    if topic.by_length:
        found_keys = table(f"{title}, by context length", "Right of all.", lengths, share_cell, False)
        found_keys.lines.extend(_within_reach(section))
        return [found_keys]
    note = "In percent, with 95 % intervals."
    return [table(title, note, [name for _, name in columns], share_cell, False)]


def beside(series: Series, control: Control) -> Series:
    """The line of a control in tables and figures."""
    words = f"last {control.window} tokens only"
    label = f"{series.label}, {words}"
    return replace(series, name=f"{series.name}, {words}", label=label, marker="", dashed=True, aside=True)


def within_reach(row: Row, window: int) -> int | None:
    """The number of a row's prompts whose key stands within the last `window` tokens; None where rows don't say."""
    prompts = row.get("prompts") or [{}]
    if not all(isinstance(prompt, Mapping) and is_number(prompt.get("distance")) for prompt in prompts):
        return None
    return sum(int(prompt["distance"]) <= window for prompt in prompts)


def _within_reach(section: Section) -> list[tuple[Series, list[Cell]]]:
    """A line with the keys that cutting prompts to the trained context would keep: no model needs more to find them."""
    trained, _ = common_contexts(section.rows)
    if trained is None or not section.topic.metric.startswith("passkey"):
        return []
    cells = []
    for column in section.columns:
        row = next(found[column] for found in section.rows.values() if column in found)
        count = None if row.get("error") else within_reach(row, trained)
        cells.append(Cell() if count is None else share_cell({**row, "right": count, "interval": None}))
    if all(cell.row is None for cell in cells):
        return []
    words = f"within the last {trained} tokens (computed)"
    return [(_aside(section, words), cells)]


def _aside(section: Section, words: str) -> Series:
    """A line that is no series."""
    first = next(iter(section.rows))
    return replace(first, name=words, label=words, color=UNSCALED, marker="", dashed=True, aside=True)


def _context_table(section: Section, title: str) -> Table:
    """The two figures of the paper's table 5."""
    lines = []
    for series, cells in section.rows.items():
        (row,) = cells.values()
        context, accuracy = row["context"], row["accuracy"]
        mean = Cell("", row) if accuracy is None else Cell(f"{100 * accuracy:.1f}", row, 100 * accuracy, None, "%")
        lines.append((series, [Cell("none" if context is None else str(context), row, context), mean]))
    share = f"{100 * section.topic.setting('passed', 0.8):.0f} %"
    note = f"The longest length at which at least {share} are found, and the mean accuracy in percent up to it."
    return Table(title, note, section, ["context (tokens)", "accuracy (%)"], lines, False)


def to_csv(tables: Iterable[Table]) -> list[list[str]]:
    """One line per number, under `CSV_HEADER`."""
    lines = []
    for table in tables:
        for series, cells in table.lines:
            for column, cell in zip(table.columns, cells, strict=True):
                if cell.row is None:
                    continue
                record = cell.row["provenance"]
                low, high = cell.interval or ("", "")
                value = cell.row.get("error", cell.text) if cell.value is None else repr(cell.value)
                where = [table.title, series.model, series.label, column]
                numbers = ["", value, str(low), str(high), str(cell.row.get("n") or cell.row.get("targets") or "")]
                lines.append([*where, *numbers, cell.cut, record.get("commit") or "", record.get("date") or ""])
    return lines


CSV_HEADER = [
    "table", "model", "scaling", "column", "published", "measured", "low", "high", "n", "status", "commit", "date"
]  # fmt: skip


def csv_text(lines: Iterable[Sequence[str]]) -> str:
    """The lines of `to_csv` under their header."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(CSV_HEADER)
    writer.writerows(lines)
    return text.getvalue()
