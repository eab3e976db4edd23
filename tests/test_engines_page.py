"""The tables of certified engines in docs/serving.md are those of the committed rows."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from types import ModuleType
from typing import Any

import pytest

from scaled_rope.results import read_rows
from tests.helpers import ROOT


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("docs_engines", ROOT / "docs" / "engines.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def row(engine: str, spec: str, **fields: Any) -> dict[str, Any]:
    protocol = {"engine": engine, "version": "1", "asked": "over HTTP", "served": "as claimed", "lengths": [64, 1000]}
    source = {"commit": "0123456789", "device": "a processor", "cpu_count": 2}
    about = {"metric": "engine", "model": "m", "dtype": "float32", "spec": spec, "protocol": protocol}
    said = {"export": {"status": "exact"}, "verdict": "right", "worst": 0.001, "named": [], "provenance": source}
    return about | said | fields


def test_the_page_shows_the_committed_rows() -> None:
    done = subprocess.run([sys.executable, "docs/engines.py", "--check"], cwd=ROOT, timeout=60)
    assert done.returncode == 0, "run python docs/engines.py"


def test_every_engine_has_a_column_and_every_scaling_a_line(script: ModuleType) -> None:
    other = {"verdict": "other", "named": ["this model unscaled", "its other name"], "expected": False}
    partial = {"verdict": "other", "named": ["longrope x8 (short_factor=4 values 1a2b) with the long list"]}
    rows = [
        row("vllm", "yarn:8"),
        row("llama.cpp", "yarn:8", **other),
        row("vllm", "longrope:8,short_factor=1+1.5+2+3", export={"status": "refused"}),
        row("llama.cpp", "longrope:8,short_factor=1+1.5+2+3", export={"status": "partial"}, **partial),
    ]
    assert script.scalings_table(rows) == [
        "| | vLLM 1, over HTTP | llama.cpp, 1, over HTTP |",
        "|---|---|---|",
        "| `yarn:8` | exact: right, 1.0e-03 | exact: **other**, this model unscaled or its other name |",
        "| `longrope:8,short_factor=…` | refused | partial: other, longrope x8 with the long list |",
    ]


def test_a_release_that_reads_the_older_keys_alone_is_not_held_against_export(script: ModuleType) -> None:
    other = {"verdict": "other", "named": ["this model unscaled"], "export": {"status": "exact", "older_keys": False}}
    assert script.cell(row("transformers", "ntk:8", **other)) == "not in the older keys: this model unscaled"


def test_controls_and_caches_have_tables_of_their_own(script: ModuleType) -> None:
    control = row("vllm", "yarn:8", verdict="other", exit_code=1, expected=True)
    control["protocol"] = control["protocol"] | {"served": "default"}
    control["sentence"] = "serves this model unscaled, not yarn x8 (worst difference 1 nats)"
    cache = {"bytes": 2**30, "tokens": 349440, "plan_tokens": 349525, "sequences": 170.62, "plan_sequences": 170.66}
    text = "\n".join(script.block([row("vllm", "yarn:8", dtype="bfloat16", cache=cache), control]))
    assert "1 of 1 named" in text
    assert "| vLLM 1, over HTTP | `yarn:8` | `default` | 1 | serves this model unscaled, not yarn x8 |" in text
    assert "| m, `yarn:8` | bfloat16 | 1 | 349440 | 349525 | 170.62 | 170.66 |" in text
    assert "m in bfloat16, prompts of 64 and 1000 tokens:" in text


def test_what_was_measured_is_as_expected() -> None:
    """Every scaling that export calls exact was right, and every control was named."""
    rows = [one for one in read_rows(ROOT / "data" / "engines.jsonl") if one["metric"] == "engine"]
    assert [one["spec"] for one in rows if not one["expected"]] == []
    controls = [one for one in rows if one["protocol"]["served"] != "as claimed"]
    assert {one["exit_code"] for one in controls} == {1} and len(controls) >= 2
