"""The plan, the statistics and the tables of the miniature."""

from __future__ import annotations

import math
import statistics
from pathlib import Path
from typing import Any

import pytest

import finetune
from benchmarks import paper_mini_report
from benchmarks.paper_mini_report import ROOT, SWEEP, Results, Run, parts, spread, swept
from scaled_rope.errors import ConfigError
from scaled_rope.results import read_rows

RATES = dict.fromkeys(paper_mini_report.TABLE1, 1e-3)
LENGTHS = (256, 2048)


def _row(
    name: str, value: float, length: int = 256, *, text: str = paper_mini_report.NOVEL, **more: Any
) -> dict[str, Any]:
    fields = {"metric": "perplexity", "carried": True, "label": "", "length": length, "data": {"name": text}}
    fields["protocol"] = {"name": "truncate"}
    return {**fields, "model": str(ROOT / name / "model"), "perplexity_bucket": value, **more}


def test_a_new_value_is_predicted_as_by_hand() -> None:
    # t(2 degrees, 97.5 %) = 4.303, from tables; mean 2, sd 1: 2 ± 4.303·√(4/3)
    low, high = spread([1.0, 2.0, 3.0]).prediction
    assert (low, high) == pytest.approx((2 - 4.9687, 2 + 4.9687), abs=1e-3)
    with pytest.raises(ConfigError, match="prediction from 1"):
        _ = spread([1.0]).prediction


def test_the_prediction_covers_what_it_says() -> None:
    import numpy

    draws = numpy.random.default_rng(0).normal(size=(4000, 4))
    hits = [low <= new <= high for *seen, new in draws.tolist() for low, high in [spread(seen).prediction]]
    # A share of 0.95 over 4000 draws has a standard error of 0.0034; four of them.
    assert abs(statistics.fmean(hits) - 0.95) < 0.014
    assert math.isnan(spread([1.0]).sd)


def test_every_method_has_the_same_budget() -> None:
    for name in ("table1", "half", "rerun"):
        budgets: dict[str, set[tuple[int, int]]] = {}
        for run in parts(RATES)[name]:
            budgets.setdefault(run.scaling, set()).add((run.seed, run.steps))
        assert set(budgets) == set(paper_mini_report.TABLE1)
        assert len(set(map(frozenset, budgets.values()))) == 1
    everything = [run for runs in parts(RATES).values() for run in runs]
    assert len({run.name for run in (*everything, *SWEEP)}) == len({*everything, *SWEEP})


def test_the_chain_and_the_start_from_scratch_see_as_much() -> None:
    chained = [run for run in parts(RATES)["table2"] if run.start is not None]
    scratch = [run for run in parts(RATES)["table2"] if run.start is None]
    assert [run.steps + run.start.steps for run in chained if run.start] == [run.steps for run in scratch]
    # what it starts from is trained before: it is a run of table 1, the part that comes first
    assert {run.start for run in chained} <= set(parts(RATES)["table1"])


def test_a_run_is_the_demo_with_its_own_values() -> None:
    recipe = Run("ntk:8", 3, 30, 1e-3).recipe()
    assert (recipe.scaling, recipe.seed, recipe.max_train_steps, recipe.warmup_steps) == ("ntk:8", 3, 30, 3)
    assert recipe.learning_rate == 1e-3 and recipe.output_dir.endswith("ntk-8-30x0.001-s3")
    after = Run("yarn:16", 3, 10, 1e-3, Run("yarn:8", 3, 20, 1e-3))
    assert f"--model={ROOT}/yarn-8-20x0.001-s3/model" in after.flags()


def test_a_command_line_is_the_recipe() -> None:
    run = Run("yarn:8,ramp=rotations", 2, 20, 3e-4)
    assert finetune.resolve(finetune.parse_args(run.flags()), ranks=1) == run.recipe()


def test_each_method_gets_its_best_learning_rate() -> None:
    best = dict(zip(paper_mini_report.TABLE1, (3e-3, 3e-4, 1e-3, 1e-3, 3e-4), strict=True))
    loss = {run.name: abs(math.log(run.learning_rate / best[run.scaling])) for run in SWEEP}
    assert swept(loss) == best
    del loss[SWEEP[0].name]
    with pytest.raises(ConfigError, match="lacks 1 of 20"):
        swept(loss)
    assert paper_mini_report.late_loss([9.0, 9.0, 9.0, 1.0, 2.0, 3.0]) == 2.0


def test_a_table_counts_only_rows_of_its_runs() -> None:
    runs = [Run("yarn:8", seed, 20, 1e-3) for seed in (1, 2)]
    other = Run("yarn:8", 1, 10, 1e-3)
    rows = [_row(runs[0].name, 10.0), _row(runs[1].name, 12.0), _row(other.name, 99.0)]
    rows += [_row(runs[0].name, 99.0, text=paper_mini_report.BIBLE), _row(runs[0].name, 99.0, carried=False)]
    rows.append(_row(runs[0].name, 99.0) | {"model": "elsewhere/model"})
    assert "| `yarn:8` | 2 | 11.0 ± 1.4 |" in Results(rows).table(paper_mini_report.NOVEL, runs)
    assert Results(rows).perplexity(paper_mini_report.NOVEL)[runs[0].name] == {256: 10.0}
    with pytest.raises(ConfigError, match="no rows of the 2 runs"):
        Results([]).table(paper_mini_report.NOVEL, runs)


