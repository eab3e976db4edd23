"""One run at a time in a folder; states that are saved, rotated, refused."""

from __future__ import annotations

import errno
import json
import os
import resource
import shutil
import signal
import time
from types import SimpleNamespace

import pytest
import torch
import yaml

import finetune
from scaled_rope.command_line import run_cli
from scaled_rope.errors import ConfigError
from scaled_rope.training import loop, run_state
from scaled_rope.training.run_state import load_state, naming_a_lost_disk, run_lock, size_text
from tests.helpers.runs import log, reversed_set, same, weights


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


def test_states_of_before_resuming_do_not_outlive_the_new_ones(workspace, tmp_path, capsys):
    """They have later steps, so they would be kept as the newest, and the new ones deleted when they are saved."""
    arguments = [str(workspace / "recipe.yaml"), "--output-dir", str(tmp_path / "out"), "--kept-checkpoints", "1"]
    arguments += ["--checkpointing-steps", "2"]
    assert finetune.main([*arguments, "--stop-after", "2"]) == 0
    shutil.copytree(tmp_path / "out" / "checkpoints" / "step-000002", tmp_path / "copy" / "step-000002")
    assert finetune.main([*arguments, "--stop-after", "6"]) == 0
    capsys.readouterr()
    resumed = ["--resume", str(tmp_path / "copy" / "step-000002")]
    assert finetune.main([*arguments, "--stop-after", "4", *resumed]) == 0
    left = sorted(path.name for path in (tmp_path / "out" / "checkpoints").iterdir())
    assert left == ["before-resuming-step-000006", "step-000004"]
    assert (
        "step-000006 is of the course before this run was resumed; it is called before-resuming-step-000006"
        in capsys.readouterr().out
    )
    assert finetune.main([*arguments, "--stop-after", "5"]) == 0  # goes on from the new state
    assert len(log(tmp_path / "out")) == 5


def test_a_resumed_run_that_ends_before_it_saves_does_not_go_back(workspace, tmp_path, monkeypatch, capsys):
    arguments = [str(workspace / "recipe.yaml"), "--output-dir", str(tmp_path / "out"), "--checkpointing-steps", "2"]
    assert finetune.main([*arguments, "--stop-after", "6"]) == 0
    states = tmp_path / "out" / "checkpoints"
    with monkeypatch.context() as patch:
        patch.setattr(loop.Loop, "_save", lambda self, step: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            finetune.main([*arguments, "--stop-after", "7", "--resume", str(states / "step-000004")])
    capsys.readouterr()
    assert finetune.main([*arguments, "--stop-after", "5"]) == 0
    assert f"resuming after step 4 from {states / 'step-000004'}" in capsys.readouterr().out


def test_a_finished_run_is_not_begun_again_by_stop_after(workspace, straight, capsys):
    arguments = [str(workspace / "recipe.yaml"), "--output-dir", str(straight), "--stop-after", "4"]
    said = refusal(capsys, *arguments)
    assert f"stop_after 4 is not possible: the run in {straight} is finished, and its states are deleted" in said
    assert len(log(straight)) == 8 and (straight / "model").is_dir()


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
    assert "has 1 kB free, the run needs up to" in capsys.readouterr().err
    assert not (tmp_path / "train_log.jsonl").exists()


# ------------------------------------------------------------------------------------------------ states with a name


@pytest.fixture(scope="module")
def stopped(workspace, tmp_path_factory):
    """States after steps 3 and 6 of a run that was given up in step 7, the first copied out of it as well."""
    output = tmp_path_factory.mktemp("stopped") / "out"
    original = loop.Loop.optimizer_step

    def give_up(self, step):
        return None if step == 6 else original(self, step)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop.Loop, "optimizer_step", give_up)
        assert finetune.main([str(workspace / "recipe.yaml"), "--output-dir", str(output)]) == 143
    shutil.copytree(output / "checkpoints" / "step-000003", output.parent / "copy")
    return output


def refusal(capsys, *arguments) -> str:
    assert run_cli(lambda: finetune.main([str(each) for each in arguments])) == 2
    return capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (("--scaling", "linear:4"), "scaling = 'yarn:3', now 'linear:4'; resume with the same settings"),
        (("--lora",), "lora = False, now True; resume with the same settings"),
        (("--seed", "7"), "seed = 42, now 7; resume with the same settings, or take --continue-from"),
        (("--learning-rate", "1"), "learning_rate = 0.005, now 1.0; resume"),
        (("--max-train-steps", "9"), "max_train_steps = 8, now 9; resume"),
        (("--model", "tied"), "model = "),
    ],
)
@pytest.mark.parametrize("place", ["out/checkpoints/step-000006", "copy"])
def test_a_state_of_another_recipe_is_refused_by_field(workspace, stopped, tmp_path, capsys, extra, message, place):
    state = stopped.parent / place
    extra = [str(workspace / each) if each == "tied" else each for each in extra]
    said = refusal(capsys, workspace / "recipe.yaml", "--output-dir", tmp_path / "new", "--resume", state, *extra)
    assert f"error: resume {state} is a state of a run with {message}" in said
    assert not (tmp_path / "new").exists()


