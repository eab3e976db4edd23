"""How each engine is started with the words of a scaling that `scaled-rope export` prints, and ended again.

Engines with a server are started as their users do. Of those without one, a process of its own holds the models and
gives their logits.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import io
import json
import os
import re
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any
from urllib.error import URLError
from urllib.request import urlopen

import numpy as np

from scaled_rope.cli import main as scaled_rope
from scaled_rope.errors import ConfigError
from scaled_rope.serving.export_report import ExportReport
from scaled_rope.serving.gguf import GgufRope, add_rope, write_checkpoint

FOLDER = Path(__file__).resolve().parent
START = int(os.environ.get("START_SECONDS", "900"))
"""Seconds that an engine may take to start."""
VLLM_CACHE_GIB = 2
"""Memory of vLLM's key/value cache: one sequence of SmolLM2's served length takes 1.5 GB of it in float32."""
VLLM_ON_CPU = {
    "VLLM_CPU_KVCACHE_SPACE": f"{VLLM_CACHE_GIB}",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
}


@dataclass(frozen=True)
class Served:
    """A model, and the scaling whose words the engine is given."""

    model: str
    spec: str
    target: str
    """Of `export`."""
    length: int
    dtype: str
    report: ExportReport


@dataclass(frozen=True)
class Started:
    """An engine that runs."""

    command: Sequence[str]
    url: str | None = None
    candidate: Any = None
    """Of an engine that is no server: what `certify` takes, such as a function token ids -> logits [T, V]."""
    log: Path | None = None
    cache_tokens: int | None = None
    """How many its key/value cache holds, where it says so."""


Start = Callable[[Served, Path], AbstractContextManager[Started]]
"""(what to serve, an empty folder) -> the engine, until the context ends."""


@dataclass(frozen=True)
class Engine:
    """An engine: the name of its target in `export`, its version, and how one is held for several starts."""

    target: str
    version: Callable[[str], str]
    """Of a program."""
    held: Callable[[str], AbstractContextManager[Start]]
    """program -> how it is started."""
    asked: str = "over HTTP"
    older_alone: Callable[[str], bool] = lambda version: False
    """Whether a version of it reads `rope_scaling` and no `rope_parameters`."""


# Processes ------------------------------------------------------------------------------------------------------------
def environment(**more: str) -> dict[str, str]:
    """That of an engine's process, which must not see this project's packages."""
    kept = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "PYTHONHOME")}
    return kept | {"HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""} | more


def said(command: Sequence[str]) -> str:
    """The output of a program.

    Raises:
        ConfigError: it is not there, or fails.
    """
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=START, env=environment())
    except OSError as error:
        raise ConfigError(f"--program {command[0]}: {error.strerror}") from None
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise ConfigError(f"--program {command[0]} fails: {last}")
    return done.stdout + done.stderr


def last_lines(log: Path, count: int) -> str:
    """The end of a log, on one line."""
    text = log.read_text(errors="replace") if log.exists() else ""
    return " | ".join(text.strip().splitlines()[-count:])


@contextmanager
def running(command: Sequence[str], log: Path, **options: Any) -> Iterator[subprocess.Popen[str]]:
    """A process with all its children, ended with the context."""
    with log.open("w") as file:
        try:
            options = {"stdout": file, **options}  # vLLM logs there
            process = subprocess.Popen(list(command), stderr=file, text=True, start_new_session=True, **options)
        except OSError as error:
            raise ConfigError(f"--program {command[0]}: {error.strerror}") from None
        try:
            yield process
        finally:
            for number in (signal.SIGTERM, signal.SIGKILL):
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, number)
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(timeout=20)
            for pipe in (process.stdin, process.stdout):
                if pipe is not None:
                    with contextlib.suppress(BrokenPipeError):
                        pipe.close()


@contextmanager
def serving(command: Sequence[str], port: int, ready: str, log: Path, **variables: str) -> Iterator[Started]:
    """A server, as soon as it answers at `ready`.

    Raises:
        ConfigError: it ends before, or doesn't answer in time.
    """
    with running(command, log, env=environment(**variables)) as process:
        yield as_soon_as_it_answers(command, port, ready, log, lambda: process.poll() is None)


def as_soon_as_it_answers(
    command: Sequence[str], port: int, ready: str, log: Path, alive: Callable[[], bool]
) -> Started:
    """Wait for a server that was started.

    Raises:
        ConfigError: it ends before, or doesn't answer in time.
    """
    address, deadline = f"http://127.0.0.1:{port}", time.monotonic() + START
    while not answers(address + ready):
        if not alive() or time.monotonic() > deadline:
            raise ConfigError(f"{Path(command[0]).name} did not start: {last_lines(log, 12)}")
        time.sleep(0.5)
    return Started(command, url=f"{address}/v1", log=log)


def answers(url: str) -> bool:
    """Whether a server says that all is well."""
    try:
        with urlopen(url, timeout=5) as answer:
            return bool(answer.status == 200)
    except (URLError, OSError):
        return False


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def version_of(package: str, program: str) -> str:
    """The version of a package in the environment of an interpreter."""
    code = f"import importlib.metadata as m; print(m.version({package!r}))"
    return said([program, "-c", code]).strip().splitlines()[-1]


@contextmanager
def started_anew(
    start: Callable[[str, Served, Path], AbstractContextManager[Started]], program: str
) -> Iterator[Start]:
    """An engine of which nothing is held between two starts."""
    yield partial(start, program)


# vLLM -----------------------------------------------------------------------------------------------------------------
def vllm_command(program: str, model: str, flags: Sequence[str], port: int, dtype: str) -> list[str]:
    """`vllm serve` with what `export` prints, on a CPU."""
    own = ["--host", "127.0.0.1", "--port", f"{port}", "--dtype", dtype, "--enforce-eager", "--max-num-seqs", "4"]
    return [program, "serve", model, *flags, *own]


@contextmanager
def vllm_servers(program: str) -> Iterator[Start]:
    """`vllm serve`, each server a fork of one process that has imported vLLM: that takes most of a start's time."""
    with asking("vllm_servers.py", str(Path(program).with_name("python")), **VLLM_ON_CPU) as (_, ask):

        @contextmanager
        def start(served: Served, folder: Path) -> Iterator[Started]:
            port, log = free_port(), folder / "log"
            command = vllm_command(program, served.model, served.report.flags, port, served.dtype)
            number = ask(serve=command[1:], log=str(log))
            try:
                started = as_soon_as_it_answers(command, port, "/health", log, lambda: bool(ask(alive=number)))
                yield replace(started, cache_tokens=cache_tokens(log.read_text(errors="replace")))
            finally:
                ask(end=number)

        yield start


