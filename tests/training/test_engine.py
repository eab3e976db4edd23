"""Layouts of ranks, and what engines cannot do."""

from __future__ import annotations

import json
import os
import shutil
import sys
import time
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from scaled_rope import RopeScaling
from scaled_rope.errors import ConfigError
from scaled_rope.recipes.files import read_recipe
from scaled_rope.training import engine
from scaled_rope.training.engine import (
    Layout,
    accumulation,
    allowed_sequence_parallel,
    check_can_build,
    check_sequence_parallel,
    configure_fsdp,
    has_slow_bfloat16,
    settle_precision,
)
from tests.helpers import ROOT
from tests.helpers.training_recipes import recipe


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
        ({}, {"layer_types": ["full_attention", "chunked_attention"]}, "layers of type chunked_attention"),
        ({}, {"layer_types": ["linear_attention", "full_attention"]}, "layers of type linear_attention"),
        ({"sliding_window_attention_schedule": (64, 32)}, {"sliding_window": 128}, "sliding window below 48 tokens"),
        ({"documents": "separate"}, {}, "documents: separate"),
        ({"attention": "eager"}, {}, "eager attention"),
    ],
)
def test_what_would_be_wrong_over_a_shared_sequence_is_refused(workspace, fields, config, message):
    shape = SimpleNamespace(**{"num_attention_heads": 4, "num_key_value_heads": 2, "sliding_window": None} | config)
    shape.get_text_config = lambda decoder: shape
    recipe = replace(read_recipe(str(workspace / "recipe.yaml")), **{"sequence_parallel": 2} | fields)
    base = RopeScaling(method="default", original_max_position_embeddings=16)
    with pytest.raises(ConfigError, match=message):
        check_sequence_parallel(recipe, shape, RopeScaling.from_spec(recipe.scaling, base), recipe.attention)


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


def test_a_lock_that_a_killed_compilation_left_is_told(tmp_path, monkeypatch, capsys):
    """torch would wait for it without a word and without an end."""
    monkeypatch.setitem(
        sys.modules, "deepspeed.git_version_info", SimpleNamespace(installed_ops={"cpu_adam": False, "other": False})
    )
    monkeypatch.setattr(shutil, "which", lambda tool: tool)
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    lock = tmp_path / "cpu_adam" / "lock"
    lock.parent.mkdir()
    lock.touch()
    check_can_build("cpu_adam")
    assert capsys.readouterr().err == ""  # a rank that began a moment earlier
    os.utime(lock, (time.time() - 600,) * 2)
    check_can_build("other")
    assert capsys.readouterr().err == ""
    check_can_build("cpu_adam")
    assert f"{lock} is 10 minutes old: another run compiles cpu_adam, or one was killed" in capsys.readouterr().err


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


def test_a_batch_that_ranks_cannot_share_is_refused():
    with pytest.raises(ConfigError, match="multiple of batch_size 1 x 3 processes"):
        accumulation(recipe(), 3)


@pytest.mark.parametrize(
    ("machine", "capability", "slow"),
    [("x86_64", "AVX2", True), ("x86_64", "AVX512", False), ("aarch64", "DEFAULT", False), ("AMD64", "DEFAULT", True)],
)
def test_which_processors_are_slow_in_bfloat16(monkeypatch, machine, capability, slow):
    monkeypatch.setattr("platform.machine", lambda: machine)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    assert has_slow_bfloat16() == slow
    monkeypatch.setattr("scaled_rope.training.engine.resolve_device", lambda device: torch.device("cpu"))
    settled = settle_precision(recipe(precision="auto"))
    assert settled.precision == ("fp32" if slow else "bf16")
    assert settle_precision(recipe(precision="bf16")).precision == "bf16"
    monkeypatch.setattr("scaled_rope.training.engine.resolve_device", lambda device: torch.device("cuda"))
    assert settle_precision(recipe(precision="auto")).precision == "bf16"


def test_ranks_wait_for_the_first_one_longer_than_nccl_would(monkeypatch):
    """It alone hashes a base and writes the finished model."""
    given = {}

    class Stop(Exception):
        pass

    def accelerator(**options):
        given.update(options)
        raise Stop

    monkeypatch.setattr("accelerate.Accelerator", accelerator)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    with pytest.raises(Stop):
        engine.make_accelerator(read_recipe("tiny-base"), "sdpa")
    (group,) = [one for one in given["kwargs_handlers"] if type(one).__name__ == "InitProcessGroupKwargs"]
    assert group.timeout.total_seconds() >= 3600 and group.backend is None  # accelerate takes NCCL on a GPU


def test_more_processes_than_gpus_are_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    with pytest.raises(ConfigError, match="8 processes on this machine are not allowed, it has 4 GPUs"):
        engine.make_accelerator(read_recipe("tiny-base"), "sdpa")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    engine.check_gpus()
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)  # each is given one, as by srun --gpus-per-task=1
    engine.check_gpus()
    for said in ("", "8(x2)"):
        monkeypatch.setenv("LOCAL_WORLD_SIZE", said)
        engine.check_gpus()


NCCL = "NCCL error in: NCCLUtils.hpp:94, {}, NCCL version 2.27.5\n{}: A call failed.\nLast error:\n{}\n"


@pytest.mark.parametrize(
    ("said", "line"),
    [
        (NCCL.format("remote process exited or there was a network error", "ncclRemoteError", "socket closed"),
         "rank 3 lost the connection to another process"),
        ("NCCL communicator was aborted on rank 3.", "rank 3 lost the connection"),
        ("[Rank 3] Watchdog caught collective operation timeout: WorkNCCL(SeqNum=9)", "rank 3 lost the connection"),
        (NCCL.format("invalid usage", "ncclInvalidUsage", "Duplicate GPU detected : rank 3 and rank 7"),
         "rank 3: NCCL failed: Duplicate GPU detected : rank 3 and rank 7; NCCL_DEBUG=WARN tells more"),
        ("retrieving ncclUniqueId from [0] via c10d key-value store, but store->get('0') got error: failed to recv, got"
         " 0 bytes. Connection was likely closed. Did the remote server crash?", "rank 3 lost the connection"),
        (NCCL.format("internal error", "ncclInternalError", "") + "Exception raised from run at x.cpp:1\nframe #0: y",
         "rank 3: NCCL failed: NCCL error in: NCCLUtils.hpp:94, internal error, NCCL version 2.27.5 ncclInternalError:"
         " A call failed.; NCCL_DEBUG=WARN tells more"),
        ("NCCL error: unhandled cuda error\nncclUnhandledCudaError: Call to CUDA failed.",
         "rank 3: NCCL failed: NCCL error: unhandled cuda error ncclUnhandledCudaError: Call to CUDA failed.;"),
    ],
)  # fmt: skip
def test_what_nccl_says_is_not_taken_for_a_lost_rank(monkeypatch, said, line):
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setenv("WORLD_SIZE", "8")
    with pytest.raises(ConfigError) as found, engine.naming_a_lost_rank():
        raise RuntimeError(said)
    assert str(found.value).startswith(line) and "\n" not in str(found.value)


def test_errors_of_one_process_and_others_pass(monkeypatch):
    for size, said in (
        ("1", "NCCL error: ncclInvalidUsage"),
        ("8", "shape mismatch"),
        ("8", "no file ncclConfig.json"),
    ):
        monkeypatch.setenv("WORLD_SIZE", size)
        with pytest.raises(RuntimeError, match=said), engine.naming_a_lost_rank():
            raise RuntimeError(said)
