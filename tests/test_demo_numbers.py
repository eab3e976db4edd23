"""The demo's numbers in README.md and docs/demo.md are those of the committed rows."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import ModuleType

import pytest

from tests.helpers import ROOT


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("demo_numbers", ROOT / "docs" / "demo_numbers.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_pages_and_picture_show_the_committed_rows(script: ModuleType) -> None:
    assert script.stale() == [], "run python docs/demo_numbers.py"


def test_other_rows_are_noticed(script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [json.loads(line) for line in script.ROWS.read_text().splitlines()]
    (row,) = [
        one for one in rows if one["metric"] == "passkey" and one["model"] == script.TUNED and one["length"] == 2048
    ]
    row |= {"right": 0, "accuracy": 0.0}
    changed = tmp_path / "demo_rows.jsonl"
    changed.write_text("".join(json.dumps(one) + "\n" for one in rows))
    readme = script.blocks(changed)["README.md"]
    n = row["n"]
    (line,) = [text for text in readme.splitlines() if text.startswith("| passkeys found, extended |")]
    assert f"| 0/{n} |" in line
    monkeypatch.setattr(script, "blocks", lambda: {"README.md": readme})
    monkeypatch.setattr(script, "digest", lambda: "other")
    assert script.stale() == ["README.md", "docs/images/demo.png"]


def test_the_control_and_every_text_are_on_the_page(script: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    page = script.blocks()["docs/demo.md"]
    assert page.count("| yarn x8 (fine-tuned), against the base |") == 2
    for text in ("a novel", "three books of the King James Bible"):
        assert f"Perplexity by position on {text} that none of these models was trained on:" in page


def test_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").split()) < 1300
