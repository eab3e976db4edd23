"""The study of SmolLM2 at 16k: its plan, and what becomes of a run's log."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

import finetune
from benchmarks import parts as work
from benchmarks import smollm2_16k
from eval import harness, longppl, passkey, perplexity
from scaled_rope.command_line import run_cli
from scaled_rope.errors import ConfigError
from scaled_rope.evaluation.jobs import fingerprint_of
from scaled_rope.results import read_rows

SCRIPTS = {
    "eval/perplexity.py": perplexity, "eval/passkey.py": passkey, "eval/harness.py": harness,
    "eval/longppl.py": longppl,
}  # fmt: skip


def test_all_runs_have_one_budget() -> None:
    recipes = [run.recipe("work") for run in smollm2_16k.RUNS]
    assert {recipe.max_train_steps * recipe.tokens_per_step for recipe in recipes} == {8 * 16384}
    free = {"name", "scaling", "seed", "positions", "sequence_length", "global_batch_size", "output_dir"}
    (shared,) = {json.dumps({k: v for k, v in one.to_dict().items() if k not in free}) for one in recipes}
    assert shared and len({recipe.output_dir for recipe in recipes}) == len(recipes)
    assert {recipe.max_position_embeddings for recipe in recipes} == {smollm2_16k.LONG}


def test_parts_are_commands_that_the_scripts_take() -> None:
    parts = smollm2_16k.parts("work", "rows.jsonl", "training.jsonl")
    names = list(parts)
    for run in smollm2_16k.RUNS:
        script, name, *flags = parts[f"train-{run.name}"].command
        args = finetune.parse_args([name, *flags])
        overridden = finetune.overrides(args, run.recipe("work"), 1)
        assert script == "finetune.py" and replace(run.recipe("work"), **overridden) == run.recipe("work")
        measured = [one for one in names if one.endswith(f"-{run.name}") and not one.startswith("train")]
        assert measured and names.index(f"train-{run.name}") < min(map(names.index, measured))
        for one in measured:
            assert f"work/{run.name}/model" in parts[one].command
    for name, part in parts.items():
        if not name.startswith("train"):
            script, *flags = part.command
            given = SCRIPTS[script].build_parser().parse_args(flags)
            assert given.scaling == (["default", "linear:2", "yarn:2"] if name.endswith("-base") else given.scaling)
            assert given.output == "rows.jsonl"
    # Every model that was trained is read by its same-weights control.
    for run in smollm2_16k.RUNS:
        assert "--control" in parts[f"perplexity-novel-{run.name}"].command


def test_no_text_is_trained_on_and_measured() -> None:
    prepare = smollm2_16k.RUNS[0].recipe("work").prepare
    (trained,) = [command for command in prepare if command.endswith("smollm2-16k/train")]
    assert trained.count("--dataset") == 1 and "data/cache/books/train" in trained
    assert not any("books/train" in flag for flags in smollm2_16k.TEXTS.values() for flag in flags)


def test_a_finished_run_is_kept_as_one_row(tmp_path: Path) -> None:
    recipe = replace(smollm2_16k.RUNS[1].recipe(str(tmp_path)), max_train_steps=2)
    output = Path(recipe.output_dir)

    def progress() -> str:
        smollm2_16k.record(recipe, str(tmp_path / "training.jsonl"))
        return smollm2_16k._steps(recipe)

    assert progress() == "0 of 2 steps"
    (output / "model").mkdir(parents=True)
    log = [
        {"step": n, "loss": 3.0 - n, "tokens_seen": 10 * n, "seconds": 1.5, "heldout": {"16": 2.0 * n}} for n in (1, 2)
    ]
    (output / "train_log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in log))
    (output / "provenance.json").write_text('{"commit": "c"}')
    (output / "recipe.yaml").write_text("model_hash: m\ndataset_hash: d\n")
    assert progress() == "2 of 2 steps"  # without a model it has not ended
    assert not (tmp_path / "training.jsonl").exists()
    (output / "model" / "config.json").write_text("{}")
    assert progress() == progress() == "2 of 2 steps, finished"
    (row,) = read_rows(tmp_path / "training.jsonl")
    assert row["run"] == "pi" and row["losses"] == [2.0, 1.0] and row["tokens"] == 20 and row["seconds"] == 3.0
    assert row["heldout"] == {"1": {"16": 2.0}, "2": {"16": 4.0}} and row["provenance"] == {"commit": "c"}
    assert row["scaling"] == "linear:2" and row["max_train_steps"] == 2 and row["dataset_hash"] == "d"
    assert row["weights"] == fingerprint_of(output / "model")


@pytest.mark.parametrize("code", [-signal.SIGTERM, 128 + signal.SIGTERM])
def test_time_that_is_over_stops_a_part_and_says_which(
    code: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A script may die of the signal or end by it, as finetune.py does after it has saved a state."""
    begun = subprocess.Popen
    program = "import signal, sys, time; {}; print('up', flush=True); time.sleep(60)".format(
        "pass" if code < 0 else f"signal.signal(signal.SIGTERM, lambda *_: sys.exit({code}))"
    )
    monkeypatch.setattr(subprocess, "Popen", lambda *_, **__: begun([sys.executable, "-c", program]))
    began = time.monotonic()
    parts = [work.Part("one", ("x.py",), lambda: "half"), work.Part("two", ("y.py",), lambda: "none")]
    work.run_all(parts, 0.05)
    assert time.monotonic() - began < 30
    said = capsys.readouterr().out
    assert "minutes are over in one (half); the same command continues" in said and "two" not in said


def test_bad_input_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, message in (
        (["--part", "train-yern"], "did you mean 'train-yarn'"),
        (["--minutes", "0"], "minutes 0.0 is not allowed"),
    ):
        assert run_cli(lambda arguments=arguments: smollm2_16k.main(arguments)) == 2
        assert message in capsys.readouterr().err
    with pytest.raises(ConfigError, match="ended with exit code 2"):
        work.run(["finetune.py", "no-such-recipe"], time.monotonic() + 100)
