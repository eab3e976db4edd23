"""DPE's probe within the budget: facts at the target length, asked under each grouping, and what comes of it."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from scaled_rope.advice.candidates import Candidate
from scaled_rope.advice.trials import Budget, OutOfTime, Trials, refused
from scaled_rope.evaluation.passkey_prompts import PasskeyPrompt
from scaled_rope.progress import duration
from scaled_rope.results import Row
from scaled_rope.scaling.record import RopeScaling
from scaled_rope.tuning.dimension_groups import Grouping, GroupProbe

SHARE = 8
"""The budget over the most that the probe may take."""
LEAST_PROMPTS, MOST_PROMPTS = 2, 8
"""Prompts that each grouping is asked. No round asks them."""
NAME = "dpe"


@dataclass(frozen=True)
class Probing:
    """The questions of the probe: all groupings, prompt by prompt, as long as there is time.

    A grouping's score is the mean probability of a token of the right answers. The paper's code counts answers instead,
    of which few prompts make too few steps.
    """

    probe: GroupProbe
    own: RopeScaling
    """The scaling that the checkpoint carries."""
    prompts: Sequence[PasskeyPrompt]
    """`MOST_PROMPTS`, of the target length."""

    def candidate(self, grouping: Grouping) -> Candidate:
        spec = self.probe.spec(grouping)
        return Candidate(spec, RopeScaling.from_spec(spec, self.own))

    @property
    def reference(self) -> Candidate:
        """The candidate in which no group is probed; its passes take as long as all others."""
        return self.candidate(self.probe.groupings()[0])

    def most_seconds(self, budget: Budget) -> float:
        """The share of the time that the probe may take."""
        return budget.seconds / SHARE

    def begins(self, trials: Trials, affords: Callable[[float], bool]) -> str | None:
        """Why there is no time for the least probe; None where there is.

        affords: whether all else that is to be measured can still be paid when so many seconds are taken away.
        """
        length, passes = self.prompts[0].length, LEAST_PROMPTS * len(self.probe.groupings())
        # Passes that are known count as others do, so that a run which is continued decides as it did.
        needs = passes * trials.costs.of(self.reference.scaling, length)
        if needs <= self.most_seconds(trials.store.budget) and affords(self.most_seconds(trials.store.budget)):
            return None
        minutes = trials.store.budget.seconds / 60
        return (
            f"its probe of {passes} passes over {length} tokens takes about {duration(needs)} here: 1/{SHARE} of "
            f"--minutes {minutes:g} does not pay it beside the other candidates"
        )

    def run(self, trials: Trials, say: Callable[[str, float], Any]) -> Row:
        """Ask, and choose.

        say: is told what begins, and how many seconds it may take.

        Returns:
            "passes", their number; "groups", "window", "prompts", "effective_lengths", "reference" and "scores", or
            "left_out", the reason.
        """
        groupings = self.probe.groupings()
        scalings = [self.candidate(one).scaling for one in groupings]
        budget = trials.store.budget
        end = budget.spent + self.most_seconds(budget)
        table: list[list[float]] = []
        passes = 0
        for index, prompt in enumerate(self.prompts):
            if budget.spent + trials.answer_cost(scalings, prompt) > end:
                break
            say(f"probe of DPE, prompt {index + 1}, {len(groupings)} groupings", max(0.0, end - budget.spent))
            asked: list[float] = []
            try:
                for one in scalings:
                    if budget.spent + trials.answer_cost([one], prompt) > end:
                        raise OutOfTime  # passes take longer than was expected
                    asked.append(trials.answer(one, prompt, NAME).probability)
                    passes += 1
            except OutOfTime:
                break
            except Exception as error:
                reason = refused(error)
                if reason is None:
                    raise
                return {"passes": passes, "left_out": reason}
            table.append(asked)
        if len(table) < LEAST_PROMPTS:
            return {"passes": passes, "left_out": f"the time for its probe ended before {LEAST_PROMPTS} prompts"}
        means = dict(zip(groupings, np.mean(table, axis=0).tolist(), strict=True))
        chosen, target = self.probe.choose(means), self.prompts[0].length
        if set(chosen) == {1}:
            return {"passes": passes, "left_out": "its probe found g = 1 best for every group, the model as it is"}
        return {
            "passes": passes,
            "groups": list(chosen),
            "window": self.probe.window,
            "prompts": len(table),
            "effective_lengths": [self.probe.effective_length(size, target) for size in chosen],
            "reference": self.probe.reference,
            "scores": [
                {str(size): round(means[self.probe.with_size(group, size)], 6) for size in self.probe.sizes}
                for group in range(self.probe.groups)
            ],
        }

    def repeat(self, trials: Trials, known: Row) -> None:
        """Count what an earlier run of the same probe asked, whose result `known` is, as if it were asked now."""
        scalings = [self.candidate(one).scaling for one in self.probe.groupings()]
        asked = itertools.product(self.prompts, scalings)
        for prompt, scaling in itertools.islice(asked, known["passes"]):
            trials.answer(scaling, prompt, NAME)
