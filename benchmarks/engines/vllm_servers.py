"""Servers of vLLM, each a fork of this process, which has imported vLLM once; `starting.py` asks for them.

    python benchmarks/engines/vllm_servers.py

It imports nothing of this project. Each line of its input is a JSON object: {"serve": [ARGUMENT, ...], "log": FILE}
runs vLLM's own command line with these arguments in a process group of its own and is answered with its process id,
{"alive": ID} with whether that process still runs, {"end": ID} with true once its group is gone.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import multiprocessing
import os
import signal
import sys
import time
import traceback

IMPORTED = (
    "entrypoints.cli.main",
    "entrypoints.cli.serve",
    "v1.engine.async_llm",
    "v1.engine.core",
    "v1.core.sched.scheduler",
    "v1.worker.cpu_worker",
    "v1.attention.backends.cpu_attn",
    "renderers.hf",
    "model_executor.layers.quantization.compressed_tensors.compressed_tensors",
    "model_executor.layers.quantization.online",
    "model_executor.models.llama",
)
"""Modules that a server would import; none of it computes anything or starts a thread."""


def serve(arguments: list[str], log: str) -> int:
    """Fork a server; returns the process id."""
    number = os.fork()
    if number:
        return number
    code = 1
    try:
        os.setsid()
        file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        for stream in (1, 2):
            os.dup2(file, stream)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        context = multiprocessing.get_context
        # On a CPU vLLM asks for "spawn", with which both of its further processes would import everything again.
        multiprocessing.get_context = lambda method=None: context("fork")  # type: ignore[assignment]
        sys.argv = ["vllm", *arguments]
        importlib.import_module("vllm.entrypoints.cli.main").main()
        code = 0
    except SystemExit as error:
        if isinstance(error.code, str):
            print(error.code, file=sys.stderr)
        code = error.code if isinstance(error.code, int) else int(error.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        os._exit(code)


def alive(number: int) -> bool:
    with contextlib.suppress(ChildProcessError):
        return os.waitpid(number, os.WNOHANG) == (0, 0)
    return False


def end(number: int) -> None:
    """End a server with all its children."""
    for order in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(number, order)
        deadline = time.monotonic() + 20
        while alive(number) and time.monotonic() < deadline:
            time.sleep(0.1)


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # vLLM logs there
    for name in IMPORTED:
        importlib.import_module(f"vllm.{name}")  # not in this project's environment
    running: set[int] = set()
    try:
        for line in sys.stdin:
            asked = json.loads(line)
            answer: bool | int = True
            if "serve" in asked:
                answer = serve(asked["serve"], asked["log"])
                running.add(answer)
            elif "alive" in asked:
                answer = alive(asked["alive"])
            else:
                end(asked["end"])
                running.remove(asked["end"])
            print(json.dumps(answer), file=answers, flush=True)
    finally:  # also where whoever asked is gone
        for number in running:
            end(number)


if __name__ == "__main__":
    main()
