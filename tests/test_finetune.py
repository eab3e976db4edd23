"""finetune.py: its flags and the recipes that they make."""

from __future__ import annotations

import argparse
import dataclasses
import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import finetune
from scaled_rope.command_line import run_cli
from scaled_rope.flags.shared import ATTENTIONS
from scaled_rope.recipes.recipe import Recipe
from tests.helpers import ROOT


@pytest.mark.parametrize(
    ("environment", "flags", "message"),
    [
        ({"ACCELERATE_USE_FSDP": "true"}, [], "FSDP is not available on this platform"),
        ({}, ["--sequence-parallel", "2"], "sequence_parallel 2 needs DeepSpeed"),
        ({"ACCELERATE_USE_DEEPSPEED": "true"}, ["--sequence-parallel", "2"], "a divisor of the 1 processes"),
        ({}, ["--context-parallel", "2"], "context_parallel 2 needs FSDP2"),
        ({"ACCELERATE_USE_DEEPSPEED": "true"}, ["--context-parallel", "2"], "context_parallel 2 needs FSDP2"),
        ({"ACCELERATE_USE_FSDP": "true"}, ["--context-parallel", "2"], "FSDP is not available on this platform"),
        ({}, ["--offload-activations", "--no-gradient-checkpointing"], "it needs gradient_checkpointing"),
        ({}, ["--lora-embeddings-and-norms"], "it is for lora: true"),
    ],
)
def test_engines_that_cannot_do_it_are_refused(workspace, tmp_path, monkeypatch, capsys, environment, flags, message):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    arguments = [str(workspace / "recipe.yaml"), "--output-dir", str(tmp_path / "out"), *flags]
    assert run_cli(lambda: finetune.main(arguments)) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["dem"], "unknown recipe 'dem'; did you mean 'demo'?"),
        (["nothing.yaml"], "does not exist"),
        ([], "--output-dir is missing"),
        (["demo", "--learning-rate", "-1"], "learning_rate = -1.0"),
        (["demo", "--log-loss", "{work}"], "cannot be used: Is a directory"),
        (["demo", "--warmup-steps", "121"], "warmup_steps = 121"),
        (["demo", "--scaling", "yarn:8", "--scaling-factor", "4"], "exclude each other"),
        (["{work}/recipe.yaml", "--scaling", "yarnn:8"], "did you mean 'yarn'"),
        (["{work}/recipe.yaml", "--scaling", "yarn:0.5"], "factor"),
        (["{work}/recipe.yaml", "--sequence-length", "32"], "more than sequence_length 32"),
        (["{work}/recipe.yaml", "--dataset", "{work}/model"], "no tokenized set"),
        (["{work}/recipe.yaml", "--dataset", "data/missing"], "dataset data/missing does not exist"),
        (["{work}/recipe.yaml", "--dataset", "tests/missing"], "dataset tests/missing does not exist"),
        (["{work}/recipe.yaml", "--dataset", "./missing"], "dataset ./missing does not exist"),
        (["{work}/recipe.yaml", "--heldout", "out/missing"], "dataset out/missing does not exist"),
        (["{work}/recipe.yaml", "--model", "{work}/set"], "config.json"),
        (["{work}/recipe.yaml", "--batch-size", "3"], "multiple of batch_size 3"),
        (["{work}/recipe.yaml", "--architecture", "mistral"], "'llama'"),
        (["{work}/recipe.yaml", "--resume-from-checkpoint", "{work}/set"], "no saved state"),
        (["{work}/recipe.yaml", "--deepspeed"], "needs a launcher"),
        (
            ["{work}/recipe.yaml", "--sliding-window-attention-schedule", "16"],
            "no layer of this 'llama' model has a sliding window",
        ),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(workspace, tmp_path, capsys, arguments, message):
    arguments = [argument.replace("{work}", str(workspace)) for argument in arguments]
    if arguments and arguments[0].startswith(str(workspace)):
        arguments += ["--output-dir", str(tmp_path / "out")]
    assert run_cli(lambda: finetune.main(arguments)) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: ") and message in error
    assert not (tmp_path / "out").exists() or "--sliding-window-attention-schedule" in arguments


def test_released_flags_map_to_the_recipe():
    args = finetune.parse_args(
        ["--output-dir", "o", "--batch-size", "2", "--gradient-accumulate-every", "4", "--scaling-type", "linear",
         "--scaling-factor", "2", "--sliding-window-attention-schedule", "64,128", "--num-proc", "8"]
    )  # fmt: skip
    resolved = finetune.resolve(args, ranks=8)
    assert resolved.global_batch_size == 64 and resolved.scaling == "linear:2"
    assert resolved.sliding_window_attention_schedule == (64, 128)
    assert resolved.batch_size == 2
    assert (resolved.max_train_steps, resolved.warmup_steps, resolved.learning_rate, resolved.seed) == (
        400,
        20,
        2e-5,
        42,
    )
    assert finetune.resolve(finetune.parse_args(["--output-dir", "o"]), ranks=2).global_batch_size == 16


def resolved(*arguments: str) -> Recipe:
    return finetune.resolve(finetune.parse_args(list(arguments)), ranks=2)


def test_every_flag_of_a_recipe_field_reaches_the_recipe():
    base = resolved("demo")
    given = vars(finetune.parse_args(["demo"]))
    named = [field.name for field in dataclasses.fields(Recipe) if field.name in given]
    assert len(named) > 40 and {"attention", "context_parallel", "heldout_lengths"} <= set(named)
    for name in named:
        lists = name in ("sliding_window_attention_schedule", "heldout_lengths")
        args = argparse.Namespace(**{**given, name: "16,32" if lists else 3})
        assert finetune.overrides(args, base, ranks=1) == {name: [16, 32] if lists else 3}
    assert finetune.overrides(argparse.Namespace(**given), base, ranks=1) == {}


