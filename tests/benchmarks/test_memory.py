"""The benchmark of memory: plans against measured processes."""

from __future__ import annotations

import importlib.util
import json
import sys

import pytest

from tests.helpers import ROOT


def benchmark():
    """benchmarks/memory.py as a module."""
    spec = importlib.util.spec_from_file_location("memory_benchmark", ROOT / "benchmarks" / "memory.py")
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)  # where a dataclass looks for its module
    spec.loader.exec_module(module)
    return module


@pytest.mark.slow  # two processes that import everything
def test_a_plan_is_near_what_a_process_holds(monkeypatch):
    """The cheapest case of the benchmark, smaller; the benchmark itself has the large ones."""
    memory, name = benchmark(), "weights and optimizer, small"
    planned, measured = memory.planned(name), memory.measure(memory.case_fields(name))
    assert measured.seconds > 0 and measured.processor_seconds > 0
    assert planned > 1e9
    assert planned == pytest.approx(measured.peak, rel=0.15)


def test_committed_rows_of_the_benchmark_are_within_fifteen_percent():
    rows = [json.loads(line) for line in (ROOT / "data/benchmarks/memory_cpu.jsonl").read_text().splitlines()]
    assert {row["case"] for row in rows} == set(benchmark().CASES)
    for row in rows:
        assert row["measured_gb"] >= (1 if row["case"].endswith("small") else 2), row["case"]
        assert row["planned_gb"] == pytest.approx(row["measured_gb"], rel=0.15), row["case"]
