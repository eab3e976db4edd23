"""Run benchmarks on many models and scalings; rows that the output lacks are measured and appended to it."""

from __future__ import annotations

import contextlib
import functools
import os
import sys
import textwrap
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from scaled_rope.errors import ConfigError
from scaled_rope.evaluation.continuations import NO_LIMIT
from scaled_rope.evaluation.failures import Failure, failing_alone
from scaled_rope.evaluation.formatting import format_table
from scaled_rope.evaluation.jobs import ModelJob, ModelLoader
from scaled_rope.evaluation.lm_eval_tasks import UnbuiltUnit, Unit, job_cells, model_of_job
from scaled_rope.evaluation.memory_meter import Meter
from scaled_rope.evaluation.ranks import current
from scaled_rope.evaluation.saved_questions import SavedUnit, Scorer, save_requests
from scaled_rope.results import Row, append_row, finished_keys, row_key, rows_so_far

_NOTHING: Row = {"value": None, "unit": None, "standard_error": None, "interval": None, "n": 0, "truncated": 0}
"""The measured fields of a row that could not be measured."""


class Unmeasurable(ConfigError):
    """A task, or one length of it, that has no prompts; its row gives the reason."""


def reasons_of(unit: Unit | UnbuiltUnit | SavedUnit) -> Mapping[int | None, str]:
    """Length, or None -> why a unit cannot be measured there."""
    return {} if isinstance(unit, SavedUnit) else unit.reasons


def _place(unit: Unit | UnbuiltUnit | SavedUnit, length: int | None) -> str:
    return unit.name if length is None else f"{unit.name} at {length}"


@dataclass(frozen=True)
class BenchmarkRun:
    """How benchmarks are measured, and where their rows go.

    Attributes:
        load: the loader of models.
        output: file of the rows.
        max_length: longest prompt in tokens, to which others are cut; None: the model's context.
        batch_size: sequences per forward pass; None: about 16k tokens' worth.
        hide_progress: whether to show no progress.
    """

    load: ModelLoader
    output: str
    max_length: int | None = None
    batch_size: int | None = None
    hide_progress: bool = False

    def measure(
        self,
        jobs: Iterable[ModelJob],
        units_of: Callable[[ModelJob], Iterable[Unit | UnbuiltUnit | SavedUnit]],
        record: Mapping[str, Any],
        failures: list[Failure],
    ) -> list[tuple[str, Row]]:
        """Append the rows that the output lacks; return, for each row, the name of its job and its identifying fields.

        units_of: what to measure on a job. Each unit is measured before the next is asked for, whose prompts may take
            long to make.
        record: provenance of the rows, to which the version of lm-eval is added.
        failures: models and tasks that fail are added to it; the others are measured. A length, or a task, that has
            no prompts is added with its reason, and has a row that says so.
        """
        ranks = current()
        finished = ranks.first(lambda: finished_keys(self.output))
        if ranks.count > 1:
            record = {**record, "processes": ranks.count}
        wanted: list[tuple[str, Row]] = []
        for job in jobs:
            with failing_alone(failures, job.name):
                load = functools.cache(functools.partial(self.load, job))
                waiting = iter(units_of(job))
                while True:
                    # Prompts are made on each process, one task after another; a task is measured before the next.
                    found = ranks.together(functools.partial(self._next, job, waiting))
                    if found is None:
                        break
                    unit, cells = found
                    known = [unit.name, [*cells.values()], [*reasons_of(unit).values()]]
                    ranks.agree(known, f"{job.name}: the prompts of {unit.name}")
                    wanted += [(job.name, cell) for cell in cells.values()]
                    for length, reason in reasons_of(unit).items():
                        failures.append(Failure(job.name, Unmeasurable(reason), _place(unit, length)))
                        if (key := row_key(cells[length])) not in finished:
                            finished.add(key)
                            self._write({**cells[length], **_NOTHING, "error": reason, "provenance": record})
                    missing = [
                        length
                        for length, cell in cells.items()
                        if length not in reasons_of(unit) and row_key(cell) not in finished
                    ]
                    if isinstance(unit, UnbuiltUnit) or not missing:
                        continue
                    model = ranks.together(load)
                    source = {**record, "versions": record["versions"] | {"lm-eval": unit.version}}
                    for length in missing:  # each by itself, so that a run that ends early leaves its row
                        if not self.hide_progress:
                            print(f"{job.name}: {_place(unit, length)}", file=sys.stderr)
                        with failing_alone(failures, job.name, _place(unit, length)):
                            cell = cells[length]
                            row = self._ask(model, job, unit, length, cell["protocol"]["max_length"])
                            finished.add(row_key(cell))
                            self._write({**cell, **row, "provenance": source})
        return wanted

    def _next(
        self, job: ModelJob, waiting: Iterator[Unit | UnbuiltUnit | SavedUnit]
    ) -> tuple[Unit | UnbuiltUnit | SavedUnit, dict[int | None, Row]] | None:
        """The next unit of a job, with the fields that identify its rows; None after the last."""
        unit = next(waiting, None)
        return None if unit is None else (unit, job_cells(unit, job, self.max_length))

    def _write(self, row: Row) -> None:
        """Append a row to the output, if this is the first of the processes that share the work."""
        if current().is_first:
            append_row(self.output, row, once=True)

    def _ask(
        self, model: Any, job: ModelJob, unit: Unit | SavedUnit, length: int | None, max_length: int | None
    ) -> Row:
        """Measure one length of a unit and return its fields. max_length: longest prompt in tokens."""
        limit = max_length or NO_LIMIT
        if isinstance(unit, SavedUnit):
            unit.check_tokenizer(job.model)
            scorer: Any = Scorer(model, job.scaling, limit, self.batch_size, self.hide_progress)
        else:
            scorer = model_of_job(model, job, limit, self.batch_size, self.hide_progress)
        with Meter(*self.load.devices) as meter, silence() if self.hide_progress else contextlib.nullcontext():
            row = unit.measure(scorer, [length])[length]
        return {**row, "seconds": round(meter.seconds, 1), "peak_memory": meter.peak_memory}


