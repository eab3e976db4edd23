"""The counts in docs/reliability.md are those of the committed rows."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest

from tests.helpers import ROOT


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("reliability_numbers", ROOT / "docs" / "reliability_numbers.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def check(script: ModuleType, monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(sys, "argv", ["reliability_numbers.py", "--check"])
    return script.main()


def test_the_page_shows_the_committed_rows(script: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    assert check(script, monkeypatch) == 0, "run python docs/reliability_numbers.py"


def test_other_rows_and_bad_outcomes_are_seen(
    script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [json.loads(line) for line in script.ROWS.read_text().splitlines()]
    one = next(row for row in rows if row["fault"] == "kill")
    one["outcomes"] = {"identical": one["trials"] - 2, "lost": 2}
    one["kills"] += 1
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    text = script.block(path)
    before = script.block()
    assert text != before and "| 2 lost |" in text
    said, was = (int(block.partition(" lost")[0].rpartition(" ")[2]) for block in (text, before))
    assert said == was + 2
    monkeypatch.setattr(script, "block", lambda: text)
    assert check(script, monkeypatch) == 1
