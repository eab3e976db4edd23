"""Schedules, batches and whole training runs: one rank equals two, resuming equals never stopping."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file

import finetune
from scaled_rope import RopeScaling, patch_model
from scaled_rope.data import PackedWriter, open_packed
from scaled_rope.errors import ConfigError, run_cli
from scaled_rope.recipes import Recipe, read_recipe
from scaled_rope.training import IGNORE, accumulation, build_model, collate, learning_rate, step_batches

ROOT = Path(__file__).parent.parent
LENGTH = 48


def recipe(**fields) -> Recipe:
    defaults = {"name": "test", "model": "m", "dataset": "d", "output_dir": "o", "sequence_length": LENGTH,
                "global_batch_size": 4, "max_train_steps": 100, "warmup_steps": 20, "learning_rate": 1e-3}  # fmt: skip
    return Recipe(**(defaults | fields))


# ------------------------------------------------------------------------------------------------------- schedules


def test_warm_up_rises_linearly_to_the_peak_and_wastes_no_step():
    rates = [learning_rate(recipe(lr_schedule="constant"), step) for step in range(100)]
    assert rates[:20] == pytest.approx([1e-3 * (step + 1) / 20 for step in range(20)])
    assert rates[20:] == [1e-3] * 80


def test_linear_and_cosine_decay():
    linear = [learning_rate(recipe(), step) for step in range(100)]
    assert linear[20] == 1e-3 and linear[60] == pytest.approx(0.5e-3) and linear[99] == pytest.approx(1e-3 / 80)
    cosine = [learning_rate(recipe(lr_schedule="cosine"), step) for step in range(100)]
    assert cosine[60] == pytest.approx(0.55e-3) and 1e-4 < cosine[99] < 1.02e-4
    assert all(a >= b for rates in (linear, cosine) for a, b in zip(rates[20:], rates[21:], strict=False))
    assert learning_rate(recipe(warmup_steps=0), 0) == 1e-3


# --------------------------------------------------------------------------------------------------------- batches


@pytest.fixture(scope="session")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny untied Llama with tokenizer, and a packed set with loss weights, whose first rows weigh much more."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("training")
    tokenizer = Tokenizer(models.WordLevel({f"t{i}": i for i in range(64)}, unk_token="t2"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="t0", eos_token="t1").save_pretrained(
        folder / "model"
    )
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=16,
        initializer_range=0.2,
    )
    LlamaForCausalLM(config).save_pretrained(folder / "model")
    rng = np.random.default_rng(0)
    with PackedWriter(folder / "set", LENGTH, 64, weighted=True) as writer:
        for index in range(20):
            row = np.arange(LENGTH) * (1 + index % 3) % 60 + rng.integers(0, 3, LENGTH)
            writer.append(row, np.where(rng.random(LENGTH) < 0.5, 0, 1 + index % 7))
        writer.close({})
    fields = {
        "model": str(folder / "model"), "dataset": str(folder / "set"), "scaling": "yarn:3", "sequence_length": LENGTH,
        "global_batch_size": 4, "max_train_steps": 8, "warmup_steps": 2, "learning_rate": 5e-3, "grad_norm": 1.0,
        "precision": "fp32", "checkpointing_steps": 3, "output_dir": str(folder / "out"),
    }  # fmt: skip
    (folder / "recipe.yaml").write_text(yaml.safe_dump(fields))
    return folder


def test_targets_are_the_next_tokens_and_padding_never_counts():
    rows = [(np.array([5, 6, 7, 8]), np.array([1, 1, 0, 3])), (np.array([9, 4]), np.array([1, 2]))]
    batch = collate(rows, 4)
    assert batch["input_ids"].tolist() == [[5, 6, 7, 8], [9, 4, 0, 0]]
    assert batch["targets"].tolist() == [[6, IGNORE, 8, IGNORE], [4, IGNORE, IGNORE, IGNORE]]
    assert batch["weights"].tolist() == [[1, 0, 3, 0], [2, 0, 0, 0]]


@pytest.mark.parametrize(("ranks", "batch_size"), [(1, 4), (2, 1), (2, 2), (4, 1)])
def test_ranks_together_see_the_rows_of_one_rank(workspace, ranks, batch_size):
    rows = open_packed(workspace / "set")
    alone = step_batches(rows, recipe(), step=3, rank=0, ranks=1)
    split = [step_batches(rows, recipe(batch_size=batch_size), 3, rank, ranks) for rank in range(ranks)]
    assert all(len(batches) == accumulation(recipe(batch_size=batch_size), ranks) for batches in split)

    def seen(batches):
        return sorted(tuple(tokens.tolist()) for batch in batches for tokens, _ in batch)

    assert seen(alone) == seen([batch for batches in split for batch in batches])


def test_rows_longer_than_the_recipe_says_are_refused_unless_cut(workspace):
    rows = open_packed(workspace / "set")
    with pytest.raises(ConfigError, match=f"has {LENGTH} tokens, more than sequence_length 32"):
        step_batches(rows, recipe(sequence_length=32), 0, 0, 1)
    tokens, weights = step_batches(rows, recipe(sequence_length=32, truncate=32), 0, 0, 1)[0][0]
    assert len(tokens) == len(weights) == 32


def test_tokens_outside_the_vocabulary_are_refused(workspace):
    with pytest.raises(ConfigError, match="vocabulary ends at 39; tokenize with the model's own tokenizer"):
        step_batches(open_packed(workspace / "set"), recipe(), 0, 0, 1, vocabulary=40)


def test_a_batch_that_ranks_cannot_share_is_refused():
    with pytest.raises(ConfigError, match="multiple of batch_size 1 x 3 processes"):
        accumulation(recipe(), 3)


# --------------------------------------------------------------------------------------------------------- recipes


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["dem"], "unknown recipe 'dem'; did you mean 'demo'?"),
        (["nothing.yaml"], "does not exist"),
        ([], "--output-dir is missing"),
        (["demo", "--learning-rate", "-1"], "learning_rate = -1.0"),
        (["demo", "--warmup-steps", "61"], "warmup_steps = 61"),
        (["demo", "--scaling", "yarn:8", "--scaling-factor", "4"], "exclude each other"),
        (["{work}/recipe.yaml", "--scaling", "yarnn:8"], "did you mean 'yarn'"),
        (["{work}/recipe.yaml", "--scaling", "yarn:0.5"], "factor"),
        (["{work}/recipe.yaml", "--sequence-length", "32"], "more than sequence_length 32"),
        (["{work}/recipe.yaml", "--dataset", "{work}/model"], "no tokenized set"),
        (["{work}/recipe.yaml", "--model", "{work}/set"], "config.json"),
        (["{work}/recipe.yaml", "--batch-size", "3"], "multiple of batch_size 3"),
        (["{work}/recipe.yaml", "--architecture", "mistral"], "'llama'"),
        (["{work}/recipe.yaml", "--resume-from-checkpoint", "{work}/set"], "no saved state"),
        (["{work}/recipe.yaml", "--deepspeed"], "needs a launcher"),
        (["{work}/recipe.yaml", "--sliding-window-attention-schedule", "16"], "Mistral only"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(workspace, tmp_path, capsys, arguments, message):
    arguments = [argument.replace("{work}", str(workspace)) for argument in arguments]
    if arguments and arguments[0].startswith(str(workspace)):
        arguments += ["--output-dir", str(tmp_path / "out")]
    assert run_cli(lambda: finetune.main(arguments)) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: ") and message in error
    assert not (tmp_path / "out" / "model").exists()


def test_unknown_recipe_fields_and_types_are_refused(tmp_path):
    (tmp_path / "a.yaml").write_text("learning_rat: 1\n")
    with pytest.raises(ConfigError, match="did you mean 'learning_rate'"):
        read_recipe(str(tmp_path / "a.yaml"))
    (tmp_path / "b.yaml").write_text("max_train_steps: many\n")
    with pytest.raises(ConfigError, match="max_train_steps = 'many' is not allowed; a value of type int"):
        read_recipe(str(tmp_path / "b.yaml"))


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


def test_another_factor_keeps_the_other_fields_of_the_scaling_and_another_method_drops_them():
    released = "beta_fast=128,beta_slow=2,mscale=0.7"
    assert resolved("mistral-7b-64k", "--scaling-factor", "16").scaling == f"yarn:16,{released}"
    assert resolved("mistral-7b-64k", "--scaling-type", "yarn").scaling == f"yarn:8,{released}"
    assert resolved("mistral-7b-64k", "--scaling-type", "linear").scaling == "linear:8"
    assert resolved("--output-dir", "o", "--scaling-type", "linear").scaling == "linear:16"


def test_accumulation_counts_the_recipes_own_batch_size():
    assert resolved("tiny-base", "--gradient-accumulate-every", "4").global_batch_size == 4 * 8 * 2


# ------------------------------------------------------------------------------------------------------ whole runs

TORCHRUN = ("-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", "29517")
ZERO3 = ("-m", "accelerate.commands.launch", "--config_file", "configs/accelerate/zero3.yaml", "--num_processes", "2",
         "--main_process_port", "29518")  # fmt: skip
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}


def command(workspace: Path, output: Path, launcher: tuple[str, ...] = (), extra: tuple[str, ...] = ()) -> list[str]:
    script = ["finetune.py", str(workspace / "recipe.yaml"), "--output-dir", str(output), *extra]
    return [sys.executable, *launcher, *script]


def run(
    workspace: Path,
    output: Path,
    launcher: tuple[str, ...] = (),
    extra: tuple[str, ...] = (),
    environment: dict[str, str] = ENVIRONMENT,
) -> None:
    done = subprocess.run(
        command(workspace, output, launcher, extra),
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-4000:]


def log(output: Path) -> list[dict]:
    return [json.loads(line) for line in (output / "train_log.jsonl").read_text().splitlines()]


@pytest.fixture(scope="session")
def straight(workspace) -> Path:
    """The run that the others are compared with: one process, no interruption."""
    run(workspace, workspace / "straight", extra=("--log-loss", str(workspace / "losses.csv")))
    return workspace / "straight"


def weights(output: Path) -> dict[str, torch.Tensor]:
    return load_file(output / "model" / "model.safetensors")


def test_the_log_has_the_right_rate_batch_and_tokens_at_every_step(workspace, straight):
    rows = log(straight)
    resolved = read_recipe(str(workspace / "recipe.yaml"))
    assert [row["step"] for row in rows] == list(range(1, 9))
    assert [row["learning_rate"] for row in rows] == [learning_rate(resolved, step) for step in range(8)]
    assert [row["tokens"] for row in rows] == [4 * LENGTH] * 8
    assert [row["tokens_seen"] for row in rows] == [4 * LENGTH * n for n in range(1, 9)]
    assert rows[-1]["loss"] < rows[0]["loss"]
    assert [float(x) for x in (workspace / "losses.csv").read_text().split(",")] == [row["loss"] for row in rows]
    assert not (straight / "checkpoints").exists() and (straight / "loss.png").stat().st_size > 1000


def test_the_first_loss_is_the_weighted_mean_over_the_global_batch(workspace, straight):
    """A slow restatement with the model's own full logits."""
    from transformers import AutoModelForCausalLM

    resolved = read_recipe(str(workspace / "recipe.yaml"))
    model = AutoModelForCausalLM.from_pretrained(resolved.model, dtype=torch.float32)
    patch_model(model, resolved.scaling)
    total = weight = 0.0
    for rows in step_batches(open_packed(resolved.dataset), resolved, 0, 0, 1):
        batch = collate(rows, LENGTH)
        logits = model(input_ids=batch["input_ids"]).logits.detach().double().log_softmax(-1)
        for b, t in np.ndindex(*batch["targets"].shape):
            if batch["targets"][b, t] != IGNORE:
                total -= float(batch["weights"][b, t] * logits[b, t, batch["targets"][b, t]])
                weight += float(batch["weights"][b, t])
    # float32 forward against float64 softmax of the same logits: relative error near 2^-24 times a few hundred terms
    assert log(straight)[0]["loss"] == pytest.approx(total / weight, rel=1e-5)