def test_a_state_of_the_same_recipe_continues_elsewhere_with_its_log(workspace, straight, stopped, tmp_path):
    for place in ("out/checkpoints/step-000006", "copy"):
        output = tmp_path / place.replace("/", "-")
        arguments = [str(workspace / "recipe.yaml"), "--output-dir", str(output)]
        assert finetune.main([*arguments, "--resume", str(stopped.parent / place)]) == 0
        assert same(log(output)) == same(log(straight))
        assert all(torch.equal(weights(straight)[name], tensor) for name, tensor in weights(output).items())


def test_states_that_are_none_or_damaged_or_nameless_are_one_line(workspace, stopped, tmp_path, capsys):
    arguments = [workspace / "recipe.yaml", "--output-dir", tmp_path / "new"]
    (tmp_path / "empty").mkdir()
    for flag, field in (("--resume", "resume"), ("--continue-from", "continue_from")):
        assert refusal(capsys, *arguments, flag, tmp_path / "empty").startswith(
            f"error: {field} {tmp_path / 'empty'} is no saved state; a folder checkpoints/step-N"
        )
        nameless = tmp_path / f"nameless-{field}"
        shutil.copytree(stopped.parent / "copy", nameless)
        (nameless / "recipe.yaml").unlink()
        assert "does not say which run it is of: recipe.yaml is missing" in refusal(capsys, *arguments, flag, nameless)
    damaged = tmp_path / "damaged"
    shutil.copytree(stopped.parent / "copy", damaged)
    (damaged / "model.safetensors").write_bytes(b"no weights")
    assert f"error: resume {damaged} is damaged: model.safetensors has 10 bytes, it was" in refusal(
        capsys, *arguments, "--resume", damaged
    )
    # A state of an earlier version has no manifest.
    (damaged / "state.json").write_text('{"step": 3, "ranks": 1, "engine": "plain"}')
    assert f"error: state {damaged} cannot be loaded: " in refusal(capsys, *arguments, "--resume", damaged)
    shutil.copyfile(stopped.parent / "copy" / "model.safetensors", damaged / "model.safetensors")
    lines = (damaged / "train_log.jsonl").read_text().splitlines(keepends=True)
    for kept, said in (
        ([], "ends with step 0, and the state is of step 3"),
        (lines[:2], "ends with step 2, and the state is of step 3"),
        ([lines[0], lines[2]], "line 2: step 3 is not allowed; 2 comes here"),
        ([lines[0], *lines], "line 2: step 1 is not allowed; 2 comes here"),
        (['{"loss": 3.0}\n'] * 3, "line 1: step None is not allowed; 1 comes here"),
    ):
        (damaged / "train_log.jsonl").write_text("".join(kept))
        assert said in refusal(capsys, *arguments, "--resume", damaged)


