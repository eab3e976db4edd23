"""The comparison of searches: what is tested after which budget."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

from benchmarks import search_worth
from scaled_rope.command_line import Parser
from scaled_rope.errors import ConfigError
from scaled_rope.flags.search import SEARCH_STRATEGIES, add_search_arguments, check_search_arguments
from scaled_rope.scaling.record import RopeScaling
from tests.helpers import ROOT


def trace(folder: Path, fitness: list[float]) -> Path:
    settings = {"model_fingerprint": "m", "dtype": "float32", "data": "train", "text": "t"}
    rows: list[dict[str, Any]] = [{"metric": "search_settings", "settings": settings}]
    for number, value in enumerate(fitness):
        rows.append({"evaluation": number, "fitness": value, "scaling": {"number": number}, "provenance": {}})
        rows[-1] |= {"answers": {"512": [1.0, 1.0]}, "beyond": [1.0], "seconds": 1.0}
        rows[-1]["origin"] = {"kind": "start" if number < 2 else "mutant"}
    folder.mkdir()
    (folder / "trace.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def test_the_best_after_each_budget(tmp_path: Path) -> None:
    values = [5.0, 4.5, *[4.0 - 0.001 * (index % 7) for index in range(148)]]
    values[120] = 3.0
    folder = trace(tmp_path / "out", values)
    rows = [search_worth.outcome("grid", 1, folder, budget) for budget in (100, 150)]
    assert [row["protocol"]["budget"] for row in rows] == [100, 150]
    assert [(row["found_at"], row["fitness"]) for row in rows] == [(9, pytest.approx(3.994)), (121, 3.0)]
    assert {(row["first_fitness"], row["protocol"]["passes"]) for row in rows} == {(4.5, 3)}
    assert [row["seconds"] for row in rows] == [100, 150]


def test_the_flags_are_those_of_the_command() -> None:
    strategies = set()
    for flags in search_worth.VARIANTS.values():
        parser = Parser("search")
        add_search_arguments(parser)
        args = parser.parse_args([search_worth.MODEL, "--target", "2048", *search_worth.SEARCHED, *flags, "-d", "x"])
        args.model, args.dataset = str(ROOT / args.model), str(ROOT / "docs")
        check_search_arguments(args)
        strategies.add(args.strategy)
    assert strategies == {*SEARCH_STRATEGIES} - {"coordinate"}


def test_a_search_that_fails_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def run(command: list[str], **_: object) -> subprocess.CompletedProcess[bytes]:
        asked.append(command)
        return subprocess.CompletedProcess(command, 2)

    monkeypatch.setattr(subprocess, "run", run)
    with pytest.raises(ConfigError, match="the search 'cma-es' with seed 3 failed"):
        search_worth.search("cma-es", 3, 10, tmp_path)
    with pytest.raises(ConfigError, match="eval/perplexity.py failed"):
        search_worth.test([RopeScaling("default")], tmp_path / "rows.jsonl")
    with pytest.raises(ConfigError, match="the search 'grid'"):
        search_worth.search("grid", 0, 400, tmp_path)
    assert asked[-1][-1] == str(tmp_path / "grid-0-400")
    assert asked[0][-4:] == ["--evaluations", "10", "--output", str(tmp_path / "cma-es-3")]