def cache_tokens(log: str) -> int | None:
    """The tokens that vLLM's log says its key/value cache holds."""
    found = re.search(r"KV cache size: ([\d,]+) tokens", log)
    return None if found is None else int(found[1].replace(",", ""))


def vllm_options(served: Served) -> dict[str, Any]:
    """The arguments of vLLM's `LLM` that stand for the flags that `export` prints."""
    flags = dict(zip(served.report.flags[::2], served.report.flags[1::2], strict=True))
    return {
        "model": served.model,
        "dtype": served.dtype,
        "hf_overrides": json.loads(flags["--hf-overrides"]),
        "max_model_len": int(flags["--max-model-len"]),
        "enforce_eager": True,
        "skip_tokenizer_init": True,
        "max_num_seqs": 4,
    }


@contextmanager
def vllm_here(program: str) -> Iterator[Start]:
    """vLLM's `LLM` in this process, which must be of its environment: one import for all starts."""
    os.environ |= VLLM_ON_CPU | {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
    vllm = importlib.import_module("vllm")

    @contextmanager
    def start(served: Served, folder: Path) -> Iterator[Started]:
        llm = vllm.LLM(**vllm_options(served))
        try:
            cache = llm.llm_engine.vllm_config.cache_config
            tokens = cache.num_gpu_blocks * cache.block_size if cache.num_gpu_blocks else None
            yield Started(("LLM", *served.report.flags), candidate=llm, cache_tokens=tokens)
        finally:
            del llm
            gc.collect()

    yield start


# llama.cpp ------------------------------------------------------------------------------------------------------------
def llama_cpp_flags(gguf: Path, flags: Sequence[str], port: int, dtype: str) -> list[str]:
    """The flags that `export` prints, and a key/value cache of that dtype; llama.cpp's own default is float16."""
    cache = {"float32": "f32", "float16": "f16", "bfloat16": "bf16"}[dtype]
    exact = ["-ctk", cache, "-ctv", cache, "-fa", "off", "-np", "1", "-t", "1"]  # threads wait for each other spinning
    return ["-m", str(gguf), *flags, *exact, "--host", "127.0.0.1", "--port", f"{port}"]


def start_llama_cpp(program: str, served: Served, folder: Path) -> AbstractContextManager[Started]:
    rope, flags = served.report.gguf, served.report.flags
    words = [program]
    if is_python(program):
        words = [program, str(FOLDER / "llama_cpp_server.py")]
        flags, overrides = without_overrides(flags)
        if overrides:
            rope = GgufRope(overrides) if rope is None else replace(rope, metadata=rope.metadata | overrides)
    gguf = folder / "plain.gguf"
    write_checkpoint(served.model, gguf, GgufRope())
    if rope is not None:  # as `export --gguf` does
        add_rope(gguf, folder / "copy.gguf", rope)
        gguf = folder / "copy.gguf"
    port = free_port()
    return serving([*words, *llama_cpp_flags(gguf, flags, port, served.dtype)], port, "/health", folder / "log")


def llama_cpp_version(program: str) -> str:
    """The commit that `llama-server --version` says, or the release of the wheel that holds the server."""
    if is_python(program):
        return f"xllamacpp {version_of('xllamacpp', program)}"
    found = re.search(r"commit (\w+)\)", said([program, "--version"]))
    if found is None:
        raise ConfigError(f"--program {program} says no version")
    return found[1]


def is_python(program: str) -> bool:
    return Path(program).name.startswith("python")


def without_overrides(flags: Sequence[str]) -> tuple[list[str], dict[str, Any]]:
    """Flags of llama.cpp without `--override-kv`, and the metadata that these say."""
    kept, overrides = [], {}
    for flag, value in zip(flags[::2], flags[1::2], strict=True):
        if flag != "--override-kv":
            kept += [flag, value]
            continue
        key, _, typed = value.partition("=")
        kind, _, number = typed.partition(":")
        overrides[key] = int(number) if kind == "int" else float(number)
    return kept, overrides


# Processes that give logits -------------------------------------------------------------------------------------------
def write_served(served: Served, folder: Path) -> Path:
    """A checkpoint whose config.json is that of `export --output`; its other files are links.

    Raises:
        ConfigError: `export` refuses.
    """
    words = ["export", served.model, "--for", served.target, "--scaling", served.spec, "--length", f"{served.length}"]
    with contextlib.redirect_stdout(io.StringIO()):
        code = scaled_rope([*words, "--output", str(folder)])
    if code == 2:
        raise ConfigError(f"export refuses {served.spec!r}")
    for file in Path(served.model).resolve().iterdir():
        if file.is_file() and not (folder / file.name).exists():
            (folder / file.name).symlink_to(file)
    return folder


@contextmanager
def asking(script: str, program: str, **variables: str) -> Iterator[tuple[Path, Callable[..., Any]]]:
    """A process of an engine's environment: its log, and a function that asks it a question and returns the answer."""
    with contextlib.ExitStack() as stack:
        log = Path(stack.enter_context(tempfile.TemporaryDirectory())) / "log"
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "env": environment(**variables)}
        process = stack.enter_context(running([program, str(FOLDER / script)], log, **pipes))

        def ask(**question: Any) -> Any:
            try:
                process.stdin.write(json.dumps(question) + "\n")
                process.stdin.flush()
                answer = process.stdout.readline()
            except BrokenPipeError:
                answer = ""
            if not answer:
                raise ConfigError(f"{script} ended: {last_lines(log, 3)}")
            return json.loads(answer)

        yield log, ask


