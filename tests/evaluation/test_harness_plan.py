"""Plans of benchmarks for one model."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from scaled_rope import RopeScaling
from scaled_rope.checkpoint import DEFAULT_MODEL, Checkpoint
from scaled_rope.errors import ConfigError
from scaled_rope.evaluation import default_lengths
from scaled_rope.evaluation.harness_plan import doubled_lengths, lengths_note, measured_already, plan_text
from scaled_rope.evaluation.jobs import ModelJob
from scaled_rope.evaluation.lm_eval_tasks import TaskFacts
from scaled_rope.patching.loading import load_model
from scaled_rope.results import Row
from scaled_rope.scaling.record import RopeSettings
from tests.helpers.published_configs import LLAMA3

JOB = ModelJob(str(DEFAULT_MODEL), "yarn:4", RopeScaling("yarn", 4.0, 256), False, 16, "float32", "f")
TASKS = [TaskFacts("ruler_vt", None, True, 4, False), TaskFacts("longbench2_table", "a/b", False, 0, False)]

BASE = RopeScaling("default", original_max_position_embeddings=256)


def load(job: ModelJob) -> Any:
    return load_model(str(DEFAULT_MODEL), device="cpu", scaling=job.scaling)


def row(task: str, length: int | None, **fields: Any) -> Row:
    protocol = {"task": task, "limit": 5}
    return {"metric": "benchmark", "length": length, "protocol": protocol, **JOB.fields(), **fields}


def test_lengths_of_a_model(capsys: pytest.CaptureFixture[str]) -> None:
    assert doubled_lengths(JOB) == [256, 512, 1024]
    assert doubled_lengths(replace(JOB, scaling=RopeScaling.from_spec("dynamic-yarn", BASE))) == [256]
    with pytest.raises(ConfigError, match="the trained length of .* is unknown; say --lengths"):
        doubled_lengths(replace(JOB, scaling=RopeScaling("default")))
    assert lengths_note(JOB, [256, 1024]) is None
    assert lengths_note(JOB, [1024, 2048]) == "tiny-llama-256, yarn x4 is for 1024 tokens; 2048 is beyond that"
    flags = ["--model", str(DEFAULT_MODEL), "--scaling", "default", "--scaling", "yarn:2"]
    assert default_lengths.main(flags) == 0 and capsys.readouterr().out == "256,512\n"


def test_lengths_of_a_model_whose_factor_does_not_say_them() -> None:
    settings = RopeSettings(LLAMA3)
    job = replace(JOB, scaling=settings.scaling, checkpoint=Checkpoint("llama", None, settings))
    assert doubled_lengths(job) == [8192, 16384, 32768, 65536, 131072]
    assert lengths_note(job, [131072]) is None
    assert str(lengths_note(job, [262144])).endswith("llama3 x8 is for 131072 tokens; 262144 is beyond that")


def test_what_is_measured_already() -> None:
    rows = [
        row("ruler_vt", 256),
        row("ruler_vt", 512, model_fingerprint="others"),
        row("ruler_vt", 1024, error="1024 tokens are too short"),
        row("a", None, error="a/b cannot be reached: ConnectionError"),
        {**row("b", None), "protocol": {"task": "b", "limit": 9}},
    ]
    assert measured_already(rows, JOB, 5) == {("ruler_vt", 256), ("ruler_vt", 1024)}


def test_a_plan_names_what_is_left() -> None:
    whole = plan_text(JOB, TASKS, [32, 64], 5, None, load)  # type: ignore[arg-type]
    lines = whole.splitlines()
    assert lines[0] == "tiny-llama-256, yarn x4, at 32, 64 tokens:"
    assert lines[3].split()[:4] == ["ruler_vt", "runs", "offline", "10"]
    assert lines[4].split()[:4] == ["longbench2_table", "needs", "a/b", "5"]
    assert "timed: a pass over 32 tokens" in lines[5]
    rest = plan_text(JOB, TASKS, [32, 64], 5, None, load, [row("ruler_vt", 32)])  # type: ignore[arg-type]
    assert rest.splitlines()[3].split()[:4] == ["ruler_vt", "runs", "offline", "5"]
    done = [row("ruler_vt", 32), row("ruler_vt", 64), row("longbench2_table", None)]
    assert plan_text(JOB, TASKS, [32, 64], 5, None, load, done) == (  # type: ignore[arg-type]
        "tiny-llama-256, yarn x4, at 32, 64 tokens: all 2 tasks have rows already"
    )
    with pytest.raises(ConfigError, match="lengths: must be given to plan ruler_vt"):
        plan_text(JOB, TASKS, None, 5, None, load)  # type: ignore[arg-type]
