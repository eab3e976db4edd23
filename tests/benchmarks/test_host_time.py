"""The benchmark of host time: its calls reach the kernel's launch, and its table says what is missing."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys

import pytest

from benchmarks import host_time
from tests.helpers import ROOT

needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs triton")


@needs_triton
def test_every_way_is_timed_and_written_down(tmp_path):
    """In a process of its own: the tests' own runs Triton's interpreter, and another driver would stay behind."""
    rows = tmp_path / "rows.jsonl"
    without = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    flags = ["--tokens=1", "--shapes=llama-3", "--rounds=1", "--calls=9", f"--output={rows}"]
    done = subprocess.run(
        [sys.executable, "benchmarks/host_time.py", *flags], cwd=ROOT, env=without, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    found = [json.loads(line) for line in rows.read_text().splitlines()]
    assert {row["shape"] for row in found} == {"llama-3"}
    assert {host_time.PLAIN, host_time.EAGER, "in place", "with gradients"} <= {row["way"] for row in found}
    assert all(row["microseconds"] > 0 and row["provenance"]["commit"] for row in found)


def test_the_interpreter_is_refused(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(host_time.ConfigError, match="TRITON_INTERPRET=1"):
        host_time.main(["--output", ""])


@pytest.mark.parametrize("flags", ["--tokens=0", "--rounds=0", "--calls=8", "--tokens=4096"])
def test_numbers_that_make_no_sense_are_refused(flags):
    with pytest.raises(host_time.ConfigError, match="at least 1"):
        host_time.main([flags])


def test_an_unknown_shape_is_named():
    with pytest.raises(host_time.ConfigError, match="shape 'llama-4'"):
        host_time.main(["--shapes=llama-4"])


def test_the_table_takes_the_newest_row_and_names_what_is_missing():
    row = {"way": "a", "tokens": 1, "shape": "llama-2", "triton": "3.9.0"}
    rows = [row | {"microseconds": 99.0}, row | {"microseconds": 31.5}]
    rows.append(row | {"way": "b", "triton": "3.6.0", "microseconds": 40.0})
    lines = host_time.table(rows).splitlines()
    assert lines[0] == "| host time, µs | llama-2, T = 1, Triton 3.6.0 | llama-2, T = 1, Triton 3.9.0 |"
    assert lines[2:] == ["| a | not measured | 31.5 |", "| b | 40.0 | not measured |"]
