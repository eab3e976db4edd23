"""Several processes against one: the same losses, rates and weights; killed and resumed against never stopped."""

from __future__ import annotations

import json
import random
import signal
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import finetune
from scaled_rope import RopeScaling
from scaled_rope.command_line import run_cli
from scaled_rope.errors import ConfigError
from scaled_rope.recipes import read_recipe
from scaled_rope.training import batches, loop, model
from scaled_rope.training.engine import (
    Layout,
    allowed_sequence_parallel,
    check_can_build,
    check_sequence_parallel,
    configure_fsdp,
)
from scaled_rope.training.run_state import latest_state, load_state
from tests.rank_worker import small_pieces_of_logits, without_dropout
from tests.runs import ROOT, Ranks, free_port, launch, log, same, weights

ZERO3 = ("-m", "accelerate.commands.launch", "--config_file", "configs/accelerate/zero3.yaml", "--num_processes", "2")


def need_deepspeed() -> None:
    """Skip a test where DeepSpeed is missing, or what it compiles its parts with."""
    try:
        check_can_build("cpu_adam")
    except ConfigError as error:
        pytest.skip(str(error))


def assert_trained_alike(straight: Path, output: Path) -> None:
    one, two = log(straight), log(output)
    for field in ("step", "tokens", "tokens_seen"):
        assert [row[field] for row in one] == [row[field] for row in two]
    assert [row["learning_rate"] for row in two] == [row["learning_rate"] for row in one]
    # Sums over ranks are taken in another order: float32 noise of one step, amplified by 8 steps of Adam.
    np.testing.assert_allclose([row["loss"] for row in two], [row["loss"] for row in one], rtol=1e-5)
    np.testing.assert_allclose([row["grad_norm"] for row in two], [row["grad_norm"] for row in one], rtol=1e-3)
    for first, second in zip(one, two, strict=True):
        assert second.get("heldout", {}) == pytest.approx(first.get("heldout", {}), rel=1e-4)
    reference, other = weights(straight), weights(output)
    assert reference.keys() == other.keys()
    # Adam moves a weight by up to the learning rate however small its gradient, so noise shows up to a share of it.
    assert max(float((reference[k] - other[k]).abs().max()) for k in reference) < 0.1 * 5e-3


def test_two_ranks_that_a_launcher_started_train_like_one(workspace, straight, tmp_path):
    need_deepspeed()
    launch(workspace, tmp_path / "zero3", (*ZERO3, "--main_process_port", free_port()))
    assert_trained_alike(straight, tmp_path / "zero3")


@pytest.mark.parametrize("engine", ["ddp", "zero2", "zero3", "zero3_offload", "fsdp2"])
def test_two_ranks_train_like_one(workspace, straight, tmp_path, engine):
    if engine.startswith("zero"):
        need_deepspeed()
    Ranks(workspace, tmp_path / "two", 2, engine).succeed()
    assert_trained_alike(straight, tmp_path / "two")


@pytest.mark.parametrize("engine", ["zero3", "fsdp2"])
def test_tied_embeddings_stay_one_weight_on_shards(workspace, tied, tmp_path, engine):
    if engine == "zero3":
        need_deepspeed()
    Ranks(workspace, tmp_path / "two", 2, engine, ("--model", str(workspace / "tied"))).succeed()
    assert_trained_alike(tied, tmp_path / "two")
    assert "lm_head.weight" not in weights(tmp_path / "two")


def test_losses_under_bf16_are_not_rounded_to_it_on_shards(workspace, straight, tmp_path):
    """Products in bfloat16 change the mean over tokens by 8e-5; losses, weights of targets and sums of gradients in
    it, which is accelerate's own policy, by 9e-4."""
    extra = ("--precision", "bf16", "--max-train-steps", "2")
    Ranks(workspace, tmp_path / "bf16", 2, "fsdp2", extra).succeed()
    exact, rounded = log(straight)[0], log(tmp_path / "bf16")[0]
    assert rounded["loss"] != exact["loss"]
    assert rounded["loss"] == pytest.approx(exact["loss"], rel=3e-4)
    assert rounded["grad_norm"] == pytest.approx(exact["grad_norm"], rel=2e-3)
    assert all(weight.dtype == torch.bfloat16 for weight in weights(tmp_path / "bf16").values())


