"""Processes that work on batches: results in order, and an end whatever they are at."""

from __future__ import annotations

import os
import signal
import threading
import time

import pytest

from scaled_rope.errors import ConfigError
from scaled_rope.texts.workers import Workers


def nothing() -> None:
    pass


def doubled(batch: bytes) -> bytes:
    return batch * 2


def refuse(batch: object) -> object:
    raise ConfigError(f"{batch!r} is not allowed")


def cannot_travel(batch: object) -> object:
    class Own(Exception):
        pass

    raise Own("here")


def die(batch: object) -> object:
    os.kill(os.getpid(), signal.SIGKILL)


def slow(batch: float) -> int:
    time.sleep(batch)
    return os.getpid()


def test_results_come_in_order_and_larger_than_a_pipe() -> None:
    batches = [bytes([number]) * 200_000 for number in range(9)]
    with Workers(2, nothing, ()) as workers:
        assert list(workers.map(doubled, iter(batches))) == [(batch, batch * 2) for batch in batches]
        assert list(workers.map(len, [b"abc"])) == [(b"abc", 3)]  # the same processes take more


@pytest.mark.parametrize(
    ("function", "kind", "said"),
    [
        (refuse, ConfigError, "1 is not allowed"),
        (cannot_travel, RuntimeError, "Own: here"),
        (die, ConfigError, r"one of 2 processes ended \(SIGKILL\)"),
    ],
)
def test_failures_arrive(function, kind: type[Exception], said: str) -> None:
    with Workers(2, nothing, ()) as workers, pytest.raises(kind, match=said):
        list(workers.map(function, [1, 2, 3, 4, 5]))


@pytest.mark.parametrize("moment", [0.0, 0.02, 0.1, 0.3])
def test_leaving_ends_them_in_the_middle_of_large_messages(moment: float) -> None:
    """Killed while they send more than a pipe holds, which nobody reads any more."""
    began, processes = time.monotonic(), []
    with pytest.raises(KeyboardInterrupt), Workers(2, nothing, ()) as workers:
        for _ in workers.map(doubled, (b"x" * 4_000_000 for _ in range(8))):
            processes = [process.pid for process in workers._processes]
            time.sleep(moment)
            raise KeyboardInterrupt
    assert time.monotonic() - began < 30
    for pid in processes:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


def test_an_interrupt_of_the_group_is_for_the_parent() -> None:
    """At every moment of a process's begin: it prints nothing, and goes on."""
    with Workers(2, nothing, ()) as workers:
        stop = threading.Event()

        def interrupt() -> None:
            while not stop.is_set():
                for process in list(workers._processes):
                    os.kill(process.pid, signal.SIGINT)
                time.sleep(0.001)

        thread = threading.Thread(target=interrupt)
        thread.start()
        try:
            found = {pid for _, pid in workers.map(slow, [0.05] * 4)}
        finally:
            stop.set()
            thread.join()
    assert len(found) == 2
