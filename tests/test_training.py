"""Schedules, batches and whole training runs: one rank equals two, resuming equals never stopping."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml
from accelerate.state import AcceleratorState
from safetensors.torch import load_file

import finetune
from scaled_rope import RopeScaling, patch_model
from scaled_rope.command_line import run_cli
from scaled_rope.errors import ConfigError
from scaled_rope.patching.loss import IGNORE
from scaled_rope.recipes import Recipe, read_recipe
from scaled_rope.texts.packed import ColumnDataset, PackedWriter, open_packed, pack
from scaled_rope.training import loop
from scaled_rope.training.batches import check_lengths, collate, step_batches
from scaled_rope.training.engine import accumulation
from scaled_rope.training.loop import learning_rate
from scaled_rope.training.model import SummedLoss, build_model, set_sliding_window
from scaled_rope.training.run_state import run_lock
from tests.runs import ENVIRONMENT, LENGTH, log, weights


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


# ------------------------------------------------------------------------------------------------ one run at a time


def test_a_folder_takes_one_run_until_its_process_has_ended(workspace, tmp_path, monkeypatch, capsys):
    begun, begin = os.pipe()
    holder = os.fork()
    if holder == 0:
        with run_lock(tmp_path / "out"):
            os.write(begin, b"!")
            time.sleep(60)
        os._exit(1)
    try:
        os.read(begun, 1)
        for extra in ([], ["--save-only"]):
            arguments = [str(workspace / "recipe.yaml"), "--output-dir", str(tmp_path / "out"), *extra]
            assert run_cli(lambda arguments=arguments: finetune.main(arguments)) == 2
            said = f"output_dir {tmp_path / 'out'} is being written by another run, process {holder} on "
            assert said in capsys.readouterr().err
        monkeypatch.setenv("RANK", "1")
        with run_lock(tmp_path / "out"):  # the first rank answers for all
            pass
        monkeypatch.delenv("RANK")
    finally:
        os.kill(holder, signal.SIGKILL)
        os.waitpid(holder, 0)
    with run_lock(tmp_path / "out"):
        assert (tmp_path / "out" / ".lock").read_text().startswith(f"{os.getpid()} on ")


def test_a_folder_that_cannot_be_written_to_is_named(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=f"output_dir {tmp_path / 'file'} cannot be written to: File exists"):
        with run_lock(tmp_path / "file"):
            pass


# --------------------------------------------------------------------------------------------------------- batches


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
    """By a packed set's shape, and by the longest row of a table, without reading either."""
    rows = open_packed(workspace / "set")
    with pytest.raises(ConfigError, match=f"a row of {LENGTH} tokens, more than sequence_length 32"):
        check_lengths(rows, recipe(sequence_length=32))
    check_lengths(rows, recipe(sequence_length=LENGTH))
    check_lengths(rows, recipe(sequence_length=32, truncate=32))
    datasets = pytest.importorskip("datasets")
    table = datasets.Dataset.from_dict({"input_ids": [[1] * 5, [2] * 33, []]})
    table = datasets.concatenate_datasets([table, datasets.Dataset.from_dict({"input_ids": [[3] * 32]})])
    with pytest.raises(ConfigError, match="a row of 33 tokens, more than sequence_length 32"):
        check_lengths(ColumnDataset(table, "table"), recipe(sequence_length=32))
    check_lengths(ColumnDataset(table, "table"), recipe(sequence_length=33))
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
        (["{work}/recipe.yaml", "--dataset", "data/missing"], "dataset data/missing does not exist"),
        (["{work}/recipe.yaml", "--dataset", "tests/missing"], "dataset tests/missing does not exist"),
        (["{work}/recipe.yaml", "--dataset", "./missing"], "dataset ./missing does not exist"),
        (["{work}/recipe.yaml", "--heldout", "out/missing"], "dataset out/missing does not exist"),
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
    assert not (tmp_path / "out").exists() or "--sliding-window-attention-schedule" in arguments