@pytest.mark.parametrize("engine, flags", [("ddp", ()), ("zero3", ("--sequence-parallel", "2")), ("fsdp2", ())])
def test_adapters_of_two_ranks_are_merged_like_those_of_one(workspace, tmp_path, engine, flags):
    """Also where their model is in shards. Embeddings, tied to the output, and norms are trained as well."""
    pytest.importorskip("peft")
    if engine == "zero3":
        need_deepspeed()
    extra = ("--lora", "--lora-embeddings-and-norms", "--max-train-steps", "3", "--model", str(workspace / "tied"))
    Ranks(workspace, tmp_path / "one", 1, extra=extra, prepare=(without_dropout,)).succeed()
    Ranks(workspace, tmp_path / "two", 2, engine, (*extra, *flags), (without_dropout,)).succeed()
    assert_trained_alike(tmp_path / "one", tmp_path / "two")
    one, two = (load_file(tmp_path / name / "model/adapter/adapter_model.safetensors") for name in ("one", "two"))
    assert one.keys() == two.keys()
    assert max(float((one[name] - two[name]).abs().max()) for name in one) < 0.1 * 5e-3  # as in assert_trained_alike


@pytest.mark.parametrize(("ranks", "size"), [(2, 2), (4, 2), (4, 4)])
def test_ranks_that_share_sequences_train_like_one(workspace, straight, tmp_path, ranks, size):
    """4 heads and 2 key/value heads: over 4 ranks each key/value head is copied."""
    need_deepspeed()
    Ranks(workspace, tmp_path / "sp", ranks, "zero3", ("--sequence-parallel", str(size))).succeed()
    assert_trained_alike(straight, tmp_path / "sp")


def test_rows_of_different_length_train_alike_on_shards(workspace, tmp_path):
    """Under ZeRO-3 each pass is collective: ranks whose rows differ in length must still make equally many."""
    datasets = pytest.importorskip("datasets")
    need_deepspeed()
    rng = np.random.default_rng(1)
    rows = [rng.integers(2, 60, length).tolist() for length in (48, 9, 30, 17, 41, 12)]
    datasets.Dataset.from_dict({"input_ids": rows}).save_to_disk(tmp_path / "ragged")
    extra = ("--dataset", str(tmp_path / "ragged"), "--max-train-steps", "2", "--global-batch-size", "2")
    Ranks(workspace, tmp_path / "one", 1, extra=extra).succeed()
    Ranks(workspace, tmp_path / "two", 2, "zero3", extra, (small_pieces_of_logits,)).succeed()
    shared = (*extra, "--sequence-parallel", "2")
    Ranks(workspace, tmp_path / "shared", 2, "zero3", shared, (small_pieces_of_logits,)).succeed()
    for name in ("two", "shared"):
        one, two = log(tmp_path / "one"), log(tmp_path / name)
        np.testing.assert_allclose([row["loss"] for row in two], [row["loss"] for row in one], rtol=1e-5)
        assert [row["tokens"] for row in one] == [row["tokens"] for row in two]


# --------------------------------------------------------------------------------------------- stopped and resumed


