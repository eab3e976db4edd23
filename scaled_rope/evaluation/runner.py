"""The common part of all evaluators: context lengths, resuming, progress, failures, and the two output formats.

An evaluator lists the cells (model x scaling x length) and measures them; `run` skips the cells that the output already
holds and appends every new row as soon as it is known. A cell that does not fit into memory becomes a row that says so,
and a model that fails leaves the others their results.
"""

from __future__ import annotations

import argparse
import csv
import fcntl
import io
import json
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from scaled_rope.content_hash import record_hash
from scaled_rope.errors import ConfigError
from scaled_rope.evaluation.failures import Failure, failing_alone, is_ours
from scaled_rope.evaluation.formatting import format_table
from scaled_rope.evaluation.jobs import ModelJob, ModelLoader
from scaled_rope.evaluation.memory_meter import Meter, is_out_of_memory, release_memory
from scaled_rope.evaluation.ranks import current
from scaled_rope.files import check_writable, write_atomic
from scaled_rope.progress import Progress
from scaled_rope.provenance import portable_command, provenance
from scaled_rope.results import OUT_OF_MEMORY, Row, append_row, finished_keys, read_rows, row_key, rows_so_far

_LOCK_SECONDS = 10.0


class Evaluator(Protocol):
    """One metric over (model, scaling, context length)."""

    value: str
    """The row field that tables and CSV files show."""

    def cells(self, job: ModelJob) -> dict[int, Row]:
        """Context length -> the fields that, with those of the job, identify what is measured there."""
        ...

    def passes(self, job: ModelJob, lengths: Sequence[int]) -> dict[int, list[int]]:
        """Length of a forward pass -> those of `lengths` that it yields."""
        ...

    def tokens(self, job: ModelJob, length: int) -> int:
        """Tokens that go through the model in the passes of one length; what the progress bar counts."""
        ...

    def measure(
        self, model: Any, job: ModelJob, length: int, yields: Sequence[int], advance: Callable[[int], object]
    ) -> Iterator[tuple[int, Row]]:
        """Run the passes of one length: yield (context length, measured fields) and call `advance(tokens)`."""
        ...


@runtime_checkable
class KeepsMore(Protocol):
    """An evaluator that leaves more than rows."""

    def unkept(self, job: ModelJob) -> list[int]:
        """Context lengths for which it was asked to keep something that is not there."""
        ...


class _Failed(Exception):
    """Wraps an exception that a model or an evaluator is to blame for, unlike, for example, a full disk."""

    def __init__(self, error: Exception) -> None:
        self.error = error


def command_line(parser: argparse.ArgumentParser, argv: Sequence[str] | None) -> str:
    """The command that repeats a run; part of its rows' provenance."""
    return portable_command(["python", parser.prog, *(sys.argv[1:] if argv is None else argv)])


def given_arguments(args: argparse.Namespace) -> dict[str, Any]:
    """The arguments that rows record: all but None, False, empty lists and functions."""

    def says(value: Any) -> bool:
        return value is not None and value is not False and value != [] and not callable(value)

    return {name: value for name, value in vars(args).items() if says(value)}


def place_of(args: argparse.Namespace, device: object) -> object:
    """Where models compute, as provenance has it: a device, or "server"."""
    return device if getattr(args, "server", None) is None else "server"


class Parts:
    """A file beside the output with results for parts (documents) of passes that have not ended.

    A run that was killed continues from it. Lines are {"key": of the pass, "parts": {number: result}, …}; those of a
    pass are removed when its rows are written. Each has a hash of itself; one that was changed counts as not there. If
    two processes change the file at once, some work is repeated, nothing else.
    """

    def __init__(self, output: str | Path) -> None:
        self.path = Path(f"{output}.partial.jsonl")

    def read(self, key: str) -> list[Row]:
        """The lines of one pass."""
        return [row for row in rows_so_far(self.path) if row.get("key") == key and _is_sealed(row)]

    def add(self, key: str, parts: Mapping[int, Any], **more: Any) -> None:
        row = {"key": key, "parts": {str(part): result for part, result in parts.items()}, **more}
        append_row(self.path, row | {"seal": record_hash(row)})

    def discard(self, key: str) -> None:
        """Remove the lines of one pass, and the file if it was the last."""
        if not self.path.exists():
            return
        rows = read_rows(self.path)
        kept = [row for row in rows if row.get("key") != key]
        if not kept:
            self.path.unlink(missing_ok=True)
        elif len(kept) < len(rows):
            write_atomic(self.path, "".join(json.dumps(row) + "\n" for row in kept))


def _is_sealed(row: Row) -> bool:
    """Whether a line is as it was written; those of earlier versions, which have no seal, are believed."""
    return "seal" not in row or row["seal"] == record_hash({name: row[name] for name in row if name != "seal"})