@pytest.mark.parametrize("launcher", [TORCHRUN, ZERO3], ids=["ddp", "zero3"])
def test_two_ranks_train_like_one(workspace, straight, launcher):
    output = workspace / f"two-{launcher[1]}"
    if launcher is ZERO3:
        pytest.importorskip("deepspeed")
    run(workspace, output, launcher)
    one, two = log(straight), log(output)
    for field in ("step", "learning_rate", "tokens", "tokens_seen"):
        assert [row[field] for row in one] == [row[field] for row in two]
    # Sums over ranks are taken in another order: float32 noise of one step, amplified by 8 steps of Adam.
    np.testing.assert_allclose([row["loss"] for row in two], [row["loss"] for row in one], rtol=1e-5)
    np.testing.assert_allclose([row["grad_norm"] for row in two], [row["grad_norm"] for row in one], rtol=1e-3)
    reference, other = weights(straight), weights(output)
    assert reference.keys() == other.keys()
    # Adam moves a weight by up to the learning rate however small its gradient, so noise shows up to a share of it.
    assert max(float((reference[k] - other[k]).abs().max()) for k in reference) < 0.1 * 5e-3


def test_rows_of_different_length_train_alike_on_shards(workspace, tmp_path):
    """Under ZeRO-3 each pass is collective: ranks whose rows differ in length must still make equally many."""
    datasets, _ = pytest.importorskip("datasets"), pytest.importorskip("deepspeed")
    rng = np.random.default_rng(1)
    rows = [rng.integers(2, 60, length).tolist() for length in (48, 9, 30, 17, 41, 12)]
    datasets.Dataset.from_dict({"input_ids": rows}).save_to_disk(tmp_path / "ragged")
    extra = ("--dataset", str(tmp_path / "ragged"), "--max-train-steps", "2", "--global-batch-size", "2")
    run(workspace, tmp_path / "one", (), extra)
    # A launcher's environment cannot reach into loss.py, so small pieces are set where every rank starts.
    (tmp_path / "sitecustomize.py").write_text("import scaled_rope.loss\nscaled_rope.loss._LOGITS_PER_CHUNK = 64 * 8\n")
    environment = ENVIRONMENT | {"PYTHONPATH": str(tmp_path)}
    run(workspace, tmp_path / "two", ZERO3, extra, environment)
    one, two = log(tmp_path / "one"), log(tmp_path / "two")
    np.testing.assert_allclose([row["loss"] for row in two], [row["loss"] for row in one], rtol=1e-5)
    assert [row["tokens"] for row in one] == [row["tokens"] for row in two]