def test_killed_at_random_and_resumed_equals_never_stopped(workspace):
    """A pre-emption and a kill at random moments, with dropout; the loss log has neither gap nor duplicate."""
    extra = ("--max-train-steps", "120", "--checkpointing-steps", "7", "--model", str(workspace / "dropout"))
    Ranks(workspace, workspace / "long", 1, extra=extra).succeed()
    output, when = workspace / "killed", random.Random()
    first, second = when.randrange(1, 50), when.randrange(55, 100)
    print(f"terminated after {first} steps, killed after {second}")
    begun = Ranks(workspace, output, 1, extra=extra, afresh=True)
    ((code, text),) = begun.when(first).signal(signal.SIGTERM).finish()
    assert code == 0 and "SIGTERM after step" in text and "the same command continues" in text
    stopped = log(output)[-1]["step"]
    assert (output / "checkpoints" / f"step-{stopped:06d}" / "state.json").exists()
    Ranks(workspace, output, 1, extra=extra).when(second).signal(signal.SIGKILL).finish()
    assert not (output / "model").exists(), "it was to be killed before the end"
    assert len(list((output / "checkpoints").glob("step-*"))) <= 2
    Ranks(workspace, output, 1, extra=extra).succeed()
    assert [row["step"] for row in log(output)] == list(range(1, 121))
    assert same(log(output)) == same(log(workspace / "long"))
    reference, other = weights(workspace / "long"), weights(output)
    assert all(torch.equal(reference[name], other[name]) for name in reference)


@pytest.mark.parametrize(("engine", "name"), [("zero3", "zero3"), ("fsdp2", "fsdp")])
def test_shards_that_were_stopped_go_on_bit_for_bit(workspace, tmp_path, engine, name):
    if engine == "zero3":
        need_deepspeed()
    extra = ("--max-train-steps", "20", "--model", str(workspace / "dropout"))
    Ranks(workspace, tmp_path / "long", 2, engine, extra).succeed()
    for code, text in Ranks(workspace, tmp_path / "stopped", 2, engine, extra).when(3).signal(signal.SIGTERM).finish():
        assert code == 0, text[-4000:]
    assert not (tmp_path / "stopped" / "model").exists()
    assert json.loads((latest_state(tmp_path / "stopped") / "state.json").read_text())["engine"] == name
    Ranks(workspace, tmp_path / "stopped", 2, engine, extra).succeed()
    assert same(log(tmp_path / "stopped")) == same(log(tmp_path / "long"))
    reference, other = weights(tmp_path / "long"), weights(tmp_path / "stopped")
    assert all(torch.equal(reference[name], other[name]) for name in reference)