def _check_output(path: str | Path) -> None:
    """Raise an error for an output that cannot be written to, before hours are spent.

    Raises:
        ConfigError: no permission, not a file, or another process keeps it locked.
    """
    check_writable(path)
    if not Path(path).is_file():
        return
    deadline = time.monotonic() + _LOCK_SECONDS
    with open(path, "ab") as file:
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise ConfigError(f"file {str(path)!r} is locked by another process") from None
                time.sleep(0.1)


def run(
    evaluator: Evaluator,
    jobs: Sequence[ModelJob],
    args: argparse.Namespace,
    command: str,
    seed: int | None = None,
    failures: list[Failure] | None = None,
) -> dict[ModelJob, dict[int, Row]]:
    """Measure every cell that `args.output` does not hold yet; return the rows of all cells by job and length.

    Rows are appended as they are measured. The CSV file, if any, is rewritten after every job, so it is there, with
    empty places, before the last one ends. A cell that runs out of memory becomes a row without a value and with
    `"error": "out of memory"`; the shorter lengths of its pass are measured without it.

    failures: when given, a model that cannot be read, loaded or measured is added to it and the next one follows;
    without it the exception is raised.
    """
    return run_all({"": evaluator}, jobs, args, command, seed, failures)[""]


def run_all(
    evaluators: Mapping[str, Evaluator],
    jobs: Sequence[ModelJob],
    args: argparse.Namespace,
    command: str,
    seed: int | None | Mapping[str, int] = None,
    failures: list[Failure] | None = None,
) -> dict[str, dict[ModelJob, dict[int, Row]]]:
    """`run` for several evaluators by name, such as one per data set; each model is loaded once for all of them.

    seed: of what was drawn, which rows record; by name where evaluators have their own.

    Where several processes share the evaluation (`ranks`), the first reads and writes the output, and all get the rows.
    """
    ranks = current()

    def measured_keys() -> tuple[set[str], set[str]]:
        rows = [r for r in rows_so_far(args.output) if not (args.retry_oom and r.get("error") == OUT_OF_MEMORY)]
        return {row_key(row) for row in rows}, {row_key(row) for row in rows if row.get("error")}

    finished, in_vain = ranks.first(measured_keys)
    identities: dict[str, dict[ModelJob, dict[int, Row]]] = {name: {} for name in evaluators}
    plan: dict[tuple[str, ModelJob], dict[int, list[int]]] = {}
    total = 0
    for name, evaluator in evaluators.items():
        for job in jobs:
            with failing_alone(failures, job.name, name):  # a tokenizer or a text that cannot be read, say
                described = job.fields()
                cells = {
                    length: {**described, **cell, "length": length} for length, cell in evaluator.cells(job).items()
                }
                keys = {length: row_key(row) for length, row in cells.items()}
                # Reading what is kept takes time, and matters only where rows are there already.
                some = not finished.isdisjoint(keys.values())
                unkept = evaluator.unkept(job) if some and isinstance(evaluator, KeepsMore) else []
                missing = {
                    length: key
                    for length, key in keys.items()
                    if key not in finished or (length in unkept and key not in in_vain)
                }
                passes = evaluator.passes(job, list(missing)) if missing else {}
                total += sum(evaluator.tokens(job, length) for length in passes)
                identities[name][job], plan[name, job] = cells, passes
                finished |= set(missing.values())  # two jobs may name the same scaling
    ranks.agree(
        [
            [(name, job.name, identities[name][job], passes) for (name, job), passes in plan.items()],
            [str(failure) for failure in failures or ()],
        ],
        "models and texts",
    )
    ranks.first(lambda: _check_output(args.output))
    load = ModelLoader(args)
    record = {"command": command, **provenance(place_of(args, load.device), None, given_arguments(args))}
    seeds = seed if isinstance(seed, Mapping) else dict.fromkeys(evaluators, seed)
    if ranks.count > 1:
        record["processes"] = ranks.count
    collected: dict[str, dict[ModelJob, dict[int, Row]]] = {}
    written: set[str] = set()

    def collect(*names: str) -> None:
        if ranks.is_first:
            rows = rows_so_far(args.output)
            collected.update({name: _collect(rows, identities[name]) for name in names})

    def write_table() -> None:
        if args.output_file and plan and ranks.is_first:
            named = {name: (evaluator.value, collected[name]) for name, evaluator in evaluators.items()}
            _write_csv(args.output_file, jobs, named)

    collect(*identities)
    with Progress(total=total, unit="tok", unit_scale=True, disable=args.hide_progress or not total) as bar:
        for job in jobs:
            bar.set_description(job.name, refresh=False)
            for name, evaluator in evaluators.items():
                if not plan.get((name, job)):
                    continue
                try:
                    for row in _measure(evaluator, job, plan[name, job], load, bar.update):
                        if ranks.is_first:
                            cell = identities[name][job][row["length"]]
                            hidden = {} if job.server is None else {"peak_memory": None}  # not seen from here
                            origin = {**record, "seed": seeds[name]}
                            append_row(args.output, {**cell, **row, **hidden, "provenance": origin}, once=True)
                            written.add(row_key(cell))
                except _Failed as failed:
                    if failures is None:
                        raise failed.error from None
                    failures.append(Failure(job.name, failed.error, name))
                collect(name)
                write_table()
    write_table()
    if lost := len(written - finished_keys(args.output)):
        raise ConfigError(
            f"{lost} of {len(written)} rows that were written to {str(args.output)!r} are gone: the file was removed or"
            f" replaced meanwhile; the same command measures them again"
        )
    if ranks.count > 1:
        rows = ranks.first(lambda: rows_so_far(args.output))
        collected = {name: _collect(rows, cells) for name, cells in identities.items()}
    return collected


