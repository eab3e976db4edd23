"""Runs command lines one after the other, each in a fork of this process, and says which heavy packages each imported.

A program by itself, which must not import the packages that it looks for: `python tests/helpers/light_commands.py`
reads a command line per line (a script and its words, or `-m` with a module) and answers each with a line of JSON. So
dozens of command lines cost little more than the start of one interpreter.
"""

from __future__ import annotations

import json
import os
import runpy
import shlex
import sys
import tempfile
import warnings
from typing import Any

HEAVY = ("torch", "transformers", "datasets")


def _run(words: list[str]) -> int:
    """A command line, as Python itself would run it; its exit code."""
    try:
        if words[0] == "-m":
            warnings.filterwarnings("ignore", "'.*' found in sys.modules", RuntimeWarning)  # from before the fork
            sys.argv = words[1:]
            runpy.run_module(words[1], run_name="__main__", alter_sys=True)
        else:
            sys.argv = words
            sys.path.insert(0, os.path.dirname(os.path.abspath(words[0])))
            runpy.run_path(words[0], run_name="__main__")
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    return 0


def answer(line: str) -> dict[str, Any]:
    """What a command line did: exit code, what it wrote, and the heavy packages that it imported."""
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err, tempfile.TemporaryFile() as imported:
        child = os.fork()
        if child == 0:
            code = 70
            try:
                os.dup2(out.fileno(), 1)
                os.dup2(err.fileno(), 2)
                code = _run(shlex.split(line))
                sys.stdout.flush()
                sys.stderr.flush()
                os.write(imported.fileno(), json.dumps([name for name in HEAVY if name in sys.modules]).encode())
            finally:
                os._exit(code)
        _, status = os.waitpid(child, 0)
        for file in (out, err, imported):
            file.seek(0)
        return {
            "code": os.waitstatus_to_exitcode(status),
            "out": out.read().decode(),
            "err": err.read().decode(),
            "imported": json.loads(imported.read() or b"null"),
        }


if __name__ == "__main__":
    sys.path[0] = os.getcwd()  # not this folder

    assert not [name for name in HEAVY if name in sys.modules]
    for text in sys.stdin:
        print(json.dumps(answer(text)), flush=True)