def test_unknown_recipe_fields_and_types_are_refused(tmp_path):
    (tmp_path / "a.yaml").write_text("learning_rat: 1\n")
    with pytest.raises(ConfigError, match="did you mean 'learning_rate'"):
        read_recipe(str(tmp_path / "a.yaml"))
    (tmp_path / "b.yaml").write_text("max_train_steps: many\n")
    with pytest.raises(ConfigError, match="max_train_steps = 'many' is not allowed; a whole number"):
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
    states = tmp_path / "states"
    original = loop.save_state

    def keep(accelerator, recipe, step):
        shutil.copytree(original(accelerator, recipe, step), states / f"step-{step:06d}")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "save_state", keep)
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
    monkeypatch.setattr("scaled_rope.training.run_state.shutil.disk_usage", lambda path: usage(10**9, 10**9, 1000))
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


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_lora_with_embeddings_and_norms_saves_them_in_model_and_adapter(workspace, tmp_path, tied):
    pytest.importorskip("peft")
    from scaled_rope.patching.loading import load_model

    base = workspace / ("tied" if tied else "model")
    arguments = [str(workspace / "recipe.yaml"), "--output-dir", str(tmp_path / "out"), "--model", str(base), "--lora",
                 "--lora-embeddings-and-norms", "--max-train-steps", "2"]  # fmt: skip
    assert finetune.main(arguments) == 0
    before, after = load_file(base / "model.safetensors"), weights(tmp_path / "out")
    assert before.keys() == after.keys()
    assert all(not torch.equal(before[name], after[name]) for name in before)
    # What the evaluators make of base and adapter is the merged model; merging rounds once, in float32.
    merged = load_model(str(tmp_path / "out" / "model"))
    adapted = load_model(str(base), scaling="yarn:3", adapter=str(tmp_path / "out" / "model" / "adapter"))
    ids = torch.arange(2, 42)[None]
    torch.testing.assert_close(adapted(input_ids=ids).logits, merged(input_ids=ids).logits, rtol=1e-4, atol=1e-5)


def test_master_weights_are_float32_under_bf16(workspace, tmp_path):
    """Updates of 1e-6 are far below the spacing of bfloat16 numbers near 0.1 (5e-4): in bfloat16 nothing would move."""
    arguments = [str(workspace / "recipe.yaml"), "--output-dir", str(tmp_path), "--max-train-steps", "3",
                 "--learning-rate", "1e-6", "--lr-schedule", "constant", "--precision", "bf16"]  # fmt: skip
    args = finetune.parse_args(arguments)
    resolved = replace(finetune.resolve(args, 1), save_dtype="float32")
    AcceleratorState._reset_state(True)  # accelerate allows one precision per process
    loop.Trainer(resolved).run()
    AcceleratorState._reset_state(True)
    before, after = load_file(workspace / "model" / "model.safetensors"), weights(tmp_path)
    moved = [(after[name] - before[name]).abs() for name in before]
    assert all(float(change.max()) < 1e-5 for change in moved)
    # every weight that had a gradient moved: Adam moves by the learning rate whatever the gradient's size
    assert sum(int((change > 1e-7).sum()) for change in moved) > 0.5 * sum(change.numel() for change in moved)


def test_checkpointing_and_offloading_change_nothing(workspace, monkeypatch):
    """The offloading path is taken on the CPU too here, where its copies go from memory to memory."""
    monkeypatch.setattr("scaled_rope.training.model._is_on_accelerator", lambda tensor: True)
    batch = collate([open_packed(workspace / "set").row(0)], LENGTH)
    copies, original = [], torch.empty

    def counted(*arguments, **options):
        if options.get("pin_memory") is not None:
            copies.append(arguments)
        return original(*arguments, **options)

    gradients, kept = {}, {}
    for checkpointing, offload in ((False, False), (True, False), (True, True)):
        model, _ = build_model(replace(resolved_recipe(workspace), gradient_checkpointing=checkpointing))
        if checkpointing:
            model.activation_checkpointing_enable({"use_reentrant": False})
        module = SummedLoss(model, offload)
        monkeypatch.setattr(loop.torch, "empty", counted)
        module(**batch).backward()
        monkeypatch.undo()
        monkeypatch.setattr("scaled_rope.training.model._is_on_accelerator", lambda tensor: True)
        gradients[checkpointing, offload] = [parameter.grad for parameter in model.parameters()]
        kept[checkpointing, offload] = len(copies)
    assert kept[False, False] == kept[True, False] == 0
    # the inputs of both layers, at least
    hidden = [shape for (shape, *_) in copies if tuple(shape) == (1, LENGTH, 32)]
    assert len(hidden) >= 2
    for other in ((True, False), (True, True)):
        for one, two in zip(gradients[False, False], gradients[other], strict=True):
            torch.testing.assert_close(one, two, rtol=0, atol=0)