def _measure(
    evaluator: Evaluator,
    job: ModelJob,
    passes: Mapping[int, Sequence[int]],
    load: ModelLoader,
    advance: Callable[[int], object],
) -> Iterator[Row]:
    """Yield the measured fields of a job's cells, each with its "length", as they become known.

    Raises:
        _Failed: the model could not be loaded, or the evaluator failed.
    """
    needs_model: Callable[[ModelJob, int, Sequence[int]], bool] | None = getattr(evaluator, "needs_model", None)
    queue = list(passes.items())
    while queue:
        length, yields = queue.pop(0)
        left = list(yields)
        # Here, not before the loop: a pass whose results are on disk may need no model.
        try:
            needed = needs_model is None or needs_model(job, length, yields)
            model = current().together(lambda: load(job)) if needed else None
            stream = iter(evaluator.measure(model, job, length, yields, advance))
        except Exception as error:
            raise _blamed(error) from error
        exhausted = False
        while True:
            try:
                with Meter(*load.devices) as meter:
                    item = next(stream, None)
            except Exception as error:
                if not is_out_of_memory(error):
                    raise _blamed(error) from error
                exhausted = True
                break
            if item is None:
                break
            measured, result = item
            left.remove(measured)
            # Overridden by the evaluator's own figures if it shares a pass among rows.
            cost = {"seconds": round(meter.seconds, 3), "peak_memory": meter.peak_memory}
            yield {"length": measured, **cost, **result}
        del model, stream
        if exhausted:
            release_memory()
            longest = max(left)  # the one that the pass was made for; shorter ones may fit without it
            yield {"length": longest, evaluator.value: None, "error": OUT_OF_MEMORY}
            left.remove(longest)
            if left:
                queue = [*evaluator.passes(job, left).items(), *queue]


def _blamed(error: Exception) -> Exception:
    """Wrap an exception of a model's evaluation in `_Failed`, but not a full disk, which is not the model's fault."""
    return _Failed(error) if is_ours(error) else error


def _collect(rows: Sequence[Row], identities: Mapping[ModelJob, Mapping[int, Row]]) -> dict[ModelJob, dict[int, Row]]:
    """The measured rows among those of a file, by job and length."""
    known = {row_key(row): row for row in rows}
    return {
        job: {length: known[row_key(row)] for length, row in cells.items() if row_key(row) in known}
        for job, cells in identities.items()
    }


def _write_csv(
    path: str, jobs: Sequence[ModelJob], tables: Mapping[str, tuple[str, Mapping[ModelJob, Mapping[int, Row]]]]
) -> None:
    """Write results in the layout of the released files: `,L1,L2,...`, then `name,value,value,...` per model.

    tables: name (of the data set; empty when there is only one) -> the field to show and the rows.
    """
    lengths = sorted({length for _, rows in tables.values() for cells in rows.values() for length in cells})
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["", *lengths])
    for job in jobs:
        model = job.model if job.carried else f"{job.model} {job.label}"
        for name, (value, rows) in tables.items():
            line = [rows.get(job, {}).get(length, {}).get(value, "") for length in lengths]
            writer.writerow([f"{model} on {name}" if name else model, *line])
    write_atomic(path, text.getvalue())


def print_summary(title: str, rows: Mapping[ModelJob, Mapping[int, Row]], show: Callable[[Row], str]) -> None:
    """Print the final table: a line per job, a column per context length. Where nothing was measured there is none."""
    lengths = sorted({length for cells in rows.values() for length in cells})
    if not lengths:
        return
    lines = [
        [job.name, *(_shown(cells[length], show) if length in cells else "" for length in lengths)]
        for job, cells in rows.items()
    ]
    print(f"\n{title}\n{format_table(['', *map(str, lengths)], lines)}")


def print_output(output: str | Path) -> None:
    """Print where the rows are, if there are any."""
    if Path(output).exists():
        print(f"\nrows: {output}")


def _shown(row: Row, show: Callable[[Row], str]) -> str:
    return "oom" if row.get("error") == OUT_OF_MEMORY else show(row)