def test_the_help_names_every_attention_that_is_taken(capsys):
    with pytest.raises(SystemExit):
        finetune.parse_args(["--help"])
    assert ", ".join(ATTENTIONS) in " ".join(capsys.readouterr().out.split())


def test_another_factor_keeps_the_other_fields_of_the_scaling_and_another_method_drops_them():
    released = "beta_fast=128,beta_slow=2,mscale=0.7"
    assert resolved("mistral-7b-64k", "--scaling-factor", "16").scaling == f"yarn:16,{released}"
    assert resolved("mistral-7b-64k", "--scaling-type", "yarn").scaling == f"yarn:8,{released}"
    assert resolved("mistral-7b-64k", "--scaling-type", "linear").scaling == "linear:8"
    assert resolved("--output-dir", "o", "--scaling-type", "linear").scaling == "linear:16"


def test_accumulation_counts_the_recipes_own_batch_size():
    assert resolved("tiny-base", "--gradient-accumulate-every", "4").global_batch_size == 4 * 16 * 2


def test_ranks_that_share_a_sequence_count_once_in_accumulation():
    """Passes per step are what the flag says, however many ranks work on one row."""
    args = finetune.parse_args(["qwen3-4b-128k", "--gradient-accumulate-every", "2"])
    shared = finetune.resolve(args, ranks=8)
    assert shared.sequence_parallel == 8 and shared.global_batch_size == 2 * shared.batch_size
    apart = finetune.parse_args(["qwen3-4b-128k", "--gradient-accumulate-every", "2", "--sequence-parallel", "2"])
    assert finetune.resolve(apart, ranks=8).global_batch_size == 2 * shared.batch_size * 4
    released = finetune.parse_args(["--output-dir", "o", "--context-parallel", "4"])
    assert finetune.resolve(released, ranks=8).global_batch_size == 8 * 2


def test_a_job_of_slurm_ends_with_the_code_of_a_recipe_that_is_refused(tmp_path):
    (tmp_path / "scontrol").write_text("#!/bin/sh\necho here\n")
    (tmp_path / "srun").write_text(f'#!/bin/sh\necho "$@" >> {tmp_path / "started"}\nexit 7\n')
    for tool in ("scontrol", "srun"):
        (tmp_path / tool).chmod(0o755)
    environment = dict(os.environ, SLURM_SUBMIT_DIR=str(ROOT), SLURM_JOB_NODELIST="here", PYTHON=sys.executable)
    environment["PATH"] = f"{tmp_path}:{environment['PATH']}"
    job = ["bash", str(ROOT / "configs" / "slurm" / "train.sbatch")]
    wrong = subprocess.run([*job, "llama-2-7b-128"], env=environment, capture_output=True, text=True, timeout=60)
    assert wrong.returncode == 2 and "unknown recipe 'llama-2-7b-128'" in wrong.stderr
    assert not (tmp_path / "started").exists()
    done = subprocess.run([*job, "llama-2-7b-64k"], env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 7 and (tmp_path / "started").read_text().rstrip().endswith("finetune llama-2-7b-64k")


@pytest.mark.parametrize("flags", [["--save-only"], []])
def test_a_length_below_the_original_is_refused(workspace, tmp_path, capsys, flags):
    arguments = [
        str(workspace / "recipe.yaml"),
        "--output-dir",
        str(tmp_path),
        "--max-position-embeddings",
        "15",
        *flags,
    ]
    assert run_cli(lambda: finetune.main(arguments)) == 2
    assert "max_position_embeddings = 15 is not allowed; at least the original length, 16" in capsys.readouterr().err
    assert not (tmp_path / "model").exists()


def test_save_only_on_a_full_disk_names_the_folder_and_leaves_nothing(workspace, tmp_path, monkeypatch, capsys):
    def full(folder: Path, **_: object) -> None:
        (folder / "README.md").write_text("the first part")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("scaled_rope.training.tracking.write_records", full)
    arguments = [str(workspace / "recipe.yaml"), "--output-dir", str(tmp_path / "new"), "--save-only"]
    assert run_cli(lambda: finetune.main(arguments)) == 2
    assert f"error: {tmp_path / 'new' / 'model'} cannot be written: no space left" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_save_only_writes_the_scaling_and_nothing_else(workspace, tmp_path, capsys):
    arguments = [str(workspace / "recipe.yaml"), "--output-dir", str(tmp_path), "--save-only"]
    assert finetune.main(arguments) == 0
    before, after = (
        load_file(workspace / "model" / "model.safetensors"),
        load_file(tmp_path / "model" / "model.safetensors"),
    )
    assert all(torch.equal(before[name], after[name]) for name in before)
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    assert config["rope_parameters"]["factor"] == 3.0 and config["max_position_embeddings"] == 48
    # Programs that know only the older keys find the same.
    assert config["rope_scaling"].items() >= {"type": "yarn", "factor": 3.0}.items()
    assert config["rope_theta"] == config["rope_parameters"]["rope_theta"]
    # Neither training nor saving again may take this model for a trained one, or replace it.
    assert run_cli(lambda: finetune.main(arguments)) == 2
    assert run_cli(lambda: finetune.main(arguments[:-1])) == 2
    assert "no recipe.yaml that says of which run" in capsys.readouterr().err
