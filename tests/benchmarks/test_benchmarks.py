"""The benchmarks that no other test imports: they can be imported, and one that looks into caches runs."""

from __future__ import annotations

import ast
import importlib
import re
from pathlib import Path

import pytest

from benchmarks import common, decode
from scaled_rope.errors import ConfigError
from scaled_rope.results import read_rows
from tests.helpers import ROOT

MODULES = sorted(
    ".".join(path.relative_to(ROOT).with_suffix("").parts)
    for path in (ROOT / "benchmarks").rglob("*.py")
    if path.name != "__init__.py"
)


@pytest.mark.parametrize("module", MODULES)
def test_names_that_a_benchmark_imports_are_there(module: str) -> None:
    importlib.import_module(module)


def test_decoding_is_timed_for_every_variant(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = tmp_path / "rows.jsonl"
    small = ["--lengths", "1030", "--rounds", "1", "--layers", "1"]
    assert decode.main([*small, "--output", str(rows)]) == 0
    found = {row["variant"]: row for row in read_rows(rows)}
    assert len(found) == 6 and found[decode.BASE]["ratio"] == 1
    assert all(row["seconds"] > 0 and row["length"] == 1030 for row in found.values())
    assert found["stepped"]["rebuild_seconds"] > 0
    with pytest.raises(ConfigError, match="must be above 1024"):
        decode.main(["--lengths", "1024", "--output", ""])


def test_a_name_that_is_not_there_is_refused() -> None:
    common.check_names("part", None, ["sweep"])
    common.check_names("part", ["sweep"], ["sweep", "table1"])
    with pytest.raises(ConfigError, match="unknown part 'sweeps'; did you mean 'sweep'"):
        common.check_names("part", ["sweep", "sweeps"], ["sweep"])


@pytest.mark.parametrize("script", sorted(ROOT.glob("benchmarks/**/*.py")), ids=lambda path: path.name)
def test_a_script_measures_the_checkout_that_it_lies_in(script: Path) -> None:
    """torch imports the installed package when it is imported, so that of the checkout must be named before."""
    lines = [ast.unparse(one) for one in ast.parse(script.read_text()).body]
    places = [place for place, line in enumerate(lines) if line.startswith("sys.path.insert")]
    heavy = [
        place for place, line in enumerate(lines) if re.match(r"(import|from) (torch|transformers|triton)\b", line)
    ]
    assert not places or not heavy or places[0] < heavy[0]
