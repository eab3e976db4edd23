"""Estimates of times whose values are known."""

from __future__ import annotations

import pytest
import torch

from scaled_rope.checkpoint import DEFAULT_MODEL
from scaled_rope.evaluation.lm_eval_tasks import TaskFacts
from scaled_rope.evaluation.time_estimate import (
    Pace,
    duration,
    estimate,
    measure_pace,
    plan_table,
    time_passes,
    timed_lengths,
)
from scaled_rope.patching.loading import load_model

PACE = Pace((100, 200), (3.0, 8.0), (0.1, 0.2))  # 0.02 n + 1e-4 n², and 1e-3 n


def facts(name: str, **fields: object) -> TaskFacts:
    known: dict[str, object] = {"source": None, "takes_lengths": True, "answer_tokens": 10, "unsafe": False}
    return TaskFacts(name, **{**known, **fields})  # type: ignore[arg-type]


def test_times_grow_with_attention() -> None:
    assert PACE.of_pass(100) == pytest.approx(3.0) and PACE.of_pass(1000) == pytest.approx(20 + 100)
    assert PACE.of_answer(1000, 10) == pytest.approx(10 * 1.005)
    # Faster than linear, or than quadratic, is noise of the clock.
    assert Pace((100, 200), (3.0, 4.0), (0.1, 0.1)).of_pass(400) == pytest.approx(8.0)
    assert Pace((100, 200), (1.0, 8.0), (0.1, 0.1)).of_pass(400) == pytest.approx(32.0)
    assert Pace((100, 200), (1.0, 2.0), (0.3, 0.1)).of_answer(400, 10) >= 1.0


def test_a_plan() -> None:
    tasks = [
        facts("niah_single_1"),
        facts("table", source="a/b", takes_lengths=False, answer_tokens=0),
        facts("graph", source="c/d", takes_lengths=False, answer_tokens=5000, unsafe=True),
    ]
    ruler, table, graph = estimate(tasks, PACE, [100, 200], 5, 1000)
    each = PACE.of_pass(90) + PACE.of_answer(90, 10) + PACE.of_pass(190) + PACE.of_answer(190, 10)
    assert (ruler.prompts, ruler.seconds) == (10, pytest.approx(5 * each))
    assert (table.prompts, table.seconds) == (5, pytest.approx(5 * 4 * 120.0))
    assert graph.seconds is None and graph.obstacle == "its answers of 5000 tokens don't fit the model's 1000"
    text = plan_table([table, ruler, graph]).splitlines()
    assert text[2].split()[:3] == ["niah_single_1", "runs", "offline"]
    assert "needs a/b" in text[3] and "--confirm-run-unsafe-code" in text[4]
    assert text[-1].startswith(f"in all: about {duration(5 * each + 2400)}; those that run offline about ")
    (whole,) = estimate(tasks[:1], PACE, [100], None, None)
    assert whole.prompts == 500
    (unknown,) = estimate(tasks[1:2], PACE, [], None, 1000)
    assert unknown.prompts is None and "for each prompt" in plan_table([unknown])


def test_durations() -> None:
    assert [duration(s) for s in (0.25, 12, 80, 100, 6000, 90000, 200000)] == [
        "0.25 s", "12 s", "80 s", "1.7 min", "1.7 h", "25 h", "2.3 days"
    ]  # fmt: skip


def test_lengths_that_are_timed() -> None:
    assert timed_lengths([256, 512, 1024]) == (256, 512)
    assert timed_lengths([256]) == (64, 256)
    assert timed_lengths([4096, 65536, 131072]) == (4096, 8192)
    assert timed_lengths([32768, 65536]) == (2048, 8192)


def test_a_model_is_timed() -> None:
    model = load_model(str(DEFAULT_MODEL), device="cpu")
    with torch.device("meta"):  # texts are drawn on the CPU, whatever the default device is
        assert all(seconds > 0 for seconds in time_passes(model, [16, 32]))
    pace = measure_pace(model, (16, 256))
    assert 0 < pace.passes[0] < pace.passes[1]
    assert pace.steps[1] < pace.passes[1]  # with a cache a step is no whole pass
