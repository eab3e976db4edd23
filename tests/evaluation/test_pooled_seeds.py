"""Rows of several seeds as one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from scaled_rope.evaluation.pooled_seeds import pooled
from scaled_rope.evaluation.statistics import wilson_interval
from scaled_rope.report.tables import describe, load_results, tables_of, title_of
from scaled_rope.results import Row
from tests.helpers.report_rows import new_row, write


def row_of(seed: int, right: int, n: int = 50, **more: Any) -> Row:
    protocol = {"name": "teacher-forced", "iterations": n, "depths": "grid", "seed": seed, **more.pop("protocol", {})}
    prompts = [{"depth": i / n, "distance": 9, "key": seed, "right": i < right} for i in range(n)]
    data = {"name": "passkey", "fingerprint": f"{seed}"}
    numbers = {"n": n, "right": right, "accuracy": right / n, "interval": wilson_interval(right, n), "seconds": 1.5}
    return new_row("passkey", 64, data=data, protocol=protocol, prompts=prompts, **{**numbers, **more})


def test_counts_intervals_and_prompts_are_of_all() -> None:
    rows = [row_of(43, 40), row_of(42, 50), row_of(44, 45)]
    joined = pooled(rows)
    assert (joined["n"], joined["right"], joined["accuracy"]) == (150, 135, 0.9)
    assert joined["interval"] == wilson_interval(135, 150) and joined["seconds"] == 4.5
    assert joined["protocol"]["seeds"] == [42, 43, 44] and "seed" not in joined["protocol"]
    assert len(joined["prompts"]) == 150 and sum(one["right"] for one in joined["prompts"]) == 135
    assert pooled(rows)["data"]["fingerprint"] not in {row["data"]["fingerprint"] for row in rows}


def test_one_row_stays_as_it_is_and_failures_do_not_count() -> None:
    alone = row_of(42, 50)
    failed = row_of(43, 0, error="out of memory")
    assert pooled([alone]) is alone and pooled([alone, failed]) is alone and pooled([failed]) is failed
    again = row_of(42, 49)
    assert pooled([alone, again]) is again


def test_reports_show_the_seeds_together_and_the_wordings_apart(tmp_path: Path) -> None:
    needles = [row_of(seed, 10, protocol={"wording": "needle"}) for seed in (42, 43)]
    results = load_results([write(tmp_path / "rows", [row_of(42, 49), row_of(43, 50), row_of(44, 50), *needles])])
    released, needle = results.of("passkey")
    assert (title_of(released), title_of(needle)) == ("Passkeys found", "Passkeys found, needle wording")
    assert "50 prompts per length, depths grid, for each of the seeds 42, 43, 44" in describe(released)
    (table,) = tables_of(released)
    (cell,) = table.lines[0][1]
    low, high = wilson_interval(149, 150)
    assert (cell.text, cell.interval) == ("149/150", (100 * low, 100 * high))
    (row,) = next(iter(needle.rows.values())).values()
    assert (row["n"], row["right"]) == (100, 20)