def resolved_recipe(workspace) -> Recipe:
    return read_recipe(str(workspace / "recipe.yaml"))


def test_heldout_perplexity_is_that_of_the_model_at_each_length(workspace, straight):
    from transformers import AutoModelForCausalLM

    rows = log(straight)
    assert [row["step"] for row in rows if "heldout" in row] == [3, 6, 8]
    model = AutoModelForCausalLM.from_pretrained(straight / "model", dtype=torch.float32)
    data = open_packed(workspace / "set")
    for length in (16, 48):
        losses = []
        for index in range(3):
            ids = torch.from_numpy(data.row(index)[0])[None, :length]
            scores = model(input_ids=ids).logits.double().log_softmax(-1)[0, :-1]
            losses += (-scores.gather(1, ids[0, 1:, None])[:, 0]).tolist()
        # float32 logits: as for the first loss; four decimals are logged
        assert rows[-1]["heldout"][str(length)] == pytest.approx(float(np.exp(np.mean(losses))), rel=1e-4)


def test_a_saved_model_says_how_it_was_made(workspace, straight):
    folder = straight / "model"
    saved = Recipe(**{key: tuple(value) if isinstance(value, list) else value
                      for key, value in yaml.safe_load((folder / "recipe.yaml").read_text()).items()})  # fmt: skip
    assert saved == replace(resolved_recipe(workspace), output_dir=str(straight))
    facts = yaml.safe_load((folder / "provenance.yaml").read_text())
    assert facts["environment"]["torch"] == facts["versions"]["torch"] == torch.__version__ and "commit" in facts
    _, header, body = (folder / "README.md").read_text().split("---\n", 2)
    assert yaml.safe_load(header)["base_model"] == str(workspace / "model")
    last = log(straight)[-1]
    assert f"{last['loss']:.4f} nats per token" in body and "yarn x3" in body and str(facts["commit"]) in body
    assert f"{last['tokens_seen']} tokens in all" in body


def test_rows_go_to_every_tracker_that_is_asked_for(workspace, tmp_path, monkeypatch):
    import types

    sent = {"wandb": [], "tensorboard": []}
    run = SimpleNamespace(log=lambda row, step: sent["wandb"].append((step, row)), finish=lambda: None)
    asked = {}
    fake = SimpleNamespace(init=lambda **options: asked.update(options) or run)
    monkeypatch.setitem(sys.modules, "wandb", fake)

    class SummaryWriter:
        def __init__(self, folder):
            sent["folder"] = folder

        def add_scalar(self, name, value, step):
            sent["tensorboard"].append((step, name, value))

        def close(self):
            sent["closed"] = True

    module = types.ModuleType("torch.utils.tensorboard")
    module.SummaryWriter = SummaryWriter
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
    arguments = [str(workspace / "recipe.yaml"), "--output-dir", str(tmp_path), "--max-train-steps", "2",
                 "--wandb", "project", "--tensorboard", str(tmp_path / "board")]  # fmt: skip
    assert finetune.main(arguments) == 0
    rows = log(tmp_path)
    assert asked["project"] == "project" and asked["config"]["learning_rate"] == 5e-3
    assert [row for _, row in sent["wandb"]] == rows and [step for step, _ in sent["wandb"]] == [1, 2]
    assert (2, "heldout/48", rows[1]["heldout"]["48"]) in sent["tensorboard"] and sent["closed"]
    assert {(step, value) for step, name, value in sent["tensorboard"] if name == "loss"} == {
        (row["step"], row["loss"]) for row in rows
    }


