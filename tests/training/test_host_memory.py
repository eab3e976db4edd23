"""Memory that is kept: tensors of a step come without new pages, and a user's own settings stand."""

from __future__ import annotations

import os
import platform
import subprocess
import sys

import pytest

from tests.helpers import ROOT

pytestmark = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc's allocator alone is set")

# Prints whether memory is kept, and how many pages a round of ten tensors of 32 MiB takes anew after a first round.
PROGRAM = """
import resource, sys, torch
from scaled_rope.training.host_memory import keep_host_memory, use_huge_pages
if sys.argv[1] != "leave":
    use_huge_pages()
kept = sys.argv[1] != "leave" and keep_host_memory(int(sys.argv[1]))
def faults():
    for _ in range(10):
        torch.ones(2**23).exp_()
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
before = faults()
print(kept, faults() - before)
"""


def _run(what: str, **settings: str) -> tuple[bool, int]:
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "GLIBC_", "THP_"))}
    command = [sys.executable, "-c", PROGRAM, what]
    done = subprocess.run(command, cwd=ROOT, env=clean | settings, capture_output=True, text=True, check=True)
    kept, pages = done.stdout.split()
    return kept == "True", int(pages)


def test_tensors_of_a_second_step_take_no_new_pages() -> None:
    # 10 x 32 MiB are 81,920 pages of 4 KiB; a sixteenth of them leaves room for what Python does meanwhile.
    kept, pages = _run("0")
    assert kept and pages < 81920 // 16
    assert _run("leave", THP_MEM_ALLOC_ENABLE="0")[1] > 81920 // 2


@pytest.mark.parametrize("name, value", [("MALLOC_ARENA_MAX", "2"), ("GLIBC_TUNABLES", "glibc.malloc.arena_max=2")])
def test_settings_of_the_user_stand(name: str, value: str) -> None:
    assert _run("0", **{name: value})[0] is False


def test_large_hidden_states_are_given_back() -> None:
    """They are mapped one by one; kept in one heap, those that are freed would leave gaps between those that stay."""
    assert _run(str(2**25))[0] is False and _run(str(2**25 - 1))[0] is True
