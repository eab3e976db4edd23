"""Passkey contexts, the two figures of the paper's table 5: computed from accuracies by length, as rows and a table."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from statistics import fmean

from scaled_rope.evaluation.formatting import format_table
from scaled_rope.evaluation.jobs import ModelJob
from scaled_rope.evaluation.statistics import PASSED
from scaled_rope.results import Row, append_row, finished_keys, row_key


def passkey_context(accuracies: Mapping[int, float]) -> tuple[int | None, float | None]:
    """Compute the two figures of table 5 from accuracies by context length (tokens).

    The largest length with an accuracy of at least `PASSED`, regardless of shorter ones, and the mean accuracy over the
    lengths up to it; None and None when no length passes.
    """
    passed = [length for length, accuracy in accuracies.items() if accuracy >= PASSED]
    if not passed:
        return None, None
    return max(passed), fmean(accuracy for length, accuracy in accuracies.items() if length <= max(passed))


def context_rows(rows: Mapping[ModelJob, Mapping[int, Row]]) -> dict[ModelJob, Row]:
    """A row per job with the figures of table 5, from its rows by length; jobs without a measured row are left out.

    The metric is that of the rows with "_context" appended, and `length` the longest one measured.
    """
    found = {}
    for job, cells in rows.items():
        measured = {length: row for length, row in sorted(cells.items()) if "error" not in row}
        if not measured:
            continue
        context, accuracy = passkey_context({length: row["accuracy"] for length, row in measured.items()})
        last = measured[max(measured)]
        prompts = json.dumps([row["data"]["fingerprint"] for row in measured.values()])
        data = {"fingerprint": hashlib.sha256(prompts.encode()).hexdigest()[:16], "lengths": list(measured)}
        found[job] = {
            **job.fields(),
            "metric": f"{last['metric']}_context",
            "data": {"name": last["data"]["name"], **data},
            "protocol": {**last["protocol"], "passed": PASSED},
            "length": max(measured),
            "context": context,
            "accuracy": accuracy,
        }
    return found


def record_contexts(output: str, found: Mapping[ModelJob, Row], record: Row) -> None:
    """Append the rows of `context_rows` that the file does not hold yet. record: their provenance."""
    finished = finished_keys(output)
    for row in found.values():
        if (key := row_key(row)) not in finished:
            finished.add(key)
            append_row(output, {**row, "provenance": record}, once=True)


def context_table(found: Mapping[ModelJob, Row]) -> str:
    """Table 5 for the terminal: a line per job."""
    lines = []
    for job, row in found.items():
        context = "none" if row["context"] is None else str(row["context"])
        accuracy = "" if row["accuracy"] is None else f"{100 * row['accuracy']:.1f} %"
        lines.append([job.name, context, accuracy])
    header = ["", "passkey context", "accuracy up to it"]
    return f"passkey context: largest length with at least {100 * PASSED:.0f} % found\n{format_table(header, lines)}"
