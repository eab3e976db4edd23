"""Functions that several benchmarks share."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import NoReturn

from scaled_rope.errors import ConfigError, unknown
from scaled_rope.recipes.files import read_recipe

ROOT = Path(__file__).resolve().parents[1]


def check_names(kind: str, given: Iterable[str] | None, known: Collection[str]) -> None:
    """Raise an error for an unknown name; `kind` says in the message what the names stand for.

    Raises:
        ConfigError: a name is unknown.
    """
    for name in given or ():
        if name not in known:
            raise unknown(kind, name, known)


def run_prepare_commands(recipe: str) -> None:
    """Make the data of a recipe, by its name or file, as train.sh does; finished parts are not repeated.

    Raises:
        ConfigError: one of its commands failed; its own message is on the terminal.
    """
    script = f"source ./environment.sh; find_python; read_recipe {shlex.quote(recipe)}"
    environment = os.environ | {"PYTHON": sys.executable}
    if subprocess.run(["bash", "-euo", "pipefail", "-c", script], env=environment, cwd=ROOT).returncode:
        raise ConfigError(f"the prepare commands of recipe {read_recipe(recipe).name!r} failed")


def gpu_is_lost(error: BaseException) -> bool:
    """Whether an error, such as an illegal memory access, ends all use of the GPU by this process: it is tried out."""
    import torch

    from scaled_rope.evaluation.memory_meter import is_out_of_memory

    if not isinstance(error, RuntimeError) or is_out_of_memory(error) or not torch.cuda.is_available():
        return False
    try:
        torch.cuda.synchronize()
        torch.ones(1, device="cuda").item()
    except RuntimeError as problem:
        return not is_out_of_memory(problem)
    return False


def start_again(arguments: Iterable[str]) -> NoReturn:
    """Replace this process by one that runs the same script with other arguments, with nothing of the GPU's state."""
    sys.stdout.flush()
    os.closerange(3, 4096)  # the driver's files, which hold the memory
    os.execv(sys.executable, [sys.executable, sys.argv[0], *arguments])


def resident_bytes(process: int | str = "self") -> tuple[int, int]:
    """Bytes of a process's resident memory, and how many are anonymous: not pages of files, which can be taken back.

    Raises:
        OSError, IndexError: it has ended.
    """
    status = Path(f"/proc/{process}/status").read_text()
    whole, anonymous = (int(status.split(name)[1].split()[0]) * 1024 for name in ("VmRSS:", "RssAnon:"))
    return whole, anonymous
