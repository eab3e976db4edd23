"""Benchmarks of many models and scalings as rows: what is missing in the output is measured and appended to it."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from scaled_rope.evaluation.continuations import NO_LIMIT
from scaled_rope.evaluation.formatting import format_table
from scaled_rope.evaluation.jobs import ModelJob, ModelLoader
from scaled_rope.evaluation.lm_eval_tasks import Unit, job_cells, model_of_job
from scaled_rope.evaluation.memory_meter import Meter
from scaled_rope.evaluation.saved_questions import SavedUnit, Scorer, save_requests
from scaled_rope.results import Row, append_row, finished_keys, read_rows, row_key


@dataclass(frozen=True)
class BenchmarkRun:
    """How benchmarks are measured, and where their rows go.

    Attributes:
        load: gives out the models.
        output: file of the rows.
        max_length: prompts are cut to so many tokens; None: to the model's context.
        batch_size: sequences per forward pass; None: about 16k tokens' worth.
        hide_progress: whether nothing is said on the way.
    """

    load: ModelLoader
    output: str
    max_length: int | None = None
    batch_size: int | None = None
    hide_progress: bool = False

    def measure(
        self,
        jobs: Iterable[ModelJob],
        units_of: Callable[[ModelJob], Sequence[Unit | SavedUnit]],
        record: Mapping[str, Any],
    ) -> list[tuple[str, Row]]:
        """Append the rows that the output lacks; gives every row's model and scaling in words, and its identity.

        record: provenance of the rows, to which the version of lm-eval is added.
        """
        finished = finished_keys(self.output)
        wanted: list[tuple[str, Row]] = []
        for job in jobs:
            for unit in units_of(job):
                cells = job_cells(unit, job, self.max_length)
                wanted += [(job.name, cell) for cell in cells.values()]
                if all(row_key(cell) in finished for cell in cells.values()):
                    continue
                if not self.hide_progress:
                    print(f"{job.name}: {unit.name}", file=sys.stderr)
                rows = self._ask(job, unit, next(iter(cells.values()))["protocol"]["max_length"] or NO_LIMIT)
                source = {**record, "versions": record["versions"] | {"lm-eval": unit.version}}
                for length, cell in cells.items():
                    if (key := row_key(cell)) not in finished:
                        finished.add(key)
                        append_row(self.output, {**cell, **rows[length], "provenance": source})
        return wanted

    def _ask(self, job: ModelJob, unit: Unit | SavedUnit, limit: int) -> dict[int | None, Row]:
        """The measured fields by length; limit: longest prompt in tokens."""
        if isinstance(unit, SavedUnit):
            unit.check_tokenizer(job.model)
            scorer: Any = Scorer(self.load(job), job.scaling, limit, self.batch_size, self.hide_progress)
        else:
            scorer = model_of_job(self.load(job), job, limit, self.batch_size, self.hide_progress)
        with Meter(self.load.device) as meter, silence() if self.hide_progress else contextlib.nullcontext():
            rows = unit.measure(scorer)
        cost = {"seconds": round(meter.seconds, 1), "peak_memory": meter.peak_memory}
        return {length: {**row, **cost} for length, row in rows.items()}


def benchmark_table(output: str, wanted: Iterable[tuple[str, Row]]) -> str:
    """The rows that `measure` names, from the file that holds them, in the terminal."""
    known = {row_key(row): row for row in read_rows(output)}
    lines = [[name, *_described(known[row_key(cell)])] for name, cell in wanted]
    return format_table(["", "task", "result", "n", ""], lines)


def _described(row: Row) -> list[str]:
    """Task, value and standard error, documents, prompts that were cut."""
    protocol, error = row["protocol"], row["standard_error"]
    if row["length"] is None:
        task = f"{protocol['task']}, {protocol['num_fewshot']}-shot, {protocol['metric']}"
    else:
        task = f"{protocol['task']} at {row['length']}"
    value = f"{row['value']:.2f}" + ("" if error is None else f" ± {error:.2f}")
    return [task, value, str(row["n"]), f"{row['truncated']} cut" if row["truncated"] else ""]


def save_questions(units: Iterable[Unit], job: ModelJob, load: ModelLoader, folder: str) -> Iterator[str]:
    """Write the questions of all units into a folder, tokenized for a job's model; gives a line about each."""
    for unit in units:
        with silence():
            path = save_requests(unit, model_of_job(load(job), job, NO_LIMIT, None), folder)
        yield f"{path}: {unit.data['documents']} questions"


@contextlib.contextmanager
def silence() -> Iterator[None]:
    """Without what is written to stderr: lm-eval's bars, which have no switch."""
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stderr(nowhere):
        yield