def test_the_control_has_a_table_of_its_own() -> None:
    runs = [Run("yarn:8", seed, 20, 1e-3) for seed in (1, 2)]
    cut = {"protocol": {"name": "last-tokens"}}
    base = {"model": paper_mini_report.BASE, "label": "unscaled", "carried": False}
    rows = [_row("x", 16.0, 512, **base), _row("x", 10.0, 512, **base, **cut)]
    rows += [_row(run.name, 8.0 + run.seed, 512) for run in runs]  # 9 and 10: −10 % and 0 % of the base's 10
    rows += [_row(run.name, 12.0, 512, **cut) for run in runs]
    table = Results(rows).against_controls(paper_mini_report.NOVEL, runs)
    assert table.splitlines()[0].endswith("| cut short | 256–512 |")
    assert table.splitlines()[2:] == [
        "| `yarn:8` | the base | −5.0 ± 7.1 % |",
        "| `yarn:8` | itself | −20.8 ± 5.9 % |",
    ]
    assert Results(rows).perplexity(paper_mini_report.NOVEL)["default"] == {512: 16.0}
    with pytest.raises(ConfigError, match="no controls"):
        Results(rows).against_controls(paper_mini_report.BIBLE, runs)


def test_seeds_of_a_chain_are_not_those_of_a_start_from_scratch() -> None:
    runs = parts(RATES)["table2"]
    rows = [_row(run.name, 10.0 + run.seed if run.start else 50.0) for run in runs]
    lines = Results(rows).table(paper_mini_report.NOVEL, runs).splitlines()
    assert lines[2:] == ["| `yarn:16` after `yarn:8` | 3 | 12.0 ± 1.0 |", "| `yarn:16` | 3 | 50.0 ± 0.0 |"]


def test_another_seed_is_inside_or_outside() -> None:
    first, again = parts(RATES)["table1"], parts(RATES)["rerun"]
    rows = [_row(run.name, 10.0 + run.seed, 2048) for run in first]  # 12 ± 1: 7.0 to 17.0
    rows += [_row(run.name, 16.9 if run.scaling == paper_mini_report.YARN else 17.1, 2048) for run in again]
    lines = Results(rows).predicted(paper_mini_report.NOVEL, first, again, 2048).splitlines()[2:]
    assert [line.split()[-2] for line in lines] == ["outside"] * 4 + ["inside"]


def test_scalings_of_the_base_are_compared_by_window() -> None:
    def rows(label: str, more: float) -> list[dict[str, Any]]:
        found = []
        for n, nats in ((256, [900.0, 700.0]), (2048, [5000.0, 5500.0]), (4096, [1.0, 1.0])):
            row = _row("x", 10.0, n, label=label, bucket_targets=2000, bucket_nats=[[x + more * x for x in nats]])
            found.append(row | {"model": paper_mini_report.BASE})
        return found

    results = Results(rows("yarn x8", 0.0) + rows("yarn x8 (truncate=False)", 0.01))
    line = results.differences(paper_mini_report.NOVEL, 2048, "yarn:8", ["yarn:8,truncate=false"]).splitlines()[2]
    # Windows gain 59 and 62 nats over 2000 targets up to 2048, so 0.0295 and 0.031 nats a target. Student's interval of
    # two is 12.706 times half their difference: 0.03025 ± 0.0095.
    assert line == "| `yarn:8,truncate=false` | +3.1 % [+2.1, +4.1] |"


def test_prompts_of_all_seeds_count_together() -> None:
    run = parts(RATES)["table1"][4]
    rows = [_row(run.name, 0.0, n, metric="passkey", right=right, n=10) for n, right in ((256, 9), (512, 4))]
    rows += [
        _row("x", 0.0, n, metric="passkey", right=10, n=10, label="yarn x8") | {"model": paper_mini_report.BASE}
        for n in (256, 512)
    ]
    rows += [
        _row("x", 0.0, n, metric="passkey", right=4, n=10, label="yarn x8") | {"model": paper_mini_report.BASE}
        for n in (256, 512)
    ]
    lines = Results(rows).passkeys([run], ["yarn:8"]).splitlines()[2:]
    assert lines[0].startswith("| yarn:8, fine-tuned | 9/10 (") and lines[0].endswith("| 256 | 90 % |")
    assert lines[1].startswith("| `yarn:8` | 14/20 (") and lines[1].endswith("| none |  |")


def test_the_tables_of_the_documentation_are_those_of_the_rows() -> None:
    rows, training = (read_rows(f"data/paper_mini_{name}.jsonl") for name in ("rows", "training"))
    text = Path("docs/reproduction.md").read_text()
    tables = paper_mini_report.tables(Results(rows), training)
    assert len(tables) == 14
    assert [title for title, table in tables.items() if table not in text] == []
