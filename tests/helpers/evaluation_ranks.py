"""Evaluators on several processes, placed by their environment as a launcher does it, each forked from one that has
imported everything."""

from __future__ import annotations

import importlib
import multiprocessing.connection
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

from tests.helpers import ROOT
from tests.helpers.runs import _FORKED, _IMPORTING, ENVIRONMENT, free_port


def _work(
    environment: dict[str, str], script: str, argv: list[str], output: str, prepare: Callable[[], None] | None
) -> None:
    os.chdir(ROOT)
    file = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)
    os.environ.clear()
    os.environ.update(environment)
    from scaled_rope.command_line import refuse_early, run_cli
    from scaled_rope.evaluation.ranks import on_ranks

    module: Any = importlib.import_module(f"eval.{script}")
    sys.argv = [f"eval/{script}.py", *argv]
    refuse_early(lambda: module.check_arguments(module.build_parser().parse_args()))
    if prepare is not None:
        prepare()
    sys.exit(run_cli(lambda: on_ranks(module.main)))


def run_ranks(
    script: str,
    *argv: str,
    folder: Path,
    ranks: int = 2,
    prepare: Callable[[], None] | None = None,
    seconds: float = 120,
) -> list[tuple[int, str]]:
    """Run `eval/SCRIPT.py ARGV` on each rank; return exit codes and outputs.

    prepare: called on each rank before the run; a function of a module, which comes here by its name.
    """
    meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port(), "WORLD_SIZE": str(ranks)}
    processes, files = [], []
    with mock.patch.dict(os.environ, _IMPORTING):
        for rank in range(ranks):
            place = {"RANK": str(rank), "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": str(ranks)}
            files.append(folder / f"said-{rank}-{time.monotonic_ns()}.txt")
            environment = ENVIRONMENT | meeting | place
            arguments = (environment, script, list(argv), str(files[-1]), prepare)
            processes.append(_FORKED.Process(target=_work, args=arguments, daemon=False))
            processes[-1].start()
    deadline = time.monotonic() + seconds
    while running := [process for process in processes if process.exitcode is None]:
        left = deadline - time.monotonic()
        multiprocessing.connection.wait([process.sentinel for process in running], max(0.0, left))
        if left <= 0:
            for process in running:
                process.kill()
                process.join()
    return [
        (process.exitcode, file.read_text(errors="replace") if file.exists() else "")
        for process, file in zip(processes, files, strict=True)
    ]


# What ranks do before a run.


def _instead(replacement: Callable[..., Any]) -> None:
    """Put a function in place of the one that scores windows; it gets that one and the arguments."""
    from scaled_rope.evaluation import perplexity_evaluator

    original = perplexity_evaluator.token_nll
    perplexity_evaluator.token_nll = lambda *given, **more: replacement(original, *given, **more)  # type: ignore


def fail_on_the_second() -> None:
    """Let rank 1 fail in windows beyond 100 positions."""

    def replaced(original: Any, model: Any, ids: Any, *given: Any, **more: Any) -> Any:
        if os.environ["RANK"] == "1" and ids.shape[1] > 100:
            raise ValueError("a fault of one rank")
        return original(model, ids, *given, **more)

    _instead(replaced)


def out_of_memory_on_the_second() -> None:
    """Let rank 1 run out of memory in windows beyond 100 positions."""

    def replaced(original: Any, model: Any, ids: Any, *given: Any, **more: Any) -> Any:
        if os.environ["RANK"] == "1" and ids.shape[1] > 100:
            raise MemoryError
        return original(model, ids, *given, **more)

    _instead(replaced)


def full_disk_on_the_second() -> None:
    """Let rank 1 find no space."""

    def replaced(original: Any, *given: Any, **more: Any) -> Any:
        if os.environ["RANK"] == "1":
            raise OSError(28, "No space left on device", "some file")
        return original(*given, **more)

    _instead(replaced)


def kill_the_second() -> None:
    """Let rank 1 end without a word at its second window."""
    calls = []

    def replaced(original: Any, *given: Any, **more: Any) -> Any:
        calls.append(1)
        if os.environ["RANK"] == "1" and len(calls) == 2:
            os._exit(9)
        return original(*given, **more)

    _instead(replaced)


def no_pass() -> None:
    """Let every pass of a model fail."""

    def replaced(original: Any, *given: Any, **more: Any) -> Any:
        raise ValueError("nothing was to be measured again")

    _instead(replaced)
