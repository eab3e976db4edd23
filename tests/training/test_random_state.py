"""Random generators in a saved state: plain data, the same numbers afterwards, and states of earlier versions."""

from __future__ import annotations

import json
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate.checkpointing import save_accelerator_state

import finetune
from scaled_rope.errors import ConfigError
from scaled_rope.training.manifest import NAME, read_facts
from scaled_rope.training.random_state import RandomState
from tests.helpers.runs import log, same, weights


def draws() -> tuple[float, float, float, float]:
    return random.random(), random.gauss(0, 1), float(np.random.standard_normal()), float(torch.randn(()))


def test_generators_go_on_where_they_were_saved(tmp_path: Path) -> None:
    random.gauss(0, 1)  # one is kept of each pair that is drawn
    np.random.standard_normal()
    RandomState().save(tmp_path / "state.json")
    expected = draws()
    for seed in (1, 2):
        random.seed(seed)
        np.random.seed(seed)
        torch.manual_seed(seed)
        assert draws() != expected
        with torch.device("meta"):  # the state of a generator is on the CPU, whatever the default device is
            RandomState.load(tmp_path / "state.json").restore()
        assert draws() == expected


class Gpus:
    """torch.cuda of a machine with some GPUs, of which this process uses one."""

    def __init__(self, count: int, mine: int) -> None:
        self.states = [torch.full((16,), 10 * place, dtype=torch.uint8) for place in range(count)]
        self.mine = mine

    def is_available(self) -> bool:
        return True

    def current_device(self) -> int:
        return self.mine

    def device_count(self) -> int:
        return len(self.states)

    def get_rng_state(self) -> torch.Tensor:
        return self.states[self.mine].clone()

    def set_rng_state(self, state: torch.Tensor) -> None:
        self.states[self.mine] = state.clone()


def test_a_gpu_takes_the_state_of_its_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Saved by rank 5 of a machine with 8 GPUs, resumed where it has the first of two."""
    monkeypatch.setattr(torch, "cuda", Gpus(8, 5))
    RandomState().save(tmp_path / "state.json")
    there = Gpus(2, 0)
    monkeypatch.setattr(torch, "cuda", there)
    RandomState.load(tmp_path / "state.json").restore()
    assert [int(state[0]) for state in there.states] == [50, 10]
    # An earlier version saved the states of all eight.
    record = json.loads((tmp_path / "state.json").read_text())
    record["cuda"] = [bytes([place] * 16).hex() for place in range(8)]
    (tmp_path / "state.json").write_text(json.dumps(record))
    for mine, wanted in ((1, [0, 1]), (0, [0, 10])):
        there = Gpus(2, mine)
        monkeypatch.setattr(torch, "cuda", there)
        RandomState.load(tmp_path / "state.json").restore()
        assert [int(state[0]) for state in there.states] == wanted
    there = Gpus(1, 0)  # all that rank 3 of its machine sees
    monkeypatch.setattr(torch, "cuda", there)
    monkeypatch.setenv("LOCAL_RANK", "3")
    RandomState.load(tmp_path / "state.json").restore()
    assert int(there.states[0][0]) == 3
    there = Gpus(9, 8)
    monkeypatch.setattr(torch, "cuda", there)
    RandomState.load(tmp_path / "state.json").restore()
    assert int(there.states[8][0]) == 80  # none was saved for it


@pytest.mark.parametrize(
    "change",
    [{"python": [3, [1, 2], None]}, {"python": None}, {"numpy": ["MT19937", [-1], 0, 0, 0.0]}, {"torch": "abc"},
     {"torch": "00"}, {"torch": 7}, {"numpy": [2**80, [], 0, 0, 0.0]}],
)  # fmt: skip
def test_what_is_no_state_is_refused_and_changes_nothing(tmp_path: Path, change: dict[str, object]) -> None:
    path = tmp_path / "state.json"
    RandomState().save(path)
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    before = random.getstate()
    with pytest.raises(ConfigError, match="state.json does not hold the states of random generators"):
        RandomState.load(path).restore()
    assert random.getstate() == before
    for text in (b"", b"[]", b"\xff"):
        path.write_bytes(text)
        with pytest.raises(ConfigError):
            RandomState.load(path)


def test_states_hold_no_pickle_of_generators_and_those_of_earlier_versions_resume(
    workspace: Path, tmp_path: Path
) -> None:
    """With dropout, so that the weights depend on the generators."""
    fields = ("--model", str(workspace / "dropout"), "--max-train-steps", "4", "--checkpointing-steps", "2")

    def run(name: str, *more: str) -> None:
        argv = [str(workspace / "recipe.yaml"), "--output-dir", str(tmp_path / name), *fields, *more]
        assert finetune.main(argv) == 0

    run("whole")
    for name in ("new", "old"):
        run(name, "--stop-after", "2")
        state = tmp_path / name / "checkpoints" / "step-000002"
        assert (state / "random-state-0.json").is_file() and not list(state.glob("*.pkl"))
        if name == "old":
            saved = RandomState.load(state / "random-state-0.json")
            (state / "random-state-0.json").unlink()
            facts = {key: value for key, value in read_facts(state, "state").items() if key not in ("seal", "files")}
            (state / NAME).write_text(json.dumps(facts))
            saved.restore()
            (state / "pickle").mkdir()
            save_accelerator_state(state / "pickle", [], [], [], [], 0, 0)
            (state / "pickle" / "random_states_0.pkl").rename(state / "random_states_0.pkl")
            (state / "pickle").rmdir()
        run(name)
        assert same(log(tmp_path / name)) == same(log(tmp_path / "whole"))
        assert all(torch.equal(one, weights(tmp_path / "whole")[key]) for key, one in weights(tmp_path / name).items())
