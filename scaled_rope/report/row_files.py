"""Read row files for a report: damaged rows are named and left out, and of several measurements the newest is kept."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from scaled_rope.checkpoint import display_name
from scaled_rope.errors import ConfigError, is_number, is_positive_whole
from scaled_rope.evaluation.controls import CONTROL
from scaled_rope.evaluation.failures import failures_file
from scaled_rope.results import Row, row_key, rows_so_far
from scaled_rope.scaling.record import RopeScaling

_PROVENANCE = ("command", "commit", "versions", "device", "cpu_count", "date", "seed")
_LARGEST = 1e100
"""The largest perplexity that is believed: a mean loss of 230 nats."""
_IN_WORDS = 3  # measurements that a note names, of those that were made several times


# ---------------------------------------------------------------------------------------------------------- one row


def _is_pair(value: Any) -> bool:
    if not (isinstance(value, list) and len(value) == 2 and all(bound is None or is_number(bound) for bound in value)):
        return False
    return None in value or value[0] <= value[1]


def _is_span(value: Any) -> bool:
    if not (isinstance(value, list) and len(value) == 2 and all(isinstance(end, int) and end >= 0 for end in value)):
        return False
    return bool(value[0] < value[1])


def _is_perplexity(value: Any) -> bool:
    return value is None or (is_number(value) and 0.999 <= value <= _LARGEST)  # 1, but for rounding


def _is_interval_of_perplexity(value: Any) -> bool:
    # Student's interval of two documents is wide, and its lower end can be below 1.
    return value is None or (_is_pair(value) and all(bound is None or bound > 0 for bound in value))


def _is_count(value: Any) -> bool:
    return value == 0 or is_positive_whole(value)


def _is_prompt(value: Any) -> bool:
    if not (isinstance(value, dict) and is_number(value.get("depth")) and isinstance(value.get("right"), bool)):
        return False
    return 0 <= value["depth"] <= 1 and is_number(value.get("distance", 0))


def _are_outcomes(value: Any) -> bool:
    return isinstance(value, dict) and all(
        isinstance(found, list) and found and all(map(is_number, found)) for found in value.values()
    )


_Check = tuple[Callable[[Any], bool], str]
_TEXT: _Check = (lambda value: isinstance(value, str), "text")
_TEXT_OR_NONE: _Check = (lambda value: value is None or isinstance(value, str), "text or null")
_OBJECT: _Check = (lambda value: isinstance(value, dict), "an object")
_WHOLE: _Check = (is_positive_whole, "a whole number of at least 1")
_COUNT: _Check = (_is_count, "a whole number")
_COUNT_OR_NONE: _Check = (lambda value: value is None or _is_count(value), "a whole number or null")
_NUMBER: _Check = (is_number, "a number")
_NUMBER_OR_NONE: _Check = (lambda value: value is None or is_number(value), "a number or null")
_PERPLEXITY: _Check = (_is_perplexity, "a number or null; a perplexity is 1 to 1e100")
_INTERVAL: _Check = (lambda value: value is None or _is_pair(value), "two numbers, or null; the larger comes last")
_PERPLEXITIES: _Check = (_is_interval_of_perplexity, "two numbers above 0, or null; the larger comes last")
_TRUTH: _Check = (lambda value: isinstance(value, bool), "true or false")
_SPAN: _Check = (_is_span, "two positions, the first before the second")
_WHOLES: _Check = (
    lambda value: isinstance(value, list) and bool(value) and all(map(is_positive_whole, value)),
    "a list of whole numbers of at least 1",
)
_PROMPTS: _Check = (lambda value: isinstance(value, list) and all(map(_is_prompt, value)), "a list of prompts")

_EVERY: Mapping[str, _Check] = {
    "model": _TEXT,
    "model_fingerprint": _TEXT,
    "dtype": _TEXT,
    "label": _TEXT,
    "scaling": _OBJECT,
    "carried": _TRUTH,
    "head_dim": _WHOLE,
    "data": _OBJECT,
    "protocol": _OBJECT,
    "provenance": _OBJECT,
}
_FOUND: Mapping[str, _Check] = {"right": _COUNT, "n": _WHOLE}
_CONTEXT: Mapping[str, _Check] = {"context": _COUNT_OR_NONE, "accuracy": _NUMBER_OR_NONE}
_MEASURED: Mapping[str, Mapping[str, _Check]] = {
    "perplexity": {"perplexity": _PERPLEXITY, "perplexity_bucket": _PERPLEXITY, "bucket": _SPAN},
    "passkey": _FOUND,
    "passkey_hard": _FOUND,
    "quality": _FOUND,
    "passkey_context": _CONTEXT,
    "passkey_hard_context": _CONTEXT,
    "benchmark": {"value": _NUMBER, "n": _COUNT},
    "longppl": {"longppl": _PERPLEXITY, "key_tokens": _COUNT, "tokens": _COUNT},
}
"""Metric -> the fields that a row with a measurement has."""
_OPTIONAL: Mapping[str, _Check] = {
    "interval": _INTERVAL,
    "interval_bucket": _INTERVAL,
    "bucket": _SPAN,
    "unit": _TEXT_OR_NONE,
    "error": _TEXT_OR_NONE,
    "targets": _COUNT_OR_NONE,
    "seconds": _NUMBER_OR_NONE,
    "peak_memory": _NUMBER_OR_NONE,
    "prompts": _PROMPTS,
    "outcomes": (_are_outcomes, "a list of numbers for each task"),
    "server": _OBJECT,
}
_INSIDE: Mapping[str, Mapping[str, Mapping[str, _Check]]] = {
    "perplexity": {"data": {"fingerprint": _TEXT}},
    "quality": {"data": {"fingerprint": _TEXT}},
    "longppl": {"data": {"fingerprint": _TEXT}, "protocol": {"window": _WHOLE, "evaluator": _TEXT}},
    "benchmark": {"protocol": {"task": _TEXT, "num_fewshot": _COUNT, "metric": _TEXT}},
}
"""Metric -> object -> fields in it that are read."""
_INSIDE_OPTIONAL: Mapping[str, Mapping[str, _Check]] = {
    "data": {"documents": _WHOLE, "lengths": _WHOLES},
    "protocol": {
        "seed": _COUNT_OR_NONE,
        "max_length": _COUNT_OR_NONE,
        "max_tokens": _COUNT_OR_NONE,
        "passed": _NUMBER,
        "seeds": (lambda value: isinstance(value, list) and all(map(_is_count, value)), "a list of whole numbers"),
    },
    "server": {"url": _TEXT_OR_NONE, "name": _TEXT_OR_NONE},
}
"""Object -> fields in it that rows of every metric may have."""
_CONTROLLED: Mapping[str, _Check] = {"window": _WHOLE, "stride": _WHOLE}
_SUMS = {
    "bucket": "perplexity_bucket",
    "bucket_block": "perplexity_bucket",
    "block": "perplexity",
    "document": "perplexity",
}
"""Sums that rows of perplexity list as NAME_nats, with NAME_targets -> the perplexity that follows from them."""
_RECORD: Mapping[str, _Check] = {
    "command": _TEXT,
    "commit": _TEXT_OR_NONE,
    "versions": _OBJECT,
    "date": _TEXT,
}


def is_sliding(row: Row) -> bool:
    """Whether a row of perplexity is about sliding windows, which have no position buckets, or about their control."""
    protocol = row["protocol"]
    return protocol.get("name") == "sliding" or "sliding" in protocol


def damage(row: Row) -> str | None:
    """Why a row of an evaluator cannot be shown: the field, its value and what is allowed; None if it can."""
    metric = row["metric"]
    told = [_problem(row, _EVERY), _problem(row, {name: check for name, check in _OPTIONAL.items() if name in row})]
    if any(told):
        return next(filter(None, told))
    length, loose = row.get("length"), metric == "benchmark" or metric.endswith("_context")
    if not (is_positive_whole(length) or (length is None and loose)):
        return _told("length", length, "a whole number of at least 1")
    for name, fields in _INSIDE.get(metric, {}).items():
        told.append(_problem(row[name], fields, f"{name}."))
    for name, fields in _INSIDE_OPTIONAL.items():
        inner = row.get(name, {})
        told.append(_problem(inner, {one: check for one, check in fields.items() if one in inner}, f"{name}."))
    if row["protocol"].get("name") == CONTROL:
        told.append(_problem(row["protocol"], _CONTROLLED, "protocol."))
    if row["protocol"].get("name") == "sliding":
        told.append(_problem(row["protocol"], {"stride": _WHOLE}, "protocol."))
    told.append(
        _problem(row["provenance"], {name: _RECORD.get(name, _ANYTHING) for name in _PROVENANCE}, "provenance.")
    )
    if not row.get("error"):
        fields = dict(_MEASURED.get(metric, {}))
        if metric == "perplexity" and is_sliding(row):
            fields = {"perplexity": fields["perplexity"]}
        told.append(_problem(row, fields))
        if "right" in _MEASURED.get(metric, {}) and not any(told) and row["right"] > row["n"]:
            told.append(_told("right", row["right"], f"at most n, {row['n']}"))
    elif metric == "perplexity" and not is_sliding(row):
        told.append(_problem(row, {"bucket": _SPAN}))
    if not any(told) and metric in ("perplexity", "longppl"):
        told.append(_problem(row, {name: _PERPLEXITIES for name in ("interval", "interval_bucket") if name in row}))
    if not any(told) and metric == "perplexity":
        told.append(_sums_problem(row))
    if any(told):
        return next(filter(None, told))
    try:
        RopeScaling.from_dict(row["scaling"])
        row_key(row)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        return f"field 'scaling' cannot be read: {str(error).splitlines()[0] if str(error) else type(error).__name__}"
    return None


_ANYTHING: _Check = (lambda value: True, "")


def _problem(row: Mapping[str, Any], fields: Mapping[str, _Check], inside: str = "") -> str | None:
    for name, (holds, allowed) in fields.items():
        if name not in row:
            return f"there is no field {inside + name!r}"
        if not holds(row[name]):
            return _told(inside + name, row[name], allowed)
    return None


def _sums_problem(row: Row) -> str | None:
    """Why the sums that a row of perplexity lists cannot be compared with those of another."""
    if "bucket_targets" in row and not is_positive_whole(row["bucket_targets"]):
        return _told("bucket_targets", row["bucket_targets"], _WHOLE[1])
    for units, value in _SUMS.items():
        name = f"{units}_nats"
        if name not in row:
            continue
        listed = row[name]
        if units == "bucket":
            if not (isinstance(listed, list) and listed and all(isinstance(one, list) and one for one in listed)):
                return _told(name, listed, "a list of numbers for each document")
            sums = [one for document in listed for one in document]
            if why := _problem(row, {"bucket_targets": _WHOLE}):
                return why
            targets = [row["bucket_targets"] / len(sums)] * len(sums)
        else:
            if why := _problem(row, {f"{units}_targets": _WHOLES}):
                return why
            sums, targets = listed, row[f"{units}_targets"]
            if not (isinstance(sums, list) and len(sums) == len(targets)):
                return _told(name, sums, f"a list of as many numbers as {units}_targets, {len(targets)}")
        # A sum that overflowed is null, and so is the perplexity then.
        nothing, most = row.get(value) is None, math.log(_LARGEST)
        for one, count in zip(sums, targets, strict=True):
            if not (nothing if one is None else is_number(one) and -0.001 * count <= one <= most * count):
                null = f"; null only where {value} is null" if one is None else ""
                return _told(name, one, f"numbers, 0 to {most:.0f} for each target{null}")
        if "block" in units and (why := _problem(row["data"], {"documents": _WHOLE}, "data.")):
            return why
    return None


def _told(name: str, value: Any, allowed: str) -> str:
    shown = json.dumps(value, default=str)
    return f"field {name!r} is {shown if len(shown) <= 40 else shown[:40] + ' ...'}; must be {allowed}"


# ------------------------------------------------------------------------------------------------------------- files


def read_row_files(paths: Sequence[str], metrics: Collection[str]) -> tuple[list[Row], list[str]]:
    """The rows of `metrics` in files, in order, and notes on what was left out. Each measurement is there once.

    Rows measured the same thing if they have one `row_key`. The newest by its date is kept, but none that failed if
    another did not; of several with one date, the last.

    Raises:
        ConfigError: a file that cannot be read, or no row that can be shown.
    """
    found: dict[str, list[Row]] = {}
    damaged: list[str] = []
    others: list[str] = []
    for path in paths:
        for number, line in _lines(path):
            row, why = _parsed(line)
            metric = row.get("metric") if row is not None else None
            if row is not None and isinstance(metric, str) and metric not in metrics:
                others.append(metric)
                continue
            if row is not None:
                why = damage(row) if isinstance(metric, str) else _problem(row, {"metric": _TEXT})
            if row is None or why:
                damaged.append(f"{path}, line {number}: {why}; the row is left out")
                continue
            found.setdefault(row_key(row), []).append(row)
    if not found:
        raise ConfigError(damaged[0] if damaged else f"no rows of the evaluators in {', '.join(paths)}")
    notes = list(damaged)
    if others:
        notes.append(f"{len(others)} rows of other kinds are left out: {', '.join(sorted(set(others)))}")
    repeated = [each for each in map(_distinct, found.values()) if len(each) > 1]
    if repeated:
        notes.append(_repeated(repeated))
    return [newest(each) for each in found.values()], notes


def failed_models(paths: Sequence[str], rows: Sequence[Row]) -> list[str]:
    """A sentence on each model that could not be measured, from the records beside row files, without those of which
    there are newer rows.

    rows: those of the files.
    """
    said: dict[str, None] = {}
    for path in paths:
        for record in rows_so_far(failures_file(path)):
            metric, job, task, why, date = (str(record.get(name, "")) for name in _FAILED)
            if not metric or not job or any(_has_succeeded(row, metric, job, task, date) for row in rows):
                continue
            said[f"{metric} of {job}{f' on {task}' if task else ''} could not be measured: {why}"] = None
    return list(said)


_FAILED = ("metric", "job", "task", "failed", "date")
"""Fields of a record of `evaluation.failures.keep_failures`."""


def _has_succeeded(row: Row, metric: str, job: str, task: str, date: str) -> bool:
    """Whether a row is a later measurement of what could not be measured.

    job: the model and its label, or the model alone.
    """
    if row.get("error") or row["metric"].removesuffix("_context") != metric or row["provenance"]["date"] < date:
        return False
    name = f"{display_name(row['model'])}, {row['label']}"
    named = {str(row["data"].get("name")), str(row["protocol"].get("task"))}
    return (name == job or name.startswith(f"{job}, ")) and (
        not task or any(task == one or task.startswith(f"{one} ") for one in named)
    )


def newest(rows: Iterable[Row]) -> Row:
    """The newest of several rows, without an error if there is one."""
    return max(reversed(list(rows)), key=lambda row: (not row.get("error"), row_date(row)))


def row_date(row: Row) -> datetime:
    """When a row was measured; in UTC if there is no time zone, and before all others if it is no date."""
    try:
        date = datetime.fromisoformat(row["provenance"]["date"])
    except ValueError:
        return datetime.min.replace(tzinfo=UTC)
    return date if date.tzinfo else date.replace(tzinfo=UTC)


def _distinct(rows: Sequence[Row]) -> list[Row]:
    """Rows without their copies."""
    return list({json.dumps(row, sort_keys=True): row for row in rows}.values())


def _repeated(groups: Sequence[Sequence[Row]]) -> str:
    """The note on what was measured several times."""
    said = []
    for rows in groups[:_IN_WORDS]:
        kept = newest(rows)
        at = "" if kept.get("length") is None else f" at {kept['length']}"
        what = kept["protocol"].get("task") or kept["data"].get("name") or ""
        when = " and ".join(f"{row['provenance']['date']} ({row['provenance']['device']})" for row in rows)
        title = kept["metric"] if what in ("", kept["metric"]) else f"{kept['metric']} {what}"
        said.append(f"{title}{at} of {kept['model']}, {kept['label']}: {when}")
    more = f"; and {len(groups) - _IN_WORDS} more" if len(groups) > _IN_WORDS else ""
    count = f"{len(groups)} measurements were" if len(groups) > 1 else "1 measurement was"
    return f"{count} made more than once, and the newest is shown: {'; '.join(said)}{more}"


def _lines(path: str) -> list[tuple[int, bytes]]:
    """The lines of a file that are not blank, with their numbers. A last line that was cut off is left out."""
    try:
        data = Path(path).read_bytes()
    except OSError as error:
        raise ConfigError(f"file {path!r} cannot be used: {error.strerror or error}") from error
    lines = [(number, line) for number, line in enumerate(data.split(b"\n"), start=1) if line.strip()]
    if lines and not data.endswith(b"\n") and _parsed(lines[-1][1])[0] is None:
        lines.pop()  # it is being written
    return lines


def _parsed(line: bytes) -> tuple[Row | None, str | None]:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return None, "it is not JSON"
    if b"\\ud" in line.lower():
        try:
            json.dumps(row, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            return None, "it has half of a surrogate pair, which is no text"
    return (row, None) if isinstance(row, dict) else (None, "it is not a JSON object")
