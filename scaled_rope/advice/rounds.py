"""Successive halving under a budget: many candidates on little text, the best few on more.

0. DPE's probe, where there is time for it, which makes one candidate more.
1. Every candidate, the likeliest first, as many as half of the time can pay for one unit each: a window of text, and a
   prompt of each length beyond L.
2. The better two fifths, on other windows and prompts, where there is time for it; beside the best three of them that
   have no attention factor, the same with attention temperatures.
3. The best three, the static form of one that follows the length (which costs little more), where servers can be told
   none of these the best that they can, the model as it is and the control, on the windows and prompts that have chosen
   nothing: these results are the ones that count. At least three units, then more as long as there is time.

A round goes unit by unit through all its candidates, so they are compared on the same windows and prompts whenever it
ends. "Best" are those with the lowest loss beyond L and those with the best retrieval, in turn.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from scaled_rope.advice.candidates import Candidate, sharper
from scaled_rope.advice.probing import NAME, Probing
from scaled_rope.advice.trials import Budget, Measured, OutOfTime, Trials, Unit, refused
from scaled_rope.errors import ConfigError
from scaled_rope.evaluation.passkey_prompts import PasskeyPrompt
from scaled_rope.flags.search import LEAST_TRIALS
from scaled_rope.progress import duration
from scaled_rope.results import Row
from scaled_rope.tuning.constants import best_of
from scaled_rope.tuning.measurement import ScoredWindow

FINALISTS = 3
"""Candidates of the last round, beside the model as it is."""
SCREENED, FINAL = 12, 48
"""The most units of a round that screens, and of the last one."""
PROMPTS = 2 * SCREENED + FINAL
"""Prompts of each length, enough for all rounds."""
_METRIC = "advice_round"
_ROUNDS = ("first round", "second round", "last round")


@dataclass(frozen=True)
class Material:
    """The windows and prompts of the three rounds; no round reads those of another."""

    windows: tuple[Sequence[ScoredWindow], Sequence[ScoredWindow], Sequence[ScoredWindow]]
    prompts: Mapping[int, Sequence[PasskeyPrompt]]
    """`PROMPTS` by length; empty where retrieval is left out."""

    @classmethod
    def of(cls, windows: Sequence[ScoredWindow], prompts: Mapping[int, Sequence[PasskeyPrompt]]) -> Material:
        """A quarter of the windows for each round that screens, the others, three at least, for the last one.

        windows: more than `LEAST_TRIALS`.
        """
        quarter, most = len(windows) // 4, len(windows) - LEAST_TRIALS
        first = max(1, min(quarter, most))
        second = first + max(0, min(quarter, most - first))
        return cls((windows[:first], windows[first:second], windows[second:]), prompts)

    def units(self, number: int, lengths: Sequence[int]) -> list[Unit]:
        """The units of a round, 0 to 2, each with prompts of these lengths; after its windows they are prompts only."""
        most = FINAL if number == 2 else SCREENED
        windows = self.windows[number][:most]
        count = most if self.prompts else len(windows)
        start = number * SCREENED
        return [
            Unit(
                windows[index] if index < len(windows) else None,
                {length: self.prompts[length][start + index] for length in lengths if self.prompts},
            )
            for index in range(count)
        ]


@dataclass
class Outcome:
    """The findings of the rounds.

    Attributes:
        baseline: the model as it is, in the last round.
        control: the control of its windows.
        finalists: the best candidates, in the last round.
        screened: all others that were measured, with their last measurements, the best last.
        left_out: spec -> why it was not measured, or not to the end.
        rounds: candidates and units of each round.
        probe: the result of DPE's probe, None without one.
    """

    baseline: Measured
    control: Measured
    finalists: list[Measured]
    screened: list[Measured] = field(default_factory=list)
    left_out: dict[str, str] = field(default_factory=dict)
    rounds: list[Row] = field(default_factory=list)
    probe: Row | None = None


@dataclass(eq=False)
class Halving:
    """The rounds.

    Attributes:
        trials: measures.
        baseline: the model as it is.
        candidates: in their order.
        material: windows and prompts.
        question: what was asked, as rows of rounds have it in their protocol: another question, other rounds.
        say: is told what begins, how many seconds it is expected to go on, and whether nothing comes after it.
        probing: DPE's probe; None: none.
        temperatures: whether candidates are tried with attention temperatures too.
        left_out: spec -> why it is not measured, as far as that is known before.
    """

    trials: Trials
    baseline: Candidate
    candidates: Sequence[Candidate]
    material: Material
    question: Row
    say: Callable[[str, float, bool], Any] = lambda title, seconds, last: None
    probing: Probing | None = None
    temperatures: bool = False
    left_out: dict[str, str] = field(default_factory=dict)
    _courses: list[Row] = field(default_factory=list)
    _orders: list[list[Candidate]] = field(default_factory=list)
    """The candidates that each screening round has measured, best first."""
    _probe: Row | None = None

    @property
    def budget(self) -> Budget:
        return self.trials.store.budget

    # Costs.

    def _unit_cost(self, candidates: Sequence[Candidate], unit: Unit, last: bool, taken: set[str]) -> float:
        total = 0.0
        if last:
            total += self.trials.cost(self.baseline, unit, True, taken) + self.trials.control_cost(unit, taken)
        return total + sum(self.trials.cost(one, unit, last, taken) for one in candidates)

    def _last_cost(self, candidates: Sequence[Candidate]) -> float:
        """Seconds of the least last round with these candidates."""
        taken: set[str] = set()
        units = self._units(2)[:LEAST_TRIALS]
        return sum(self._unit_cost(candidates, unit, True, taken) for unit in units)

    def _units(self, number: int) -> list[Unit]:
        ends = self.trials.ends
        return self.material.units(number, ends if number == 2 else ends[1:])

    # Rounds.

    def run(self) -> Outcome:
        """Go through the rounds.

        Raises:
            ConfigError: the time is not enough for one candidate, none can be measured, or the time ended before the
                last round had its least units.
        """
        need = self._last_cost(self.candidates[:1])
        if need > self.budget.left and not self._known(2):
            raise ConfigError(self._too_little(need))
        screened: dict[str, Measured] = {}
        self._find_groups()
        alive = list(self.candidates)
        for number in (0, 1):
            if number == 1 and screened and self.material.windows[1]:
                alive = self._with_temperatures(alive)
            alive = self._screen(number, alive, screened)
            if not alive:
                raise ConfigError(f"no candidate can be measured: {'; '.join(dict.fromkeys(self.left_out.values()))}")
        return self._finish(alive, screened)

    def _find_groups(self) -> None:
        """Let DPE's probe add a candidate, or note why there is none."""
        if self.probing is None:
            return
        probing, cell = self.probing, self._cell("probe")
        known = self.trials.store.find(cell)
        self.trials.passes.add([probing.reference.scaling])
        if known is None:
            unit, count = self._units(0)[0], len(self.candidates) + 1
            candidates = [*self.candidates, probing.reference]

            def affords(seconds: float) -> bool:
                return len(self._affordable(0, candidates, unit, self.budget.left - seconds)[0]) == count

            reason = probing.begins(self.trials, affords)
            if reason is None:
                known = probing.run(self.trials, lambda title, seconds: self.say(title, seconds, False))
            else:
                known = {"passes": 0, "left_out": reason}
            self.trials.store.keep({**cell, **known})
        else:
            probing.repeat(self.trials, known)
        if "left_out" in known:
            self.left_out[NAME] = known["left_out"]
            return
        fields = ("groups", "window", "prompts", "effective_lengths", "reference", "scores")
        self._probe, one = {name: known[name] for name in fields}, probing.candidate(tuple(known["groups"]))
        if one.spec not in [other.spec for other in self.candidates]:
            self._add([one])

    def _with_temperatures(self, alive: list[Candidate]) -> list[Candidate]:
        """The candidates, and then the best of those that have no attention factor with attention temperatures."""
        if not self.temperatures:
            return alive
        found = [some for one in alive if (some := sharper(one, self.trials.target))][:FINALISTS]
        new = [one for some in found for one in some if one.scaling not in [other.scaling for other in self.candidates]]
        self._add(new)
        return [*alive, *new]

    def _add(self, candidates: Sequence[Candidate]) -> None:
        """Take up further candidates."""
        self.candidates = [*self.candidates, *candidates]
        self.trials.passes.add([one.scaling for one in candidates])

    def _too_little(self, need: float) -> str:
        whole = need + self.budget.spent + self.budget.reserve
        minutes = -(-whole * 1.25 // 60)  # with room for passes that take longer than estimated
        return (
            f"--minutes {self.budget.seconds / 60:g} is not enough for one candidate: {LEAST_TRIALS} windows of "
            f"{self.trials.target} tokens, their control and their prompts take about {duration(need)} here; "
            f"--minutes {minutes:.0f} or a smaller --target"
        )

    def _screen(self, number: int, alive: list[Candidate], screened: dict[str, Measured]) -> list[Candidate]:
        """Measure candidates on the units of a round that screens; return those for the next one, best first."""
        units = self._units(number)
        wanted = -(-2 * len(alive) // 5) if number == 0 and len(alive) > 2 * FINALISTS else FINALISTS
        known = self._known(number)
        share: float | None = None
        if known is not None:
            chosen = [one for one in alive if one.spec in known["candidates"]]
            units = units[: known["units"]]
            self.left_out.update(known["left_out"])
        elif len(alive) <= FINALISTS or not self.material.windows[number]:
            chosen, units = alive, []
        else:
            chosen, share = self._affordable(number, alive, units[0])
            if len(chosen) < 2:  # the last round takes as many as it has time for
                chosen, units = alive, []
        for one in alive:
            if one not in chosen and one.spec not in screened:
                self.left_out.setdefault(one.spec, "not measured, for lack of time")
        measured, count = self._measure(number, chosen, units, share, last=False)
        self._keep(number, chosen, count)
        if count == 0:
            return chosen
        screened.update({one.candidate.spec: one for one in measured})
        self._orders.append([one.candidate for one in best_of(measured, len(measured))])
        return self._orders[-1][:wanted]

    def _affordable(
        self, number: int, alive: list[Candidate], unit: Unit, left: float | None = None
    ) -> tuple[list[Candidate], float]:
        """The first candidates that the round's share of the time can pay one unit each for, and that share.

        left: the seconds that there are; None: those of the budget.
        """
        kept, left = self._last_cost(self._dearest(alive)), self.budget.left if left is None else left
        share = min(left / 2, left - kept)
        if number == 0:  # half of it for the second, if the first can be paid with the other half
            if self._unit_cost(alive, unit, False, set()) <= share / 2:
                share /= 2
        chosen: list[Candidate] = []
        taken, total = set[str](), 0.0
        for one in alive:
            total += self.trials.cost(one, unit, False, taken)
            if total > share:
                break
            chosen.append(one)
        return chosen, share

    def _dearest(self, alive: Sequence[Candidate]) -> list[Candidate]:
        """As many candidates as the last round has, those that would take longest."""
        unit = self._units(2)[0]
        return sorted(alive, key=lambda one: -self.trials.cost(one, unit, True, set()))[:FINALISTS]

    def _finish(self, alive: list[Candidate], screened: dict[str, Measured]) -> Outcome:
        """The last round."""
        known = self._known(2)
        if known is not None:
            by_spec = {one.spec: one for one in self.candidates}
            chosen = [by_spec[spec] for spec in known["candidates"]]
            units = self._units(2)[: known["units"]]
            self.left_out.update(known["left_out"])
        else:
            chosen = alive[:FINALISTS]
            while len(chosen) > 1 and self._last_cost(self._with_static(chosen)) > self.budget.left:
                chosen = chosen[:-1]
            chosen = self._with_static(chosen)
            units = self._units(2)
        for one in alive:
            if one not in chosen and one.spec not in screened:
                self.left_out.setdefault(one.spec, "not measured, for lack of time")
        baseline, control = (self.trials.nothing_yet(self.baseline) for _ in range(2))
        measured, count = self._measure(2, chosen, units, None, True, baseline, control)
        if not measured:  # more time would not help
            reasons = dict.fromkeys(self.left_out[one.spec] for one in chosen)
            raise ConfigError(f"no candidate can be measured: {'; '.join(reasons)}")
        if count < min(LEAST_TRIALS, len(units)):
            raise ConfigError(
                f"--minutes {self.budget.seconds / 60:g} ended in the last round, after {count} of its "
                f"{LEAST_TRIALS} least units; run it again with more minutes: what is measured is kept"
            )
        self._keep(2, chosen, count)
        specs = {one.candidate.spec for one in measured}
        others = [one for spec, one in screened.items() if spec not in specs]
        return Outcome(baseline, control, measured, others, self.left_out, self._courses, self._probe)

    def _with_static(self, chosen: Sequence[Candidate]) -> list[Candidate]:
        """Finalists, and for each that follows the length the static form that computes the same at the target.

        Servers know static forms only, and what is measured at the target is the same pass. Where servers can be told
        none of these, the best that they can joins them, from the last round that had one.
        """
        target, at = self.trials.target, self.trials.passes.at
        followed = [at(one.scaling, target) for one in chosen if one.scaling.is_length_dependent]
        static = [one for one in self.candidates if at(one.scaling, target) in followed and one not in chosen]
        static = [one for one in static if not one.scaling.is_length_dependent and one.spec not in self.left_out]
        found = [*chosen, *static]
        if not any(one.of_tables for one in found):
            ranked = (one for order in reversed(self._orders) for one in order)
            found += [one for one in ranked if one.of_tables and one.spec not in self.left_out][:1]
        return found

    def _measure(
        self,
        number: int,
        chosen: Sequence[Candidate],
        units: Sequence[Unit],
        share: float | None,
        last: bool,
        baseline: Measured | None = None,
        control: Measured | None = None,
    ) -> tuple[list[Measured], int]:
        """Measure candidates unit by unit; return what is known of those that could be read, and the number of units.

        share: seconds that the round may take; None: all that are left.
        """
        found = {one.spec: self.trials.nothing_yet(one) for one in chosen if one.spec not in self.left_out}
        end = None if share is None else self.budget.spent + share
        done = 0
        for index, unit in enumerate(units):
            candidates = [one.candidate for one in found.values()]
            expected = self._unit_cost(candidates, unit, last, set())
            if expected > max(0.0, self.budget.left) or (
                end is not None and index and self.budget.spent + expected > end
            ):
                break
            self.say(
                f"{_ROUNDS[number]}, {len(found)} candidates", self._plan(found, units[index:], last, end), number == 2
            )
            pieces: dict[str, Measured] = {}
            try:
                if baseline is not None and control is not None:
                    first, second = self.trials.nothing_yet(self.baseline), self.trials.nothing_yet(self.baseline)
                    self.trials.measure(self.baseline, unit, True, first)
                    self.trials.measure_control(unit, second)
                for spec, one in list(found.items()):
                    pieces[spec] = self.trials.nothing_yet(one.candidate)
                    try:
                        self.trials.measure(one.candidate, unit, last, pieces[spec])
                    except OutOfTime:
                        raise
                    except Exception as error:
                        reason = refused(error)
                        if reason is None:
                            raise
                        self.left_out[spec] = reason
                        del found[spec], pieces[spec]
            except OutOfTime:  # a pass took longer than estimated; the unit counts for none
                break
            if baseline is not None and control is not None:
                baseline.add(first)
                control.add(second)
            for spec, piece in pieces.items():
                found[spec].add(piece)
            done = index + 1
            if not found:
                break
        return list(found.values()), done

    def _plan(self, found: Mapping[str, Measured], units: Sequence[Unit], last: bool, end: float | None) -> float:
        """Seconds that this round is expected to go on."""
        total, taken = 0.0, set[str]()
        most = self.budget.left if end is None else min(self.budget.left, end - self.budget.spent)
        for unit in units:
            cost = self._unit_cost([one.candidate for one in found.values()], unit, last, taken)
            if total and total + cost > most:
                break
            total += cost
        return total

    # The course of the rounds, as rows.

    def _cell(self, number: int | str) -> Row:
        return {
            "metric": _METRIC,
            **self.trials.identity,
            "protocol": {"name": "halving", "round": number, **self.question},
            "length": self.trials.target,
        }

    def _known(self, number: int) -> Row | None:
        return self.trials.store.find(self._cell(number))

    def _keep(self, number: int, chosen: Sequence[Candidate], count: int) -> None:
        course = {"candidates": [one.spec for one in chosen], "units": count, "left_out": dict(self.left_out)}
        self._courses.append(course)
        if self._known(number) is None:
            self.trials.store.keep({**self._cell(number), **course})