@contextmanager
def worker(script: str, program: str) -> Iterator[Start]:
    """A process that loads one checkpoint after another and gives logits."""
    with asking(script, program) as (log, ask):

        @contextmanager
        def start(served: Served, folder: Path) -> Iterator[Started]:
            ask(load=str(write_served(served, folder / "served")), dtype=served.dtype)
            command = (program, str(FOLDER / script), "served")
            yield Started(command, candidate=lambda ids: np.load(ask(ids=list(ids))), log=log)

        yield start


ENGINES = {
    "transformers": Engine(
        "transformers",
        partial(version_of, "transformers"),
        partial(worker, "transformers_worker.py"),
        "in a process",
        older_alone=lambda version: int(version.partition(".")[0]) < 5,
    ),
    "vllm": Engine(
        "vllm",
        lambda program: version_of("vllm-cpu", str(Path(program).with_name("python"))),
        vllm_servers,
    ),
    "vllm-llm": Engine("vllm", partial(version_of, "vllm-cpu"), vllm_here, "as LLM in one process"),
    "llama.cpp": Engine("llama.cpp", llama_cpp_version, partial(started_anew, start_llama_cpp)),
    "sglang": Engine(
        "sglang",
        partial(version_of, "sglang"),
        partial(worker, "sglang_worker.py"),
        "its tables in a model of transformers",
    ),
    "mlx": Engine("mlx", partial(version_of, "mlx-lm"), partial(worker, "mlx_worker.py"), "in a process"),
}
"""By name."""
