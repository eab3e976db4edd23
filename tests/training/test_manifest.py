"""States prove themselves: whatever is done to a file of theirs is found before the state is used."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

import finetune
from scaled_rope.command_line import run_cli
from scaled_rope.training import loop
from scaled_rope.training.manifest import NAME, fault, read_facts, state_files
from tests.helpers.runs import log, same, weights


@pytest.fixture(scope="module")
def stopped(workspace: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that ended after its states of steps 3 and 6."""
    output = tmp_path_factory.mktemp("states") / "out"
    original = loop.Loop.optimizer_step

    def interrupted(self: loop.Loop, step: int) -> object:
        if step == 7:
            raise KeyboardInterrupt
        return original(self, step)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(loop.Loop, "optimizer_step", interrupted)
        finetune.main([str(workspace / "recipe.yaml"), "--output-dir", str(output)])
    return output


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-2])


def empty(path: Path) -> None:
    path.write_bytes(b"")


def remove(path: Path) -> None:
    path.unlink()


def make_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


DAMAGES: tuple[Callable[[Path], None], ...] = (flip, cut, empty, remove, make_folder)


def test_every_damage_of_every_file_is_found(stopped: Path, tmp_path: Path) -> None:
    state = stopped / "checkpoints" / "step-000006"
    assert fault(state) is None
    names = [*state_files(state), NAME]
    assert {"model.safetensors", "optimizer.bin", "random-state-0.json", "train_log.jsonl", "recipe.yaml"} <= {*names}
    for damage in DAMAGES:
        for name in names:
            copy = tmp_path / damage.__name__ / name / "step-000006"
            shutil.copytree(state, copy)
            damage(copy / name)
            found = fault(copy)
            assert found is not None, (damage.__name__, name)
            assert name in found or "no saved state" in found
    copy = tmp_path / "added" / "step-000006"
    shutil.copytree(state, copy)
    (copy / "pytorch_model.bin").write_bytes(b"x")
    assert fault(copy) == "is damaged: pytorch_model.bin was not there when it was saved"


@pytest.mark.parametrize("step", [5, 10**9, "x", None, [6]])
def test_a_changed_step_is_not_believed(stopped: Path, tmp_path: Path, step: object) -> None:
    copy = tmp_path / "step-000006"
    shutil.copytree(stopped / "checkpoints" / "step-000006", copy)
    record = json.loads((copy / NAME).read_text())
    (copy / NAME).write_text(json.dumps(record | {"step": step}))
    assert fault(copy) is not None
    (copy / NAME).write_text(json.dumps([record]))
    assert fault(copy) is not None
    shutil.move(copy, tmp_path / "step-000003")
    (tmp_path / "step-000003" / NAME).write_text(json.dumps(record))
    assert fault(tmp_path / "step-000003") == "is named step-000003 and holds step 6"


def test_ranks_share_the_reading(stopped: Path, tmp_path: Path) -> None:
    copy = tmp_path / "step-000006"
    shutil.copytree(stopped / "checkpoints" / "step-000006", copy)
    flip(copy / "optimizer.bin")
    assert [fault(copy, part, 3) is None for part in range(3)].count(False) == 1


def test_a_state_without_a_manifest_is_taken_as_it_is(tmp_path: Path) -> None:
    (tmp_path / NAME).write_text('{"step": 6, "ranks": 1, "engine": "plain"}')
    assert fault(tmp_path) is None and read_facts(tmp_path, "resume")["step"] == 6


def test_a_damaged_state_is_put_aside_and_the_one_before_it_is_used(
    workspace: Path, stopped: Path, straight: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "out"
    shutil.copytree(stopped, output)
    newest = output / "checkpoints" / "step-000006"
    flip(newest / "model.safetensors")
    arguments = [str(workspace / "recipe.yaml"), "--output-dir", str(output)]
    said = "is damaged: the content of model.safetensors changed after it was saved"
    named = run_cli(lambda: finetune.main([*arguments, "--resume", str(newest)]))
    assert named == 2 and f"resume {newest} {said}" in capsys.readouterr().err
    kept, original = [], loop.save_model

    def look(*given: object, **more: object) -> None:
        kept.extend(path.name for path in (output / "checkpoints").iterdir())
        original(*given, **more)  # type: ignore[arg-type]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "save_model", look)
        assert finetune.main(arguments) == 0
    shown = capsys.readouterr().out
    assert f"state {newest} {said}; it is kept as damaged-step-000006 and not used" in shown
    assert "resuming after step 3" in shown and "damaged-step-000006" in kept
    assert same(log(output)) == same(log(straight))
    assert all((one == weights(straight)[name]).all() for name, one in weights(output).items())
