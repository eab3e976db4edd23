"""The comparison in docs/search.md is that of the committed rows, and its verdict follows from them."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from tests.helpers import ROOT


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("search_numbers", ROOT / "docs" / "search_numbers.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_page_shows_the_committed_rows(script: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["search_numbers.py", "--check"])
    assert script.main() == 0, "run python docs/search_numbers.py"
    monkeypatch.setattr(script, "block", lambda: "other\n")
    assert script.main() == 1


def outcome_rows(scaling: dict[str, Any], loss: float, right: int) -> list[dict[str, Any]]:
    """Rows of a scaling whose losses are about `loss` nats, and which finds `right` of ten passkeys."""
    rows: list[dict[str, Any]] = []
    for text in ("bible", "novel"):
        nats = [1792 * (loss + 0.1 * (index % 3)) for index in range(12)]
        rows.append({"metric": "perplexity", "data": {"name": text}, "length": 2048, "bucket_nats": [nats]})
        rows[-1] |= {"bucket_targets": 12 * 1792}
    for length in (512, 1024, 2048):
        prompts = [{"right": index < right} for index in range(10)]
        rows.append({"metric": "passkey", "data": {"name": "passkey"}, "length": length, "prompts": prompts})
    return [{**row, "scaling": scaling} for row in rows]


def search(name: str, number: int, seed: int = 0) -> dict[str, Any]:
    protocol = {"name": name, "seed": seed, "budget": 100, "passes": 9}
    made = {"commit": "0123456789", "device": "a machine"}
    return {"metric": "search", "protocol": protocol, "scaling": {"method": "longrope", "number": number},
            "first_fitness": 4.0, "fitness": 3.5, "evaluations": 97, "seconds": 3600.0, "provenance": made}  # fmt: skip


@pytest.mark.parametrize(
    ("loss", "right", "outcome"),
    [
        (2.9, 9, "At 100 evaluations: yes."),
        (3.1, 9, "At 100 evaluations: no."),
        (3.0, 9, "At 100 evaluations: no difference is shown."),
        (2.9, 3, "At 100 evaluations: it trades one for the other."),
    ],
)
def test_the_verdict(script: ModuleType, tmp_path: Path, loss: float, right: int, outcome: str) -> None:
    rows = [search("grid", 1), search("evolution", 2), *outcome_rows(script.YARN, 3.05, 9)]
    rows += [*outcome_rows({"method": "longrope", "number": 1}, 3.0, 9)]
    rows += [*outcome_rows({"method": "longrope", "number": 2}, loss, right)]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    text = script.block(path)
    assert outcome in text and "9 passes per evaluation" in text and "2.0 hours" in text
    lines = [line for line in text.splitlines() if line.startswith("| ")]
    assert [line.split(" | ")[0] for line in lines[1:]] == [
        "| YaRN as it is",
        "| LongRoPE's evolution, 32 divisors",
        "| grid, three numbers of YaRN",
    ]
    # exp(3.05 + 0.1) of the windows' mean, and nine of ten
    assert lines[1].endswith("| 23.34 | 23.34 | 90 % | 90 % | 90 % |")


def test_seeds_are_pooled_and_half_a_comparison_has_no_verdict(script: ModuleType, tmp_path: Path) -> None:
    rows = [search("grid", 1), search("grid", 2, seed=1), *outcome_rows(script.YARN, 3.0, 9)]
    rows += [
        *outcome_rows({"method": "longrope", "number": 1}, 3.0, 10),
        *outcome_rows({"method": "longrope", "number": 2}, 3.2, 8),
    ]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    text = script.block(path)
    assert "is not finished" in text and "| 97 | 2 | 4.000 | 3.500 | 24.53 | 24.53 | 90 % | 90 % | 90 % |" in text
    assert script.block(tmp_path / "none.jsonl") == "Not measured yet.\n"
