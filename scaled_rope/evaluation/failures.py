"""Models that fail: each is named in the end with its error, and the others are measured."""

from __future__ import annotations

import contextlib
import errno
import sys
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

from scaled_rope.errors import ConfigError, first_line, type_and_line
from scaled_rope.evaluation.memory_meter import is_out_of_memory, release_memory


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

    def __str__(self) -> str:
        why = first_line(self.error) if isinstance(self.error, ConfigError) else type_and_line(self.error)
        return f"{self.job}{f' on {self.task}' if self.task else ''}: {why}"


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


def report_failures(failures: Sequence[Failure], jobs: Sequence[Named], tasks: Collection[str] = ()) -> int:
    """Print which models failed, and return the exit code.

    tasks: a model counts as failed when it failed on all of these; by default when it failed on any.

    Raises:
        ConfigError: all of them failed for the same reason, and it was bad input.
    """
    if not failures:
        return 0
    failed: dict[str, set[str]] = {}
    for failure in failures:
        failed.setdefault(failure.job, set()).add(failure.task)
    if all(job.name in failed and failed[job.name].issuperset(tasks) for job in jobs):
        raise_if_same(failures)
    for failure in failures:
        print(f"failed: {failure}", file=sys.stderr)
    return 1