def test_separate_documents_train_as_if_each_were_alone(workspace, tmp_path):
    """The first loss of a run on packed documents, against the documents one by one."""
    from transformers import AutoModelForCausalLM

    rng = np.random.default_rng(0)
    documents = [rng.integers(2, 60, size).tolist() for size in (5, 17, 1, 30, 9, 44, 21, 13, 40, 8)]
    with PackedWriter(tmp_path / "set", LENGTH, 64) as writer:
        pack(documents, writer, 0, 1)
        writer.close({"bookend": "document", "bos": 0, "eos": 1})
    data = open_packed(tmp_path / "set")
    arguments = [str(workspace / "recipe.yaml"), "--dataset", str(tmp_path / "set"), "--max-train-steps", "2"]
    losses = {}
    for name in ("joined", "separate"):
        assert finetune.main([*arguments, "--documents", name, "--output-dir", str(tmp_path / name)]) == 0
        losses[name] = log(tmp_path / name)[0]["loss"]
    model = AutoModelForCausalLM.from_pretrained(workspace / "model", dtype=torch.float32)
    patch_model(model, "yarn:3")
    total = count = 0.0
    for rows in step_batches(data, resolved_recipe(workspace), 0, 0, 1):
        for tokens, _ in rows:
            starts = [index for index in range(LENGTH) if tokens[index] == 0 or index == 0]
            for begin, end in zip(starts, [*starts[1:], LENGTH], strict=True):
                ids = torch.from_numpy(tokens[begin:end])[None]
                scores = model(input_ids=ids).logits.detach().double().log_softmax(-1)[0, :-1]
                total -= float(scores.gather(1, ids[0, 1:, None]).sum())
                count += end - begin - 1
    # float32 forward against float64 softmax of the same logits, as for the first loss above
    assert losses["separate"] == pytest.approx(total / count, rel=1e-5)
    assert abs(losses["joined"] - losses["separate"]) > 1e-3


def test_separate_documents_need_their_borders(workspace, tmp_path, capsys):
    arguments = [str(workspace / "recipe.yaml"), "--documents", "separate", "--output-dir", str(tmp_path)]
    assert run_cli(lambda: finetune.main(arguments)) == 2
    assert "does not say where they are; make it with tokenization.py --bookend document" in capsys.readouterr().err


def test_window_schedule_of_a_run_changes_step_by_step(workspace, tmp_path, monkeypatch):
    seen, original = [], set_sliding_window

    def note(model, window):
        original(model, window)
        seen.append(model.config.sliding_window)

    monkeypatch.setattr(loop, "set_sliding_window", note)
    init = {
        "model_type": "mistral", "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
        "num_attention_heads": 2, "num_key_value_heads": 1, "vocab_size": 64, "max_position_embeddings": 16,
        "sliding_window": 8,
    }  # fmt: skip
    resolved = replace(
        resolved_recipe(workspace), model=None, init=init, tokenizer=str(workspace / "model"), max_train_steps=3,
        warmup_steps=0, sliding_window_attention_schedule=(16, 64), output_dir=str(tmp_path),
    )  # fmt: skip
    loop.Trainer(resolved).run()
    assert seen == [16, 64, 16]
    assert json.loads((tmp_path / "model" / "config.json").read_text())["sliding_window"] == 16


def test_mistral_window_schedule_sets_the_window_of_each_step(tiny_model):
    from scaled_rope.training.model import set_sliding_window

    model = tiny_model("mistral", sliding_window=8)
    tokens = torch.arange(1, 41)[None]
    narrow = model(input_ids=tokens).logits
    set_sliding_window(model, 64)
    wide = model(input_ids=tokens).logits
    reference = tiny_model("mistral", sliding_window=None)(input_ids=tokens).logits
    assert not torch.allclose(narrow, wide)
    torch.testing.assert_close(wide, reference)
