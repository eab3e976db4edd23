"""The common part of plain and hard passkeys, on prompts of a kind made here."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from scaled_rope import RopeScaling
from scaled_rope.evaluation.jobs import ModelJob
from scaled_rope.evaluation.passkey_prompts import PasskeyPrompt
from scaled_rope.evaluation.passkey_trials import PasskeyTrials
from scaled_rope.evaluation.statistics import wilson_interval
from scaled_rope.results import Row

JOB = ModelJob("some/model", "yarn:4", RopeScaling("yarn", 4.0, 64), False, 16, "float32", "f")


@dataclass(eq=False, kw_only=True)
class EvenKeys(PasskeyTrials[PasskeyPrompt]):
    """Finds keys that are even."""

    made_for: list[str]

    metric = "even"
    text = "numbers"

    def make(self, model: str) -> dict[int, list[PasskeyPrompt]]:
        self.made_for.append(model)
        return {
            length: [
                PasskeyPrompt([1] * (length - 1), [key], key, 0.5, length, length) for key in range(self.iterations)
            ]
            for length in self.lengths
        }

    def protocol(self, job: ModelJob) -> Row:
        return {"label": job.label}

    def ask(
        self, model: Any, job: ModelJob, prompts: Sequence[PasskeyPrompt], advance: Callable[[int], object]
    ) -> list[Row]:
        for prompt in prompts:
            advance(prompt.length)
        return [{"key": prompt.key, "right": prompt.key % 2 == 0} for prompt in prompts]


def make() -> EvenKeys:
    return EvenKeys(lengths=[3, 4], iterations=3, seed=1, rows_per_pass=lambda length: 1, made_for=[])


def test_cells_name_the_prompts() -> None:
    evaluator = make()
    cells = evaluator.cells(JOB)
    assert list(cells) == [3, 4] and evaluator.made_for == ["some/model"]
    # The fingerprint is part of a row's identity, so it has to stay what it was.
    digest = hashlib.sha256(b"[[1, 1, 0], [1, 1, 1], [1, 1, 2]]").hexdigest()[:16]
    assert cells[3] == {
        "metric": "even",
        "data": {"name": "numbers", "fingerprint": digest},
        "protocol": {"label": "yarn x4"},
    }
    assert evaluator.passes(JOB, [3, 4]) == {3: [3], 4: [4]} and evaluator.tokens(JOB, 4) == 12


def test_outcomes_are_tallied() -> None:
    evaluator = make()
    read: list[int] = []
    ((length, row),) = evaluator.measure(None, JOB, 4, [4], read.append)
    assert length == 4 and read == [4, 4, 4] and evaluator.made_for == ["some/model"]
    assert row == {
        "n": 3,
        "right": 2,
        "accuracy": 2 / 3,
        "interval": wilson_interval(2, 3),
        "prompts": [{"key": 0, "right": True}, {"key": 1, "right": False}, {"key": 2, "right": True}],
    }