@pytest.fixture
def broken_off(workspace, tmp_path, monkeypatch, capsys):
    """A run that was stopped by a signal in the middle of step 4, between two of its four passes."""
    output, passes = tmp_path / "out", []
    original = batches.collate

    def collate(*arguments):
        passes.append(None)
        if len(passes) == 4 * 3 + 2:
            signal.raise_signal(signal.SIGTERM)
        return original(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(loop, "collate", collate)
        arguments = [str(workspace / "recipe.yaml"), "--output-dir", str(output), "--model", str(workspace / "dropout")]
        arguments += ["--heldout-steps", "8"]  # its passes are not to be counted
        assert finetune.main(arguments) == 0
    assert "SIGTERM after step 3: saved" in capsys.readouterr().out
    assert len(passes) == 14, "the step's other passes were not to be made"
    return output, arguments


def test_a_step_that_was_broken_off_is_done_again_as_if_it_had_not_begun(workspace, broken_off, tmp_path):
    output, arguments = broken_off
    assert [row["step"] for row in log(output)] == [1, 2, 3]
    assert finetune.main(arguments) == 0
    whole = [*arguments[:2], str(tmp_path / "whole"), *arguments[3:]]
    assert finetune.main(whole) == 0
    assert same(log(output)) == same(log(tmp_path / "whole"))
    reference, other = weights(tmp_path / "whole"), weights(output)
    assert all(torch.equal(reference[name], other[name]) for name in reference)


def test_another_number_of_ranks_continues_where_one_stopped(workspace, straight, tmp_path, monkeypatch):
    """Weights, optimizer, schedule and the samples consumed go on; dropout, which draws per rank, is off here."""
    output, original = tmp_path / "out", loop.save_state

    def save_and_die(accelerator, recipe, step):
        original(accelerator, recipe, step)
        raise KeyboardInterrupt

    monkeypatch.setattr(loop, "save_state", save_and_die)
    arguments = [str(workspace / "recipe.yaml"), "--output-dir", str(output)]
    assert run_cli(lambda: finetune.main(arguments)) == 130
    assert [row["step"] for row in log(output)] == [1, 2, 3]
    Ranks(workspace, output, 2).succeed()
    assert_trained_alike(straight, output)


@pytest.mark.parametrize(
    ("saved", "engine", "ranks", "message"),
    [
        ({"step": 3, "ranks": 4, "engine": "zero3"}, "zero3", 2, "saved by 4 zero3 processes, now there are 2"),
        ({"step": 3, "ranks": 2, "engine": "zero3"}, "plain", 2, "saved by engine zero3, this is plain"),
        ({"step": 3, "ranks": 2, "engine": "plain"}, "zero2", 2, "saved by engine plain, this is zero2"),
    ],
)
def test_states_that_cannot_be_continued_are_refused_with_the_reason(tmp_path, saved, engine, ranks, message):
    (tmp_path / "state.json").write_text(json.dumps(saved))
    plugin = None if engine == "plain" else SimpleNamespace(zero_stage=int(engine[-1]))
    accelerator = SimpleNamespace(
        state=SimpleNamespace(deepspeed_plugin=plugin),
        distributed_type=SimpleNamespace(value="MULTI_CPU"),
        num_processes=ranks,
    )
    with pytest.raises(ConfigError, match=message):
        load_state(accelerator, tmp_path, tmp_path)


@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_a_number_that_is_not_finite_stops_and_leaves_the_last_state_intact(
    workspace, tmp_path, monkeypatch, capsys, what
):
    arguments = [str(workspace / "recipe.yaml"), "--output-dir", str(tmp_path / "out"), "--checkpointing-steps", "1"]
    arguments += ["--max-train-steps", "4"]
    original, passes = model.SummedLoss.forward, []

    def forward(self, **tensors):
        loss = original(self, **tensors)
        passes.append(None)
        if len(passes) <= 4 * 2:
            return loss
        if what == "loss":
            return loss + torch.inf
        weight = next(self.parameters())
        return loss + ((weight - weight.detach()).sum() ** 2).sqrt()  # 0, with the gradient 0 x infinity

    with monkeypatch.context() as patch:
        patch.setattr(model.SummedLoss, "forward", forward)
        assert run_cli(lambda: finetune.main(arguments)) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith(f"error: {what} of step 3 is ") and "step-000002, is intact" in error
    assert not (tmp_path / "out" / "model").exists()
    assert finetune.main(arguments) == 0
    assert [row["step"] for row in log(tmp_path / "out")] == [1, 2, 3, 4]


def test_states_are_rotated(workspace, tmp_path, monkeypatch):
    arguments = [str(workspace / "recipe.yaml"), "--output-dir", str(tmp_path / "out"), "--checkpointing-steps", "1"]
    seen, original = [], loop.save_state

    def look(*everything):
        folder = original(*everything)
        seen.append(sorted(path.name for path in folder.parent.iterdir()))
        return folder

    monkeypatch.setattr(loop, "save_state", look)
    assert finetune.main([*arguments, "--kept-checkpoints", "3"]) == 0
    assert seen[-1] == ["step-000005", "step-000006", "step-000007"] and seen[1] == ["step-000001", "step-000002"]


# -------------------------------------------------------------------------------------------------------- refusals


def test_ranks_that_share_a_sequence_work_on_the_same_rows():
    layouts = [Layout(rank, 8, 4) for rank in range(8)]
    assert [layout.data_rank for layout in layouts] == [0] * 4 + [1] * 4
    assert {layout.data_ranks for layout in layouts} == {2}
    whole = {"input_ids": torch.arange(24).view(2, 12)}
    parts = [layout.shard(whole)["input_ids"] for layout in layouts[:4]]
    torch.testing.assert_close(torch.cat(parts, dim=1), whole["input_ids"])


@pytest.mark.parametrize(
    ("heads", "kv_heads", "allowed"),
    [(9, 3, [1, 3, 9]), (32, 8, [1, 2, 4, 8, 16, 32]), (6, 4, [1, 2]), (4, 1, [1, 2, 4])],
)
def test_heads_decide_over_how_many_ranks_a_sequence_can_go(heads, kv_heads, allowed):
    assert allowed_sequence_parallel(heads, kv_heads) == allowed


@pytest.mark.parametrize(
    ("fields", "config", "message"),
    [
        ({"sequence_parallel": 2}, {"num_attention_heads": 9, "num_key_value_heads": 3}, "one of: 1, 3, 9"),
        ({"scaling": "dynamic-yarn"}, {}, "no rank sees the length"),
        ({}, {"sliding_window": 16}, "sliding window below 48 tokens"),
        ({"sliding_window_attention_schedule": (64, 32)}, {"sliding_window": 128}, "sliding window below 48 tokens"),
        ({"documents": "separate"}, {}, "documents: separate"),
        ({"attention": "eager"}, {}, "eager attention"),
    ],
)
def test_what_would_be_wrong_over_a_shared_sequence_is_refused(workspace, fields, config, message):
    shape = SimpleNamespace(**{"num_attention_heads": 4, "num_key_value_heads": 2, "sliding_window": None} | config)
    shape.get_text_config = lambda: shape
    recipe = replace(read_recipe(str(workspace / "recipe.yaml")), **{"sequence_parallel": 2} | fields)
    base = RopeScaling(method="default", original_max_position_embeddings=16)
    with pytest.raises(ConfigError, match=message):
        check_sequence_parallel(recipe, shape, RopeScaling.from_spec(recipe.scaling, base), recipe.attention)


@pytest.mark.parametrize(
    ("environment", "flags", "message"),
    [
        ({"ACCELERATE_USE_FSDP": "true"}, [], "FSDP is not available on this platform"),
        ({}, ["--sequence-parallel", "2"], "sequence_parallel 2 needs DeepSpeed"),
        ({"ACCELERATE_USE_DEEPSPEED": "true"}, ["--sequence-parallel", "2"], "a divisor of the 1 processes"),
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


def test_deepspeed_without_a_compiler_is_refused_with_what_is_missing(tmp_path, monkeypatch):
    monkeypatch.setitem(
        sys.modules, "deepspeed.git_version_info", SimpleNamespace(installed_ops={"cpu_adam": False, "built": True})
    )
    monkeypatch.setattr(sys, "executable", str(tmp_path / "bin" / "python"))
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    check_can_build("built")
    with pytest.raises(ConfigError, match=r"has to compile cpu_adam and finds no ninja and no c\+\+: install"):
        check_can_build("cpu_adam")
    for tool in (tmp_path / "bin" / "ninja", tmp_path / "c++"):
        tool.parent.mkdir(exist_ok=True)
        tool.touch(0o755)
    check_can_build("cpu_adam")


@pytest.mark.parametrize(
    ("plugin", "fields", "message"),
    [
        ({"fsdp_version": 1}, {}, "fsdp_version = 1 is not allowed"),
        ({"activation_checkpointing": True}, {}, "the recipe's gradient_checkpointing does it"),
    ],
)
def test_what_was_never_seen_to_work_under_fsdp_is_refused(workspace, plugin, fields, message):
    recipe = replace(read_recipe(str(workspace / "recipe.yaml")), **fields)
    settings = {"fsdp_version": 2, "activation_checkpointing": False, "mixed_precision_policy": None} | plugin
    with pytest.raises(ConfigError, match=message):
        configure_fsdp(SimpleNamespace(**settings), recipe)


@pytest.mark.parametrize("name", ["zero2", "zero3", "zero3_offload"])
def test_deepspeed_settings_leave_batch_and_schedule_to_the_recipe(name):
    settings = json.loads((ROOT / "deepspeed" / f"{name}.json").read_text())
    assert not {"optimizer", "scheduler"} & set(settings)
    assert settings["train_micro_batch_size_per_gpu"] == settings["gradient_accumulation_steps"] == "auto"
    assert settings["gradient_clipping"] == "auto" and settings["data_types"]["grad_accum_dtype"] == "fp32"