def test_killed_and_resumed_equals_never_stopped(workspace):
    extra = ("--max-train-steps", "60", "--checkpointing-steps", "10")
    run(workspace, workspace / "long", extra=extra)
    output = workspace / "killed"
    process = subprocess.Popen(command(workspace, output, (), extra), cwd=ROOT, env=ENVIRONMENT,
                               stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)  # fmt: skip
    path, deadline = output / "train_log.jsonl", time.monotonic() + 120
    while not (path.exists() and path.read_text().count("\n") >= 15):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (output / "model").exists(), "it was to be killed before the end"
    states = sorted(path.name for path in (output / "checkpoints").glob("step-*"))
    assert states and states[-1] < "step-000060"
    run(workspace, output, extra=extra)

    def same(rows):
        return [{name: value for name, value in row.items() if name != "seconds"} for row in rows]

    assert same(log(output)) == same(log(workspace / "long"))
    reference, other = weights(workspace / "long"), weights(output)
    assert all(torch.equal(reference[name], other[name]) for name in reference)


def test_the_checkpoint_loads_without_this_package_and_gives_the_same_logits(straight):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    program = (
        "import sys, torch, transformers\n"
        "sys.modules['scaled_rope'] = None\n"
        "model = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32)\n"
        "ids = torch.arange(2, 42)[None]\n"
        "torch.save(model(input_ids=ids).logits, sys.argv[2])\n"
    )
    saved = straight / "logits.pt"
    subprocess.run([sys.executable, "-c", program, str(straight / "model"), str(saved)], check=True, timeout=120,
                   capture_output=True, env=ENVIRONMENT)  # fmt: skip
    model = AutoModelForCausalLM.from_pretrained(straight / "model", dtype=torch.float32)
    assert model.config.rope_parameters["rope_type"] == "yarn" and model.config.rope_parameters["factor"] == 3.0
    assert model.config.max_position_embeddings == 48
    scaling = RopeScaling(method="yarn", factor=3.0, original_max_position_embeddings=16)
    patch_model(model, scaling)
    ours = model(input_ids=torch.arange(2, 42)[None]).logits
    # inv_freq may differ in the last bit (float64 rounded once against float32 arithmetic): 1e-7 rad over 40 positions
    torch.testing.assert_close(torch.load(saved), ours, rtol=1e-4, atol=1e-4)
    assert len(AutoTokenizer.from_pretrained(straight / "model")) == 64