def benchmark_table(output: str, wanted: Iterable[tuple[str, Row]]) -> str:
    """A table for the terminal of those rows in `wanted`, as `measure` returns them, that the file holds."""
    known = {row_key(row): row for row in rows_so_far(output)}
    lines = [[name, *_described(known[key])] for name, cell in wanted if (key := row_key(cell)) in known]
    return format_table(["", "task", "result", "n", ""], lines)


def _described(row: Row) -> list[str]:
    """A row's cells in the table: task, value and standard error, number of documents, number of prompts cut."""
    protocol, error = row["protocol"], row["standard_error"]
    if row["length"] is None:
        task = f"{protocol['task']}, {protocol['num_fewshot']}-shot, {protocol['metric']}"
    else:
        task = f"{protocol['task']} at {row['length']}"
    if row["value"] is None:
        return [task, "not measured", "", textwrap.shorten(row["error"], 70, placeholder=" ...")]
    value = f"{row['value']:.2f}" + ("" if error is None else f" ± {error:.2f}")
    return [task, value, str(row["n"]), f"{row['truncated']} cut" if row["truncated"] else ""]


def save_questions(units: Iterable[Unit | UnbuiltUnit], job: ModelJob, load: ModelLoader, folder: str) -> Iterator[str]:
    """Write the questions of all units into a folder, tokenized for a job's model; yield a line about each unit.

    Raises:
        ConfigError: a task that has no questions, or whose questions cannot be saved.
    """
    for unit in units:
        if isinstance(unit, UnbuiltUnit):
            raise ConfigError(f"task {unit.name!r}: {'; '.join(unit.reasons.values())}")
        with silence():
            path = save_requests(unit, model_of_job(load(job), job, NO_LIMIT, None), folder)
        yield f"{path}: {unit.data[None]['documents']} questions"


@contextlib.contextmanager
def silence() -> Iterator[None]:
    """Drop everything written to stderr: lm-eval's progress bars cannot be switched off."""
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stderr(nowhere):
        yield
