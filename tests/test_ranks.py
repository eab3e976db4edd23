"""Several processes against one: the same losses, rates and weights; killed and resumed against never stopped."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import finetune
from scaled_rope.command_line import run_cli
from scaled_rope.errors import ConfigError
from scaled_rope.texts.packed import PackedWriter
from scaled_rope.texts.packing import pack
from scaled_rope.training import loop
from scaled_rope.training.engine import check_can_build
from scaled_rope.training.run_state import latest_state
from tests.helpers.optional import needs_liger
from tests.helpers.rank_worker import (
    keep_states,
    ring_attention_on_cpu,
    small_pieces_of_logits,
    without_dropout,
)
from tests.helpers.runs import LENGTH, Ranks, free_port, launch, log, reversed_set, same, weights

ZERO3 = ("-m", "accelerate.commands.launch", "--config_file", "configs/accelerate/zero3.yaml", "--num_processes", "2")


def need_deepspeed(engine: str = "zero3") -> None:
    """Skip a test where DeepSpeed is missing, or what it compiles its Adam for offload with."""
    if find_spec("deepspeed") is None:
        pytest.skip("DeepSpeed is not installed")
    if "offload" in engine:
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


@pytest.mark.slow  # the launcher and two ranks import everything anew; the next test does the same with forks
def test_two_ranks_that_a_launcher_started_train_like_one(workspace, straight, tmp_path):
    need_deepspeed()
    launch(workspace, tmp_path / "zero3", (*ZERO3, "--main_process_port", free_port()))
    assert_trained_alike(straight, tmp_path / "zero3")


@pytest.mark.parametrize(
    "engine",
    [
        "ddp",
        pytest.param("zero2", marks=pytest.mark.slow),
        "zero3",
        pytest.param("zero3_offload", marks=pytest.mark.slow),
        "fsdp2",
    ],
)
def test_two_ranks_train_like_one(workspace, straight, tmp_path, engine):
    if engine.startswith("zero"):
        need_deepspeed(engine)
    Ranks(workspace, tmp_path / "two", 2, engine).succeed()
    assert_trained_alike(straight, tmp_path / "two")


@pytest.mark.parametrize("engine", ["zero3", pytest.param("fsdp2", marks=pytest.mark.slow)])
def test_two_ranks_keep_documents_apart_and_give_rows_their_own_scale(workspace, tmp_path, engine):
    """Packed documents in rows that end in padding, under a scaling that follows the length."""
    if engine == "zero3":
        need_deepspeed()
    rng = np.random.default_rng(0)
    documents = [rng.integers(2, 60, size).tolist() for size in (20, 23, 31, 40, 44, 11, 38)]
    with PackedWriter(tmp_path / "set", LENGTH, 64, weighted=True) as writer:
        pack(documents, writer, 0, 1, packing="best-fit", pad=1)
        writer.close({"bookend": "document", "bos": 0, "eos": 1})
    extra = ("--dataset", str(tmp_path / "set"), "--documents", "separate", "--scaling", "dynamic-yarn")
    extra += ("--max-train-steps", "4", "--heldout-steps", "4")
    Ranks(workspace, tmp_path / "one", 1, "ddp", extra).succeed()
    Ranks(workspace, tmp_path / "two", 2, engine, extra).succeed()
    assert_trained_alike(tmp_path / "one", tmp_path / "two")


@pytest.mark.parametrize("engine", ["zero3", pytest.param("fsdp2", marks=pytest.mark.slow)])
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


@pytest.mark.parametrize(
    ("engine", "flags"),
    [
        ("ddp", ()),
        ("zero3", ("--sequence-parallel", "2")),
        pytest.param("fsdp2", (), marks=pytest.mark.slow),
    ],
)
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


@pytest.mark.parametrize(
    ("ranks", "size"), [pytest.param(2, 2, marks=pytest.mark.slow), (4, 2), pytest.param(4, 4, marks=pytest.mark.slow)]
)
def test_ranks_that_share_sequences_train_like_one(workspace, straight, tmp_path, ranks, size):
    """4 heads and 2 key/value heads: over 4 ranks each key/value head is copied. What attention returned is kept."""
    need_deepspeed()
    extra = ("--sequence-parallel", str(size), "--keep-attention")
    Ranks(workspace, tmp_path / "sp", ranks, "zero3", extra).succeed()
    assert_trained_alike(straight, tmp_path / "sp")


@pytest.mark.slow
def test_ranks_that_share_sequences_by_ring_attention_train_like_one(workspace, straight, tmp_path):
    """Stopped and continued once. Two rings of two ranks, so each has every second row, and two stretches of it."""
    extra = ("--context-parallel", "2")
    Ranks(workspace, tmp_path / "ring", 4, "fsdp2", (*extra, "--stop-after", "4"), (ring_attention_on_cpu,)).succeed()
    Ranks(workspace, tmp_path / "ring", 4, "fsdp2", extra, (ring_attention_on_cpu,)).succeed()
    assert_trained_alike(straight, tmp_path / "ring")


@pytest.mark.parametrize(
    ("engine", "flags"),
    [pytest.param("ddp", (), marks=pytest.mark.slow), ("zero3", ("--sequence-parallel", "2"))],
)
def test_windows_whose_positions_jump_are_the_same_on_two_ranks(workspace, tmp_path, engine, flags):
    if engine == "zero3":
        need_deepspeed()
    extra = ("--positions", "pose", "--sequence-length", "16", "--max-train-steps", "3")
    Ranks(workspace, tmp_path / "one", 1, extra=extra).succeed()
    Ranks(workspace, tmp_path / "two", 2, engine, (*extra, *flags)).succeed()
    assert_trained_alike(tmp_path / "one", tmp_path / "two")


@pytest.mark.parametrize(
    "engine",
    [pytest.param("ddp", marks=pytest.mark.slow), "zero3", pytest.param("fsdp2", marks=pytest.mark.slow)],
)
def test_tiled_mlps_and_kept_attention_train_alike(workspace, straight, tmp_path, engine):
    if engine == "zero3":
        need_deepspeed()
    Ranks(workspace, tmp_path / "two", 2, engine, ("--mlp-tiles", "3", "--keep-attention")).succeed()
    assert_trained_alike(straight, tmp_path / "two")


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


@pytest.mark.slow  # benchmarks/campaign.py does it by the hundred
def test_killed_at_random_and_resumed_equals_never_stopped(workspace):
    """A pre-emption and a kill at random moments, with dropout; the loss log has neither gap nor duplicate."""
    extra = ("--max-train-steps", "120", "--checkpointing-steps", "7", "--model", str(workspace / "dropout"))
    Ranks(workspace, workspace / "long", 1, extra=extra).succeed()
    output, when = workspace / "killed", random.Random()
    first, second = when.randrange(1, 50), when.randrange(55, 100)
    print(f"terminated after {first} steps, killed after {second}")
    begun = Ranks(workspace, output, 1, extra=extra, afresh=True)
    ((code, text),) = begun.when(first).signal(signal.SIGTERM).finish()
    assert code == 143 and "SIGTERM after step" in text and "the same command continues" in text
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


@pytest.mark.parametrize(
    ("engine", "name"), [("zero3", "zero3"), pytest.param("fsdp2", "fsdp", marks=pytest.mark.slow)]
)
def test_shards_that_were_stopped_go_on_bit_for_bit(workspace, tmp_path, engine, name):
    if engine == "zero3":
        need_deepspeed()
    extra = ("--max-train-steps", "20", "--model", str(workspace / "dropout"))
    Ranks(workspace, tmp_path / "long", 2, engine, extra).succeed()
    for code, text in Ranks(workspace, tmp_path / "stopped", 2, engine, extra).when(3).signal(signal.SIGTERM).finish():
        assert code == 143, text[-4000:]
    assert not (tmp_path / "stopped" / "model").exists()
    assert json.loads((latest_state(tmp_path / "stopped") / "state.json").read_text())["engine"] == name
    Ranks(workspace, tmp_path / "stopped", 2, engine, extra).succeed()
    assert same(log(tmp_path / "stopped")) == same(log(tmp_path / "long"))
    reference, other = weights(tmp_path / "long"), weights(tmp_path / "stopped")
    assert all(torch.equal(reference[name], other[name]) for name in reference)


def test_a_rank_that_lost_the_other_says_so_in_one_line(workspace, tmp_path):
    run = Ranks(workspace, tmp_path / "out", 2, extra=("--max-train-steps", "500")).when(2)
    os.kill(run._processes[0].pid, signal.SIGKILL)
    (first, _), (second, said) = run.finish()
    assert (first, second) == (-signal.SIGKILL, 2)
    assert "error: rank 1 lost the connection to another process of this run" in said and "Traceback" not in said


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


@needs_liger
@pytest.mark.slow  # kernels in the interpreter; tests/patching/test_loss_fused.py has one rank
@pytest.mark.parametrize("engine", ["zero3", "fsdp2"])
def test_two_ranks_with_the_fused_loss_on_shards_train_like_one_with_the_chunked(
    workspace: Path, tied: Path, tmp_path: Path, engine: str
) -> None:
    """The projection's weights are the embeddings' too, so both their gradients are summed before they are reduced."""
    if engine == "zero3":
        need_deepspeed()
    extra = ("--model", str(workspace / "tied"), "--loss", "fused")
    fused = Ranks(workspace, tmp_path / "fused", 2, engine, extra, TRITON_INTERPRET="1").succeed()
    assert "loss fused" in fused[0]
    assert_trained_alike(tied, tmp_path / "fused")


@pytest.mark.parametrize(("ranks", "engine"), [(1, "ddp"), (2, "zero3")])
def test_a_tied_checkpoint_with_two_embeddings_is_refused_alike(workspace, tmp_path, ranks, engine):
    """transformers would untie them on one process and overwrite one of them on shards."""
    if ranks > 1:
        need_deepspeed()
    shutil.copytree(workspace / "tied", tmp_path / "model")
    state = load_file(tmp_path / "model" / "model.safetensors")
    state["lm_head.weight"] = state["model.embed_tokens.weight"] + 1.0
    save_file(state, tmp_path / "model" / "model.safetensors", metadata={"format": "pt"})
    for code, said in Ranks(workspace, tmp_path / "out", ranks, engine, ("--model", str(tmp_path / "model"))).finish():
        assert code == 2 and "Traceback" not in said
        assert "says tie_word_embeddings and stores lm_head.weight with other values than model.embed_tokens" in said


@pytest.mark.parametrize("engine", ["zero3", pytest.param("fsdp2", marks=pytest.mark.slow)])
def test_shards_are_continued_by_another_recipe_like_a_whole_state(workspace, tmp_path, engine):
    """Moments and step come from the state, rate and data from the recipe; the same on one process and on shards."""
    if engine == "zero3":
        need_deepspeed()
    reversed_set(workspace / "set", tmp_path / "other")
    for ranks, kind in ((1, "ddp"), (2, engine)):
        first, second = tmp_path / f"{kind}-first", tmp_path / f"{kind}-second"
        Ranks(workspace, first, ranks, kind, ("--checkpointing-steps", "4"), (keep_states,)).succeed()
        extra = ("--continue-from", str(first / "kept"), "--dataset", str(tmp_path / "other"), "--learning-rate",
                 "1e-3", "--max-train-steps", "7")  # fmt: skip
        Ranks(workspace, second, ranks, kind, extra).succeed()
    assert_trained_alike(tmp_path / "ddp-second", tmp_path / f"{engine}-second")
    assert log(tmp_path / "ddp-second")[4]["loss"] != log(tmp_path / "ddp-first")[4]["loss"]
