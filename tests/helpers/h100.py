"""Triton kernels compiled for an H100, on a machine that has none."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

_BEFORE = """
import json, re, torch, triton
from triton.backends.compiler import GPUTarget
import {module} as module


class H100:
    get_current_target = staticmethod(lambda: GPUTarget("cuda", 90, 32))
    get_current_device = staticmethod(lambda: 0)
    get_current_stream = staticmethod(lambda device: 0)


class Compiled:
    def __getitem__(self, grid):
        return lambda *args, **options: found.append(kernel.warmup(*args, grid=grid, **options).asm["ptx"])


triton.runtime.driver.set_active(H100())
kernel, found = module.{kernel}, []
module.{kernel} = Compiled()
"""


def compiled(module: str, kernel: str, launches: str, **environment: str) -> Any:
    """Run `launches` and return the last line that it prints, as JSON.

    It is Python code that launches from `module`; each launch of `kernel` adds a text in PTX to `found` and computes
    nothing.
    """
    without = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    code = _BEFORE.format(module=module, kernel=kernel) + launches
    done = subprocess.run([sys.executable, "-c", code], env=without | environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])