def test_a_run_goes_on_with_other_steps_rate_and_data_and_says_so(workspace, straight, stopped, tmp_path, capsys):
    """The second run takes over the first one's weights, moments and step; both recipes are on record."""
    reversed_set(workspace / "set", tmp_path / "other")
    state = stopped / "checkpoints" / "step-000006"
    arguments = [str(workspace / "recipe.yaml"), "--output-dir", str(tmp_path / "out"), "--continue-from", str(state),
                 "--dataset", str(tmp_path / "other"), "--max-train-steps", "10", "--learning-rate", "1e-3",
                 "--lr-schedule", "constant", "--checkpointing-steps", "1"]  # fmt: skip
    moments, original = [], loop.Loop.optimizer_step

    def give_up(self, step):
        if not moments:
            moments.append([entry["exp_avg"].abs().sum() for entry in self.optimizer.state.values()])
        return None if step == 8 else original(self, step)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop.Loop, "optimizer_step", give_up)
        assert finetune.main(arguments) == 143
    assert len(moments[0]) > 10 and all(total > 0 for total in moments[0])
    assert finetune.main(arguments) == 0  # from its own state
    rows = log(tmp_path / "out")
    assert [row["step"] for row in rows] == list(range(1, 11))
    assert same(rows)[:6] == same(log(straight))[:6]
    assert [row["learning_rate"] for row in rows[6:]] == [1e-3] * 4
    assert [row.get("continued_from") for row in rows] == [None] * 6 + [str(state)] + [None] * 3
    assert rows[-1]["tokens_seen"] == sum(row["tokens"] for row in rows)
    for name in ("provenance.json", "model/provenance.yaml"):
        record = yaml.safe_load((tmp_path / "out" / name).read_text())["continued_from"]
        assert (record["state"], record["step"]) == (str(state), 6)
        assert record["recipe"]["dataset"] == str(workspace / "set") and record["recipe"]["learning_rate"] == 5e-3
    card = (tmp_path / "out" / "model" / "README.md").read_text()
    (line,) = [line for line in card.splitlines() if line.startswith("| continued from |")]
    assert f"{state}: steps 1 to 6 were done with dataset = {workspace / 'set'}" in line
    assert "learning_rate = 0.005, lr_schedule = linear" in line and "scaling" not in line
    capsys.readouterr()
    assert finetune.main(arguments) == 0
    assert "already trained" in capsys.readouterr().out
    assert "continue_from = " in refusal(capsys, *arguments[:3], *arguments[5:])


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (("--scaling", "linear:4"), "is a state of a run with scaling = 'yarn:3', now 'linear:4'; model, scaling"),
        (("--lora",), "is a state of a run with lora = False, now True"),
        (("--model", "tied"), "is a state of a run with model = "),
        (("--precision", "bf16"), "is a state of a run with precision = 'fp32', now 'bf16'"),
        (("--rope-theta", "5e5"), "is a state of a run with rope_theta = None, now 500000.0"),
        (("--max-train-steps", "6"), "max_train_steps 6 is not allowed with continue_from"),
    ],
)
def test_what_a_continued_run_must_share_is_compared(workspace, stopped, tmp_path, capsys, extra, message):
    state = stopped / "checkpoints" / "step-000006"
    extra = [str(workspace / each) if each == "tied" else each for each in extra]
    arguments = [workspace / "recipe.yaml", "--output-dir", tmp_path / "new", "--continue-from", state, *extra]
    assert message in refusal(capsys, *arguments)


def test_the_optimizer_has_the_settings_of_the_new_recipe(workspace, stopped, tmp_path, monkeypatch):
    """A state holds those of the old one, and loading it brings them back."""
    text = (workspace / "recipe.yaml").read_text() + "weight_decay: 0.25\nadam_betas: [0.8, 0.9]\n"
    (tmp_path / "recipe.yaml").write_text(text)
    seen, original = [], loop.Loop.optimizer_step

    def look(self, step):
        seen.extend((group["betas"], group["weight_decay"]) for group in self.optimizer.param_groups)
        return original(self, step)

    monkeypatch.setattr(loop.Loop, "optimizer_step", look)
    arguments = [str(tmp_path / "recipe.yaml"), "--output-dir", str(tmp_path / "out"), "--max-train-steps", "7"]
    assert finetune.main([*arguments, "--continue-from", str(stopped / "checkpoints" / "step-000006")]) == 0
    assert seen == [((0.8, 0.9), 0.25)]


def test_a_run_in_two_parts_is_the_run_in_one(workspace, straight, tmp_path, capsys):
    first = [str(workspace / "recipe.yaml"), "--output-dir", str(tmp_path / "first"), "--stop-after", "5"]
    assert finetune.main(first) == 0
    state = tmp_path / "first" / "checkpoints" / "step-000005"
    assert f"stop_after 5: saved {state}" in capsys.readouterr().out
    assert len(log(tmp_path / "first")) == 5 and not (tmp_path / "first" / "model").exists()
    before = (state / "model.safetensors").read_bytes()
    assert finetune.main(first) == 0  # it is finished
    assert (
        f"{state}: already trained" in capsys.readouterr().out and (state / "model.safetensors").read_bytes() == before
    )
    second = [str(workspace / "recipe.yaml"), "--output-dir", str(tmp_path / "second"), "--continue-from", str(state)]
    assert finetune.main(second) == 0
    rows = log(tmp_path / "second")
    assert [row.pop("continued_from", None) for row in rows] == [None] * 5 + [str(state)] + [None] * 2
    assert same(rows) == same(log(straight))
    assert weights(tmp_path / "second").keys() == weights(straight).keys()
    assert all(torch.equal(one, weights(straight)[name]) for name, one in weights(tmp_path / "second").items())
    assert "stop_after 4 is not possible: the run is at step 5" in refusal(capsys, *first[:-1], "4")
    assert "stop_after = 8 is not allowed; a step before max_train_steps" in refusal(capsys, *first[:-1], "8")


