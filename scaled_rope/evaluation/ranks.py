"""Several processes that share one evaluation, as `torchrun` and `accelerate launch` start them.

Every process (rank) runs the same script on a device of its own. They take the same steps in the same order; the work
of a step is shared out, and its results are exchanged, so that all of them know every result. Only the first one reads
and writes the files of rows and speaks. An error on one rank is raised on all of them, at the same step.

Results are exchanged through the CPU (gloo): they are small, and it works beside any device.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import PrefixStore
from torch.distributed.rendezvous import rendezvous

from scaled_rope.errors import ConfigError, first_line
from scaled_rope.evaluation.memory_meter import is_out_of_memory

T = TypeVar("T")

_MEETING = timedelta(minutes=10)
"""Time for all ranks to start: they import the same modules, perhaps from one slow disk."""
_PATIENCE = timedelta(days=365)
"""Time to wait for the others at a step. A pass may take hours; a rank that ended is noticed by its connection."""
_NOTICE = 5.0
"""Seconds for which the rank that holds the store waits, when it failed, until the others have noticed."""


class LostRank(BaseException):
    """Another rank ended early. Not an `Exception`, since nothing can be measured after it."""


@dataclass(frozen=True)
class Ranks:
    """The place of this process among those that share the evaluation; alone by default."""

    rank: int = 0
    count: int = 1
    local: int = 0
    """The place among the processes of this machine."""

    @property
    def is_first(self) -> bool:
        """Whether this is the rank that reads and writes files of rows."""
        return self.rank == 0

    def mine(self, items: Sequence[T]) -> list[T]:
        """The share of this rank: every `count`-th of the items."""
        return list(items[self.rank :: self.count])

    def gather(self, compute: Callable[[], T]) -> list[T]:
        """Compute something on each rank; return the results of all, in the order of ranks.

        Raises:
            Exception: that of the first rank on which `compute` failed, on all of them.
        """
        if self.count == 1:
            return [compute()]
        value, error = None, None
        try:
            value = compute()
        except Exception as raised:
            error = raised
        everyone = self._exchange((value, None if error is None else _described(error)))
        for rank, (_, said) in enumerate(everyone):
            if said is not None:
                raise error if rank == self.rank and error is not None else _rebuilt(said, rank)
        return [value for value, _ in everyone]

    def spread(self, items: Sequence[T], compute: Callable[[list[T]], Sequence[Any]]) -> list[Any]:
        """Compute a result for each item, the share of this rank here; return the results of all items in order."""
        results: list[Any] = [None] * len(items)
        for rank, part in enumerate(self.gather(lambda: list(compute(self.mine(items))))):
            results[rank :: self.count] = part
        return results

    def together(self, compute: Callable[[], T]) -> T:
        """Compute something on each rank and return its own result, once all have theirs; errors as in `gather`."""
        kept: list[T] = []

        def keep() -> None:
            kept.append(compute())

        self.gather(keep)
        return kept[0]

    def first(self, compute: Callable[[], T]) -> T:
        """Compute something on the first rank alone, and return its result on all; an error is raised on all."""
        return cast(T, self.gather(lambda: compute() if self.is_first else None)[0])

    def agree(self, value: Any, what: str) -> None:
        """Raise an error on all ranks unless a value, which JSON can hold, is the same on all.

        Raises:
            ConfigError: it differs.
        """
        digest = hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()
        found = self.gather(lambda: digest)
        for rank, other in enumerate(found):
            if other != found[0]:
                raise ConfigError(f"{what}: processes 0 and {rank} differ; they need the same files and versions")

    def device(self, name: str | None) -> str | None:
        """The name of this rank's device, given the one of the flags.

        Raises:
            ConfigError: one GPU for several processes, or fewer GPUs than processes on this machine.
        """
        if self.count == 1 or (name is None and not torch.cuda.is_available()):
            return name
        if name is not None and name.startswith("cuda:"):
            raise ConfigError(f"--device {name} is not allowed with {self.count} processes, each needs its own; cuda")
        if name is not None and name != "cuda":
            return name
        there = torch.cuda.device_count()
        if there == 1 and "SLURM_GPUS_PER_TASK" in os.environ:  # each process sees its own as the only one
            return "cuda:0"
        if self.local >= there:
            raise ConfigError(f"process {self.rank} has no GPU of its own, this machine has {there}; start so many")
        return f"cuda:{self.local}"

    def _exchange(self, value: Any) -> list[Any]:
        everyone: list[Any] = [None] * self.count
        try:
            dist.all_gather_object(everyone, value)
        except RuntimeError as error:  # gloo: "Connection closed by peer"
            raise LostRank(str(error)) from None
        return everyone


def _described(error: Exception) -> tuple[str, str, int | None, str | None]:
    """The facts by which another rank raises an exception like this one."""
    kind = type(error).__name__
    if is_out_of_memory(error):
        kind = "MemoryError"
    if isinstance(error, OSError):
        return "OSError", error.strerror or str(error), error.errno, error.filename and str(error.filename)
    return kind, str(error), None, None


def _rebuilt(said: tuple[str, str, int | None, str | None], rank: int) -> Exception:
    """The exception of another rank."""
    kind, text, number, filename = said
    if kind == "OSError":
        return OSError(number, text, filename) if number is not None else OSError(text)
    if kind == "ConfigError":
        return ConfigError(f"{text} (process {rank})")
    if kind == "MemoryError":
        return MemoryError(f"out of memory (process {rank}): {text}")
    return cast(Exception, type(kind, (RuntimeError,), {})(f"{text} (process {rank})"))


_ALONE = Ranks()
_current = _ALONE
_store: Any = None


def current() -> Ranks:
    """The place of this process; alone unless `on_ranks` or `join` found others."""
    return _current


def join() -> Ranks:
    """Meet the other processes that a launcher started, if there are any, and return the place of this one.

    Raises:
        ConfigError: the launcher's environment is incomplete, or not all processes come.
    """
    global _current, _store
    if _current.count > 1 or os.environ.get("WORLD_SIZE", "1") == "1":
        return _current
    try:
        count, rank = int(os.environ["WORLD_SIZE"]), int(os.environ["RANK"])
        local = int(os.environ.get("LOCAL_RANK", rank))
        _ = os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"]
    except (KeyError, ValueError) as error:
        said = f"{error} is missing" if isinstance(error, KeyError) else str(error)
        raise ConfigError(f"environment: WORLD_SIZE is set, but {said}; use torchrun or accelerate launch") from None
    try:
        store, rank, count = next(rendezvous("env://", timeout=_MEETING))
        store = PrefixStore("scaled-rope", store)
        store.set(f"came/{rank}", "1")
        store.wait([f"came/{other}" for other in range(count)], _MEETING)
    except (dist.DistStoreError, dist.DistNetworkError) as error:
        raise ConfigError(
            f"process {rank} of {count}: the others have not come within {_MEETING}: {first_line(error)}"
        ) from None
    dist.init_process_group("gloo", store=store, rank=rank, world_size=count, timeout=_PATIENCE)
    _store = store
    _current = Ranks(rank, count, local)
    if torch.cuda.is_available() and local < torch.cuda.device_count():
        torch.cuda.set_device(local)
    return _current


def refuse_several(what: str) -> None:
    """Refuse to be one of several processes, each of which would do the same.

    Raises:
        ConfigError: a launcher started several.
    """
    if (count := os.environ.get("WORLD_SIZE", "1")) != "1":
        raise ConfigError(f"{what} is for one process, not {count}; each would do the same")


def leave() -> None:
    """Close the connections to the other processes."""
    global _current, _store
    if _current.count > 1:
        _current, _store = _ALONE, None
        dist.destroy_process_group()


def on_ranks(main: Callable[[], int]) -> int:
    """Run the main function of an evaluator on all ranks; return its exit code.

    Where it fails, the rank that failed first raises its exception, for `run_cli` to report. The others end with the
    same exit code and say nothing.
    """
    ranks = join()
    if ranks.count == 1:
        return main()
    try:
        with contextlib.nullcontext() if ranks.is_first else _mute():
            code = main()
            ranks.gather(lambda: None)  # the first may still write when the others have nothing left to do
    except BaseException as error:
        if not _is_first_to_fail(error):
            raise SystemExit(_code(error)) from None
        raise
    finally:
        _linger()
        leave()
    return code


_failed = False


def _is_first_to_fail(error: BaseException) -> bool:
    """Whether no other rank has failed before; one that only lost the others has not failed first."""
    global _failed
    _failed = True
    try:
        if isinstance(error, LostRank):
            # The one that ended may be about to say why, or may have been killed and say nothing.
            deadline = time.monotonic() + _NOTICE
            while not (spoken := _store.check(["spoken"])) and time.monotonic() < deadline:
                time.sleep(0.1)
            _store.add("failed", 1)
            if not spoken and _store.add("lost", 1) == 1:
                print(f"error: process {_current.rank} lost another one, which ended early", file=sys.stderr)
            return False
        first: bool = _store.add("failed", 1) == 1
        if first:
            _store.set("spoken", "1")
        return first
    except RuntimeError:  # the rank that held the store has ended, and has said why
        return False


def _linger() -> None:
    """On the rank that may hold the store: after a failure, wait until the others have noted it."""
    if not (_failed and _current.is_first):
        return
    deadline = time.monotonic() + _NOTICE
    with contextlib.suppress(RuntimeError):
        while _store.add("failed", 0) < _current.count and time.monotonic() < deadline:
            time.sleep(0.05)


def _code(error: BaseException) -> int:
    """The exit code that `run_cli` has for an exception."""
    if isinstance(error, SystemExit):
        return error.code if isinstance(error.code, int) else 1
    if isinstance(error, KeyboardInterrupt):
        return 130
    return 2 if isinstance(error, (ConfigError, OSError)) else 1


@contextlib.contextmanager
def _mute() -> Iterator[None]:
    """Drop what this process prints and logs; the first rank says the same."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with open(os.devnull, "w") as nowhere:
            with contextlib.redirect_stdout(nowhere), contextlib.redirect_stderr(nowhere):
                yield
    finally:
        logging.disable(before)
