"""One run at a time in a folder; states that are saved, rotated, refused."""

from __future__ import annotations

import json
import os
import shutil
import signal
import time
from types import SimpleNamespace

import pytest
import torch

import finetune
from scaled_rope.command_line import run_cli
from scaled_rope.errors import ConfigError
from scaled_rope.training import loop
from scaled_rope.training.run_state import load_state, run_lock
from tests.helpers.runs import log, weights


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