def test_a_refused_run_leaves_the_way_free_and_older_states_can_be_resumed(workspace, tmp_path, capsys):
    arguments = [str(workspace / "recipe.yaml"), "--output-dir", str(tmp_path / "out"), "--max-train-steps", "4"]
    arguments += ["--checkpointing-steps", "1"]
    assert run_cli(lambda: finetune.main([*arguments, "--sequence-length", "32"])) == 2
    from scaled_rope.training import Trainer

    states = tmp_path / "states"
    original = Trainer._save_state

    def keep(self, accelerator, step):
        original(self, accelerator, step)
        shutil.copytree(self.output / "checkpoints" / f"step-{step:06d}", states / f"step-{step:06d}")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "_save_state", keep)
        assert finetune.main(arguments) == 0
    reference = weights(tmp_path / "out")
    shutil.rmtree(tmp_path / "out" / "model")
    shutil.copytree(states, tmp_path / "out" / "checkpoints")
    resumed = ["--resume-from-checkpoint", str(tmp_path / "out" / "checkpoints" / "step-000002")]
    assert finetune.main([*arguments, *resumed]) == 0
    assert [row["step"] for row in log(tmp_path / "out")] == [1, 2, 3, 4]
    assert all(torch.equal(reference[name], tensor) for name, tensor in weights(tmp_path / "out").items())


