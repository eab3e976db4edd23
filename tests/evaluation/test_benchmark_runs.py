"""Benchmark rows: what is missing is measured, in saved questions that need no lm-eval."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from scaled_rope import RopeScaling
from scaled_rope.checkpoint import DEFAULT_MODEL, encode, load_tokenizer
from scaled_rope.errors import ConfigError
from scaled_rope.evaluation import benchmark_runs
from scaled_rope.evaluation.benchmark_runs import BenchmarkRun, benchmark_table
from scaled_rope.evaluation.failures import Failure, report_failures
from scaled_rope.evaluation.jobs import ModelJob
from scaled_rope.evaluation.saved_questions import SavedUnit
from scaled_rope.results import read_rows

JOB = ModelJob(str(DEFAULT_MODEL), "yarn:4", RopeScaling("yarn", 4.0, 256), False, 16, "float32", "f")
RECORD = {"command": "python eval/harness.py", "versions": {"torch": "2"}}


class NoModels:
    """Gives out nothing, and counts."""

    devices = (torch.device("cpu"),)
    asked = 0

    def __call__(self, job: ModelJob) -> None:
        self.asked += 1


def unit(name: str) -> SavedUnit:
    probe = "The sea was"
    protocol = {"name": "lm-eval", "task": name, "num_fewshot": 2, "metric": "acc", "max_length": None}
    header = {
        "cell": {"metric": "benchmark", "data": {"name": name}, "protocol": protocol, "length": None},
        "metric": "acc",
        "version": "0.4",
        "probe": {"text": probe, "input_ids": encode(load_tokenizer(str(DEFAULT_MODEL)), probe)},
    }
    question = {"task": name, "contexts": [[1, 2]], "choices": [[0, [3], 1.0], [0, [4], 1.0]], "target": 1}
    return SavedUnit(name, header, (question,) * 4)


@pytest.fixture
def scores(monkeypatch: pytest.MonkeyPatch) -> None:
    """The second choice is the likelier one, in place of a model."""

    def score(model: Any, scaling: Any, requests: Any, *rest: Any) -> list[tuple[float, bool]]:
        return [(float(request.continuation[0]), False) for request in requests]

    monkeypatch.setattr("scaled_rope.evaluation.saved_questions.score", score)


def test_only_what_is_missing_is_measured(scores: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    load, output = NoModels(), str(tmp_path / "rows.jsonl")
    run = BenchmarkRun(load, output)  # type: ignore[arg-type]
    wanted = run.measure([JOB], lambda job: [unit("one")], RECORD, [])
    assert [name for name, _ in wanted] == ["tiny-llama-256, yarn x4"] and load.asked == 1
    (row,) = read_rows(output)
    assert (row["value"], row["n"], row["protocol"]["max_length"]) == (100.0, 4, 1024)
    assert row["provenance"] == {**RECORD, "versions": {"torch": "2", "lm-eval": "0.4"}}
    both = run.measure([JOB], lambda job: [unit("one"), unit("two")], RECORD, [])
    assert len(both) == 2 and load.asked == 2 and len(read_rows(output)) == 2
    assert capsys.readouterr().err == "tiny-llama-256, yarn x4: one\ntiny-llama-256, yarn x4: two\n"
    lines = benchmark_table(output, both).splitlines()
    assert [" ".join(line.split()) for line in lines[2:]] == [
        f"tiny-llama-256, yarn x4 {name}, 2-shot, acc 100.00 ± 0.00 4" for name in ("one", "two")
    ]


def test_a_model_that_fails_leaves_the_others_their_rows(scores: None, tmp_path: Path) -> None:
    other = replace(JOB, scaling=RopeScaling("yarn", 2.0, 256))

    class OneBroken(NoModels):
        def __call__(self, job: ModelJob) -> None:
            if job is other:
                raise ConfigError("model 'broken' cannot be read: no weights")

    output, failures = str(tmp_path / "rows.jsonl"), []
    run = BenchmarkRun(OneBroken(), output)  # type: ignore[arg-type]
    wanted = run.measure([other, JOB], lambda job: [unit("one"), unit("two")], RECORD, failures)
    assert [str(failure) for failure in failures] == [
        "tiny-llama-256, yarn x2: model 'broken' cannot be read: no weights"
    ]
    # Of a model that cannot be loaded, the first task was asked for and no other.
    assert len(wanted) == 3 and len(read_rows(output)) == 2
    assert len(benchmark_table(output, wanted).splitlines()) == 4  # heading, rule and two rows
    assert report_failures(failures, [other, JOB]) == 1
    with pytest.raises(ConfigError, match="no weights"):
        report_failures(failures, [other])


def test_a_task_that_fails_leaves_the_others_their_rows(
    scores: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise torch.OutOfMemoryError("17 GiB more")

    failures: list[Failure] = []
    broken = unit("one")
    object.__setattr__(broken, "measure", fail)
    output = str(tmp_path / "rows.jsonl")
    run = BenchmarkRun(NoModels(), output)  # type: ignore[arg-type]
    run.measure([JOB], lambda job: [broken, unit("two")], RECORD, failures)
    assert [str(failure) for failure in failures] == ["tiny-llama-256, yarn x4 on one: OutOfMemoryError: 17 GiB more"]
    assert [row["protocol"]["task"] for row in read_rows(output)] == ["two"]


def test_silence(capsys: pytest.CaptureFixture[str]) -> None:
    import sys

    with benchmark_runs.silence():
        print("a bar", file=sys.stderr)
    assert capsys.readouterr().err == ""
