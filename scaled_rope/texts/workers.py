"""Processes that apply functions to batches, in order, and that end whatever happens to the process that started them.

`concurrent.futures` has such processes too, but its own threads wait for ever where one of them is killed in the middle
of a message, and killing them is what an interrupted command does.

Knows nothing of tokenizers.
"""

from __future__ import annotations

import multiprocessing
import os
import pickle
import queue
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import Any, TypeVar

from scaled_rope.errors import ConfigError

Given = TypeVar("Given")
Made = TypeVar("Made")


def _work(pipe: Connection, begin: Callable[..., object], settings: tuple[Any, ...]) -> None:
    """Serve as a process: call `begin`, then answer each (function, batch) with (whether it succeeded, result)."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which ends its processes itself
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
    begin(*settings)
    # Batches are received beside the work: a parent that waits to send one would not read a result meanwhile.
    asked: queue.SimpleQueue[Any] = queue.SimpleQueue()

    def receive() -> None:
        try:
            while True:
                asked.put(pipe.recv())
        except (EOFError, OSError):
            os._exit(0)  # the parent needs nothing more

    threading.Thread(target=receive, daemon=True).start()
    while True:
        function, batch = asked.get()
        try:
            answer = True, function(batch)
        except Exception as error:
            answer = False, _portable(error)
        try:
            pipe.send(answer)
        except OSError:
            os._exit(0)


def _portable(error: Exception) -> Exception:
    """An exception that can travel to another process: itself, or its text where it cannot."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error


class Workers:
    """Some processes, started when there is work. A context manager: leaving it ends them at once.

    Args:
        count: how many.
        begin, settings: a function that each calls first, and its arguments.
    """

    def __init__(self, count: int, begin: Callable[..., object], settings: tuple[Any, ...]) -> None:
        self._count, self._begin, self._settings = count, begin, settings
        self._pipes: list[Connection] = []
        self._processes: list[BaseProcess] = []

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, *error: object) -> None:
        """Kill the processes: what they are at is not wanted any more, and they hold nothing that could be lost."""
        for process in self._processes:
            process.kill()
        for pipe in self._pipes:
            pipe.close()
        for process in self._processes:
            process.join()
        self._pipes, self._processes = [], []

    def _start(self) -> None:
        # Held back until the process ignores it, and until it is known here.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            ours, theirs = multiprocessing.Pipe()
            process = multiprocessing.Process(target=_work, args=(theirs, self._begin, self._settings), daemon=True)
            process.start()
            theirs.close()  # so that the end of the process is the end of the pipe
            self._pipes.append(ours)
            self._processes.append(process)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)

    def map(self, function: Callable[[Given], Made], batches: Iterable[Given]) -> Iterator[tuple[Given, Made]]:
        """Yield every batch with the result of a function for it, in order. Batches are taken as needed.

        Raises:
            ConfigError: a process died.
            Exception: what the function raised.
        """
        while len(self._processes) < self._count:
            self._start()
        pending: list[tuple[int, Given]] = []
        for number, batch in enumerate(batches):
            worker = number % self._count
            try:
                self._pipes[worker].send((function, batch))
            except OSError:
                raise self._death(worker) from None
            pending.append((worker, batch))
            if len(pending) == 2 * self._count:  # enough to keep all processes busy, few enough to bound memory
                yield self._result(*pending.pop(0))
        while pending:
            yield self._result(*pending.pop(0))

    def _result(self, worker: int, batch: Given) -> tuple[Given, Any]:
        try:
            succeeded, result = self._pipes[worker].recv()
        except (EOFError, OSError):
            raise self._death(worker) from None
        if not succeeded:
            raise result
        return batch, result

    def _death(self, worker: int) -> ConfigError:
        self._processes[worker].join()
        code = self._processes[worker].exitcode
        how = signal.Signals(-code).name if code is not None and code < 0 else f"exit code {code}"
        return ConfigError(
            f"one of {self._count} processes ended ({how}), perhaps for lack of memory; fewer of them need less"
        )
