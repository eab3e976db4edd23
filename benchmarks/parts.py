"""Long measurements in parts: each part is a command that continues where it stopped, until the time is over."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from benchmarks.common import ROOT
from scaled_rope.errors import ConfigError


@dataclass(frozen=True)
class Part:
    """One command, a script of the project and its arguments, and a function that describes its progress."""

    name: str
    command: tuple[str, ...]
    progress: Callable[[], str]


def show(parts: Sequence[Part]) -> None:
    """Print the parts, and how far each has come."""
    for part in parts:
        print(f"{part.name:<28} {part.progress()}")


def run(command: Sequence[str], deadline: float) -> bool:
    """Run one of the project's scripts; return False when it was stopped because time is over.

    deadline: as `time.monotonic` counts.

    Raises:
        ConfigError: it failed; its own message is on the terminal.
    """
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))}
    script = str(ROOT / command[0])
    process = subprocess.Popen([sys.executable, script, *command[1:]], env=environment)
    stopped = False
    try:
        process.wait(max(0.0, deadline - time.monotonic()))
    except subprocess.TimeoutExpired:
        stopped = True
        process.terminate()  # finetune.py saves a state then
    finally:
        code = process.wait()
    if code and not (stopped and code in (-signal.SIGTERM, 128 + signal.SIGTERM)):
        raise ConfigError(f"{command[0]} ended with exit code {code}")
    return not stopped


def run_all(parts: Sequence[Part], minutes: float, more: Sequence[str] = ()) -> None:
    """Run parts in order; when the minutes are over, stop the one at work and say so.

    more: further arguments of all commands.
    """
    deadline = time.monotonic() + 60 * minutes
    for part in parts:
        print(f"{part.name}: {shlex.join(['python', *part.command, *more])}", flush=True)
        if not run([*part.command, *more], deadline):
            print(f"{minutes:g} minutes are over in {part.name} ({part.progress()}); the same command continues")
            return