def test_an_output_of_another_run_is_not_mixed_up(workspace, straight, capsys):
    arguments = [str(workspace / "recipe.yaml"), "--output-dir", str(straight)]
    assert run_cli(lambda: finetune.main([*arguments, "--learning-rate", "1"])) == 2
    assert "learning_rate = 0.005, now 1.0" in capsys.readouterr().err
    assert run_cli(lambda: finetune.main(arguments)) == 0
    assert "already trained" in capsys.readouterr().out


def test_a_disk_without_room_is_refused_before_training(workspace, tmp_path, capsys, monkeypatch):
    from collections import namedtuple

    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr("scaled_rope.training.shutil.disk_usage", lambda path: usage(10**9, 10**9, 1000))
    arguments = [str(workspace / "recipe.yaml"), "--output-dir", str(tmp_path)]
    assert run_cli(lambda: finetune.main(arguments)) == 2
    assert "0.0 GB free, the run needs up to" in capsys.readouterr().err
    assert not (tmp_path / "train_log.jsonl").exists()


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
    # Neither training nor saving again may take this model for a trained one, or replace it.
    assert run_cli(lambda: finetune.main(arguments)) == 2
    assert run_cli(lambda: finetune.main(arguments[:-1])) == 2
    assert "no training run wrote" in capsys.readouterr().err


def test_recipes_choose_layers():
    init = {
        "model_type": "qwen2", "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
        "num_attention_heads": 2, "num_key_value_heads": 1, "vocab_size": 61, "max_position_embeddings": 32,
        "use_sliding_window": True, "sliding_window": 16, "layer_types": ["sliding_attention", "full_attention"],
    }  # fmt: skip
    fields = {"model": None, "init": init, "tokenizer": "none", "scaling": "yarn:4"}
    _, report = build_model(recipe(**fields, layers="full_attention", drop_layers=(0,)))
    assert report is not None and not report.native and report.plan.drop_layers == (0,)
    assert {name: one.label for name, one in report.plan.layers.items()} == {
        "sliding_attention": "unscaled",
        "full_attention": "yarn x4",
    }
    model, report = build_model(recipe(**fields))
    assert report is not None and report.native and not report.plan.layers
    assert model.config.max_position_embeddings == 128
    with pytest.raises(ConfigError, match="drop_layers=2: must be a layer's index, 0 to 1"):
        build_model(recipe(**fields, drop_layers=(2,)))


def test_lora_trains_adapters_and_saves_merged_weights(workspace, tmp_path):
    pytest.importorskip("peft")
    arguments = [str(workspace / "recipe.yaml"), "--output-dir", str(tmp_path), "--lora", "--max-train-steps", "2"]
    assert finetune.main(arguments) == 0
    before, after = load_file(workspace / "model" / "model.safetensors"), weights(tmp_path)
    assert before.keys() == after.keys()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed and all("proj" in name for name in changed)
    assert (tmp_path / "model" / "adapter" / "adapter_model.safetensors").exists()


def test_mistral_window_schedule_sets_the_window_of_each_step(tiny_model):
    from scaled_rope.training import set_sliding_window

    model = tiny_model("mistral", sliding_window=8)
    tokens = torch.arange(1, 41)[None]
    narrow = model(input_ids=tokens).logits
    set_sliding_window(model, 64)
    wide = model(input_ids=tokens).logits
    reference = tiny_model("mistral", sliding_window=None)(input_ids=tokens).logits
    assert not torch.allclose(narrow, wide)
    torch.testing.assert_close(wide, reference)
