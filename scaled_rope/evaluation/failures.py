"""Models that fail: each is named in the end with its error, and the others are measured."""

from __future__ import annotations

import contextlib
import errno
import json
import sys
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Protocol

from scaled_rope.errors import ConfigError, first_line, type_and_line
from scaled_rope.evaluation.memory_meter import is_out_of_memory, release_memory
from scaled_rope.evaluation.ranks import current
from scaled_rope.files import write_atomic
from scaled_rope.results import Row, rows_so_far


class Named(Protocol):
    """The part of a `ModelJob` that a failure names."""

    @property
    def name(self) -> str: ...


@dataclass(frozen=True)
class Failure:
    """A model whose evaluation ended early, or did not begin."""

    job: str
    """The model and its scaling."""
    error: Exception
    task: str = ""
    """The data set or benchmark; empty when there is only one, or when the model failed before any."""

    @property
    def why(self) -> str:
        """The error in one line."""
        return first_line(self.error) if isinstance(self.error, ConfigError) else type_and_line(self.error)

    def __str__(self) -> str:
        return f"{self.job}{f' on {self.task}' if self.task else ''}: {self.why}"


def is_ours(error: Exception) -> bool:
    """Whether an exception is a model's or an evaluator's own, unlike that of a full or read-only disk."""
    disk = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)
    return not any(isinstance(one, OSError) and one.errno in disk for one in (error, error.__cause__))


@contextlib.contextmanager
def failing_alone(failures: list[Failure] | None, job: str, task: str = "") -> Iterator[None]:
    """Within this context one model is read or evaluated: an exception is added to `failures`, and the next follows.

    A full or read-only disk is raised all the same, since it is not the model's fault.

    failures: None to raise everything.
    """
    try:
        yield
    except Exception as error:
        if failures is None or not is_ours(error):
            raise
        failures.append(Failure(job, error, task))
        if is_out_of_memory(error):
            release_memory()


def raise_if_same(failures: Sequence[Failure]) -> None:
    """Raise the error that all failures have in common, if it is bad input.

    Raises:
        ConfigError: that error.
    """
    first = failures[0].error
    if isinstance(first, ConfigError) and len({str(failure.error) for failure in failures}) == 1:
        raise first


def failures_file(output: str | Path) -> Path:
    """The file beside rows with the models that could not be measured: no row, so that nothing takes it for one."""
    return Path(f"{output}.failures.jsonl")


def keep_failures(
    output: str | Path,
    metric: str,
    failures: Sequence[Failure],
    jobs: Sequence[Named],
    tasks: Collection[str] | None = None,
) -> None:
    """Record for the report which models could not be measured. What is there of the same metric is replaced for the
    jobs that were tried again, so one that has succeeded is not named any more.

    Args:
        output: the file of rows.
        metric: the metric that was to be measured.
        failures: what failed.
        jobs: all that was tried.
        tasks: those that were tried; None: all.
    """
    path = failures_file(output)
    if not current().is_first or (not failures and not path.exists()):
        return
    tried = {failure.job for failure in failures} | {job.name for job in jobs}

    def again(row: Row) -> bool:
        """Whether a record is of a job that was tried again, or of a model that could not even be read then."""
        name, task = str(row.get("job")), str(row.get("task"))
        if row.get("metric") != metric or not any(job == name or job.startswith(f"{name}, ") for job in tried):
            return False
        return (
            tasks is None or not task or task in tasks or any((one.job, one.task) == (name, task) for one in failures)
        )

    date = datetime.now(UTC).isoformat(timespec="seconds")
    kept = [row for row in rows_so_far(path) if not again(row)]
    kept += [{"metric": metric, "job": one.job, "task": one.task, "failed": one.why, "date": date} for one in failures]
    if kept:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, "".join(json.dumps(row) + "\n" for row in kept))
    else:
        path.unlink(missing_ok=True)


def report_failures(
    failures: Sequence[Failure],
    jobs: Sequence[Named],
    tasks: Collection[str] = (),
    output: str | Path | None = None,
    metric: str = "",
) -> int:
    """Print which models failed, and return the exit code.

    Args:
        failures: what failed.
        jobs: all that was tried.
        tasks: a model counts as failed when it failed on all of these; by default when it failed on any.
        output: the file of rows beside which failures are kept for the report; None: they are not.
        metric: the metric that was to be measured.

    Raises:
        ConfigError: all of them failed for the same reason, and it was bad input.
    """
    if not failures:
        if output is not None:
            keep_failures(output, metric, failures, jobs, tasks or None)
        return 0
    failed: dict[str, set[str]] = {}
    for failure in failures:
        failed.setdefault(failure.job, set()).add(failure.task)
    if all(job.name in failed and failed[job.name].issuperset(tasks) for job in jobs):
        raise_if_same(failures)
    if output is not None:
        keep_failures(output, metric, failures, jobs, tasks or None)
    for failure in failures:
        print(f"failed: {failure}", file=sys.stderr)
    return 1