@pytest.fixture
def small_files():
    """While it is called with a number, no file can grow beyond so many bytes, as on a disk that is full."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, before)
    signal.signal(signal.SIGXFSZ, handler)


@pytest.mark.parametrize("part", ["state", "model"])
def test_a_full_disk_is_one_line_and_nothing_is_lost(workspace, straight, tmp_path, capsys, small_files, part):
    arguments = [str(workspace / "recipe.yaml"), "--output-dir", str(tmp_path / "out")]
    if part == "state":
        small_files(40_000)
        place, more = tmp_path / "out" / "checkpoints", []
    else:
        place, more = tmp_path / "out" / "model", ["--checkpointing-steps", "100"]
        original = loop.save_model

        def save(*given):
            small_files(40_000)
            return original(*given)

    with pytest.MonkeyPatch.context() as patch:
        if part == "model":
            patch.setattr(loop, "save_model", save)
        assert run_cli(lambda: finetune.main([*arguments, *more])) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
    assert f"error: {place} cannot be written: no space left, or a limit for a file's size (" in line
    assert "needed); what was saved before is whole, and the same command continues" in line and "0 kB" not in line
    small_files(resource.RLIM_INFINITY)
    assert finetune.main(arguments) == 0
    assert same(log(tmp_path / "out")) == same(log(straight))
    assert all(torch.equal(one, weights(straight)[name]) for name, one in weights(tmp_path / "out").items())


def test_sizes_are_given_in_words_that_say_something():
    sizes = (0, 999, 80_700, 13.5e9, 2e12)
    assert [size_text(size) for size in sizes] == ["0 bytes", "999 bytes", "80.7 kB", "13.5 GB", "2 TB"]


@pytest.mark.parametrize("part", ["save_state", "save_model", "while the model is saved"])
def test_an_output_that_is_removed_while_it_is_saved_is_one_line(
    workspace, straight, tmp_path, monkeypatch, capsys, part
):
    """Nothing is left that a rerun would take for another's."""
    arguments = [str(workspace / "recipe.yaml"), "--output-dir", str(tmp_path / "out")]
    name = "write_records" if part.startswith("while") else part
    original = getattr(loop, name)

    def removing(*given):
        shutil.rmtree(tmp_path / "out")
        return original(*given)

    with monkeypatch.context() as patch:
        patch.setattr(loop, name, removing)
        assert run_cli(lambda: finetune.main(arguments)) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
    assert "was changed while the run was at work" in line or "it was removed or made read-only meanwhile" in line
    assert finetune.main(arguments) == 0
    assert same(log(tmp_path / "out")) == same(log(straight))
    assert all(torch.equal(one, weights(straight)[name]) for name, one in weights(tmp_path / "out").items())


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (RuntimeError("I/O error: Read-only file system (os error 30)"), "it was removed or made read-only meanwhile"),
        (RuntimeError("Parent directory /x does not exist."), "it was removed or made read-only meanwhile"),
        (OSError(errno.EROFS, "Read-only file system"), "it was removed or made read-only meanwhile"),
        (OSError(errno.EFBIG, "File too large"), r"no space left, or a limit .* about 80.7 kB needed"),
        (RuntimeError("Error: No space left on device (os error 28)"), "no space left"),
    ],
)
def test_whatever_raises_when_a_disk_is_lost_is_one_line(tmp_path, error, said):
    with pytest.raises(ConfigError, match=said), naming_a_lost_disk(tmp_path, 80_700):
        raise error
    with pytest.raises(ZeroDivisionError), naming_a_lost_disk(tmp_path, 1):
        raise ZeroDivisionError("mine")


def test_a_run_that_was_killed_after_its_model_was_saved_tidies_up(workspace, straight, tmp_path, monkeypatch):
    arguments = [str(workspace / "recipe.yaml"), "--output-dir", str(tmp_path / "out")]
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(loop.Trainer, "_finish", lambda self: (_ for _ in ()).throw(KeyboardInterrupt))
        finetune.main(arguments)
    assert (tmp_path / "out" / "checkpoints").exists() and not (tmp_path / "out" / "loss.png").exists()
    assert finetune.main(arguments) == 0
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {path.name for path in straight.iterdir()} and "loss.png" in names


def test_an_error_of_one_rank_ends_all_and_is_said_once(monkeypatch):
    others = [None]
    monkeypatch.setattr(run_state, "gather_object", lambda mine: mine + others)
    with run_state.refused_on_all_ranks():
        pass
    for error in (ConfigError("no room"), OSError(28, "no space")):
        with pytest.raises(type(error), match="no "), run_state.refused_on_all_ranks():
            raise error
    others = ["no room"]
    with pytest.raises(ConfigError, match="no room"), run_state.refused_on_all_ranks():
        pass
    monkeypatch.setenv("LOCAL_RANK", "1")
    with pytest.raises(SystemExit) as ended, run_state.refused_on_all_ranks():
        pass
    assert ended.value.code == 2
