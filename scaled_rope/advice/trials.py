"""Measure candidates on units of text and prompts: each pass once, timed, its row kept."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any, TypeVar

import numpy as np

from scaled_rope.advice.candidates import Candidate, Passes
from scaled_rope.errors import ConfigError
from scaled_rope.evaluation.controls import CONTROL, Control
from scaled_rope.evaluation.jobs import ModelJob, ModelLoader
from scaled_rope.evaluation.memory_meter import is_out_of_memory, release_memory
from scaled_rope.evaluation.passkey_prompts import PasskeyPrompt
from scaled_rope.evaluation.perplexity_evaluator import score_windows
from scaled_rope.evaluation.windows import Document, Texts, batches, recent
from scaled_rope.results import Row, append_row, row_key
from scaled_rope.scaling.record import RopeScaling
from scaled_rope.tuning.curves import Floats, segment_bounds
from scaled_rope.tuning.measurement import (
    Answer,
    Answers,
    Ask,
    RowStore,
    Score,
    ScoredWindow,
    ScoreUnder,
    Sweep,
    Tokens,
)

Clock = Callable[[], float]
"""Seconds, as `time.monotonic` counts."""
ControlScore = Callable[[Tokens], Any]
"""Nats of tokens 1 … n-1 of a window of n tokens, each read after the last few only."""
Found = TypeVar("Found")


class OutOfTime(Exception):
    """The next pass would not fit into the budget."""


# -------------------------------------------------------------------------------------------------------------- budget


@dataclass
class Budget:
    """The time that there is, and how much of it is spent.

    What earlier runs into the same folder have measured counts with the time that it took then, so that a run which is
    continued, or repeated, comes to the same decisions as one that was never interrupted.
    """

    seconds: float
    clock: Clock
    began: float = field(init=False)
    replayed: float = 0.0
    """Seconds of measurements that were made by earlier runs and used by this one."""
    reserve: float = 0.0
    """Seconds that are kept for what comes after the measurements."""

    def __post_init__(self) -> None:
        self.began = self.clock()

    @property
    def elapsed(self) -> float:
        """Seconds of this run."""
        return self.clock() - self.began

    @property
    def spent(self) -> float:
        """Seconds, those of earlier runs included."""
        return self.elapsed + self.replayed

    @property
    def left(self) -> float:
        """Seconds that measurements may still take."""
        return self.seconds - self.reserve - self.spent


class TimedStore(RowStore):
    """A store whose rows say how many seconds they took; rows of earlier runs are charged to the budget once.

    "seconds" are those of the whole measurement; "pass_seconds", where `timed_pass` made it, those of the pass alone.
    """

    def __init__(self, *args: Any, budget: Budget) -> None:
        super().__init__(*args)
        self.budget = budget
        self._charged: set[str] = set()
        self._pass_seconds: float | None = None

    def timed_pass(self, run: Callable[[], Found]) -> Found:
        """The result of `run`; the row that is being measured says how long it took."""
        begin = self.budget.clock()
        found = run()
        self._pass_seconds = round(self.budget.clock() - begin, 4)
        return found

    def get(self, cell: Row, title: str, measure: Callable[[], Row]) -> Row:
        key, known = row_key(cell), self.find(cell)
        if known is not None and key not in self._charged:
            self.budget.replayed += known.get("seconds", 0.0)
        self._charged.add(key)

        def timed() -> Row:
            self._pass_seconds = None
            begin = self.budget.clock()
            row = measure()
            seconds = {"seconds": round(self.budget.clock() - begin, 4)}
            return {**row, **seconds} | ({} if self._pass_seconds is None else {"pass_seconds": self._pass_seconds})

        return super().get(cell, title, timed)

    def holds(self, key: str) -> bool:
        """Whether there is a row with this key."""
        return key in self._rows

    def keep(self, row: Row) -> None:
        """Append a row that was not measured, such as the course of a round, for `find`."""
        append_row(self.path, {**row, "provenance": self._record}, once=True)
        self._rows[row_key(row)] = row


# --------------------------------------------------------------------------------------------------------------- costs


class Costs:
    """Seconds that a pass will take: as measured, or estimated from what is nearest to it.

    Frequencies cost nothing, so all scalings of frequencies take the time of the plain model; methods that change
    attention each have their own.
    """

    GUESS = 2.0
    """Assumed time of a method that changes attention, over the plain model's, before it was measured."""

    def __init__(self, plain: Callable[[int], float]) -> None:
        """plain: seconds of a plain pass over so many tokens, estimated from timed ones."""
        self._plain = plain
        self._measured: dict[tuple[str, int], list[float]] = {}

    @staticmethod
    def _kind(scaling: RopeScaling | None) -> str:
        """ "control" for None; the method where it changes attention; else the same for all."""
        return "control" if scaling is None else scaling.method if scaling.changes_attention else ""

    def add(self, scaling: RopeScaling | None, length: int, seconds: float) -> None:
        """Note the time of a measured pass; scaling None: of the control of a window."""
        self._measured.setdefault((self._kind(scaling), length), []).append(seconds)

    def of(self, scaling: RopeScaling, length: int) -> float:
        """Seconds of a pass over so many tokens."""
        kind = self._kind(scaling)
        if (kind, length) in self._measured:
            return median(self._measured[kind, length])
        known = {at: median(took) for (name, at), took in self._measured.items() if name == kind}
        if known:  # the nearest length tells how far the estimate is off
            nearest = min(known, key=lambda at: abs(np.log(at / length)))
            return known[nearest] * self._plain(length) / self._plain(nearest)
        plain = {at: median(took) for (name, at), took in self._measured.items() if not name}
        if kind and plain:
            nearest = min(plain, key=lambda at: abs(np.log(at / length)))
            return self.GUESS * plain[nearest] * self._plain(length) / self._plain(nearest)
        return self._plain(length) * (self.GUESS if kind else 1.0)

    def of_control(self, control: Control, length: int) -> float:
        """Seconds of the control of a window of so many tokens."""
        if ("control", length) in self._measured:
            return median(self._measured["control", length])
        pieces = 1 + max(0, -(-(length - control.window) // control.stride))
        return pieces * self._plain(control.window)


# ------------------------------------------------------------------------------------------------------------- measured


@dataclass
class Measured:
    """A candidate on some units.

    Attributes:
        candidate: the candidate.
        nats, windows: per window, nats per token of each segment [segments]; NaN where a segment was not asked for.
        answers: by length of the prompts.
        seconds: of each pass over a whole window, without what bringing the scaling into the model takes.
    """

    candidate: Candidate
    weights: Floats
    """Targets of each segment."""
    first: int
    """The first segment beyond L."""
    nats: list[Floats] = field(default_factory=list)
    windows: list[ScoredWindow] = field(default_factory=list)
    answers: dict[int, list[Answer]] = field(default_factory=dict)
    prompts: dict[int, list[PasskeyPrompt]] = field(default_factory=dict)
    seconds: list[float] = field(default_factory=list)

    def add(self, other: Measured) -> None:
        """Take up what was measured on further units."""
        self.nats += other.nats
        self.windows += other.windows
        self.seconds += other.seconds
        for length in other.answers:
            self.answers.setdefault(length, []).extend(other.answers[length])
            self.prompts.setdefault(length, []).extend(other.prompts[length])

    @property
    def beyond(self) -> Floats:
        """Nats per token beyond L of each window."""
        table, weights = np.asarray(self.nats, dtype=np.float64), self.weights[self.first :]
        found: Floats = (table[:, self.first :] * weights).sum(axis=1) / weights.sum()
        return found

    @property
    def loss(self) -> float:
        """Nats per token beyond L."""
        return float(self.beyond.mean())

    @property
    def retrieval(self) -> float:
        """The mean over lengths of the mean probability of an answer's tokens; 0 where nothing was asked."""
        means = [np.mean([one.probability for one in some]) for some in self.answers.values() if some]
        return float(np.mean(means)) if means else 0.0


@dataclass(frozen=True)
class Unit:
    """A piece of the material: a window, a prompt of each length, or both."""

    window: ScoredWindow | None
    prompts: Mapping[int, PasskeyPrompt]


@dataclass(eq=False)
class Trials:
    """Measures candidates; every pass is a row of the store.

    Attributes:
        store: rows, with times.
        identity: a row's fields about model and text.
        own: the scaling that the checkpoint carries.
        passes: which static scaling stands for a candidate at a length.
        ends: ends of position buckets, the first is L, the last is the target; in tokens.
        segment: tokens of a segment, of which L is a multiple.
        control: its windows.
        score_under: brings a scaling into the model; gives what scores a window then, which alone is timed as a pass.
        ask, control_score: how the model is read otherwise.
        costs: what passes take.
        advance: is told what was measured.
    """

    store: TimedStore
    identity: Row
    own: RopeScaling
    passes: Passes
    ends: Sequence[int]
    segment: int
    control: Control
    score_under: ScoreUnder
    ask: Ask
    control_score: ControlScore
    costs: Costs
    advance: Callable[[str], None] = lambda title: None
    _keys: dict[tuple[RopeScaling | None, int, int], str] = field(default_factory=dict, init=False, repr=False)
    """By scaling, item and length; items live as long as the material does."""

    @property
    def target(self) -> int:
        """The longest length, in tokens."""
        return self.ends[-1]

    def nothing_yet(self, candidate: Candidate) -> Measured:
        """The empty record of a candidate."""
        bounds = segment_bounds(self.target, self.segment)
        targets = np.asarray([end - max(first, 1) for first, end in bounds], dtype=np.float64)
        return Measured(candidate, targets, self.ends[0] // self.segment)

    # What a unit needs.

    def _windows(self, candidate: Candidate, within: bool) -> dict[RopeScaling, tuple[int, list[int]]]:
        """Static scaling -> length of its pass over a window, and the ends of the buckets that are taken from it.

        within: whether the bucket up to L is among them.
        """
        found: dict[RopeScaling, tuple[int, list[int]]] = {}
        for end in self.ends if within else self.ends[1:]:
            stands = self.passes.at(candidate.scaling, end)
            _, ends = found.setdefault(stands, (self.passes.longest(stands), []))
            ends.append(end)
        return found

    def cost(self, candidate: Candidate, unit: Unit, within: bool, taken: set[str]) -> float:
        """Seconds that measuring a candidate on a unit is expected to take; known rows take none.

        taken: keys of rows that count as known already; those of this step are added.
        """
        total = 0.0
        if unit.window is not None:
            for scaling, (length, _) in self._windows(candidate, within).items():
                key = self._key(scaling, unit.window, length)
                total += self._unknown(key, taken, self.costs.of(scaling, length))
        for length, prompt in unit.prompts.items():
            scaling = self.passes.at(candidate.scaling, length)
            total += self._unknown(self._key(scaling, prompt, length), taken, self.costs.of(scaling, length))
        return total

    def control_cost(self, unit: Unit, taken: set[str]) -> float:
        """Seconds of the control of a unit."""
        if unit.window is None:
            return 0.0
        seconds = self.costs.of_control(self.control, self.target)
        return self._unknown(self._key(None, unit.window, self.target), taken, seconds)

    def _key(self, scaling: RopeScaling | None, item: ScoredWindow | PasskeyPrompt, length: int) -> str:
        """The key of a row; scaling None: of the control."""
        place = scaling, id(item), length
        if place not in self._keys:
            if isinstance(item, PasskeyPrompt):
                assert scaling is not None
                cells = self.answers.cells([scaling], [item])
            elif scaling is None:
                cells = self._control_sweep().cells([self._unscaled()], [item])
            else:
                cells = self._sweep(length).cells([scaling], [item])
            self._keys[place] = row_key(cells[0])
        return self._keys[place]

    def _unknown(self, key: str, taken: set[str], seconds: float) -> float:
        if self.store.holds(key) or key in taken:
            return 0.0
        taken.add(key)
        return seconds

    # Measuring.

    def measure(self, candidate: Candidate, unit: Unit, within: bool, into: Measured) -> None:
        """Measure a candidate on a unit.

        Raises:
            ConfigError: the model cannot be read under the candidate, or its losses are not finite.
            OutOfTime: it would not fit into the budget; `into` may then hold a part of the unit.
        """
        if unit.window is not None:
            nats = np.full(-(-self.target // self.segment), np.nan)
            for scaling, (length, ends) in self._windows(candidate, within).items():
                row = self._timed(self._sweep(length), scaling, unit.window, length)
                means = np.asarray(row["nll"]) / np.asarray(row["targets"])
                for end in ends:
                    before = ([0, *self.ends])[list(self.ends).index(end)]
                    part = slice(before // self.segment, -(-end // self.segment))
                    nats[part] = means[part]
                if length == self.target:
                    # Rows of earlier versions have only the time of the whole measurement.
                    into.seconds.append(row["pass_seconds"] if "pass_seconds" in row else row.get("seconds", 0.0))
            into.nats.append(nats)
            into.windows.append(unit.window)
        for length, prompt in unit.prompts.items():
            answer = self.answer(self.passes.at(candidate.scaling, length), prompt, candidate.spec)
            into.answers.setdefault(length, []).append(answer)
            into.prompts.setdefault(length, []).append(prompt)

    def answer(self, scaling: RopeScaling, prompt: PasskeyPrompt, title: str) -> Answer:
        """The answer to a prompt under a static scaling; title: what progress is told.

        Raises:
            ConfigError, OutOfTime: as `measure` does.
        """
        answers = self.answers
        (cell,) = answers.cells([scaling], [prompt])
        self._check(cell, self.costs.of(scaling, prompt.length))
        (answer,) = answers.measure(scaling, [prompt])
        self._note(cell, scaling, prompt.length, title)
        return answer

    def answer_cost(self, scalings: Sequence[RopeScaling], prompt: PasskeyPrompt) -> float:
        """Seconds that the answers to a prompt are expected to take; known rows take none."""
        taken = set[str]()
        return sum(
            self._unknown(self._key(one, prompt, prompt.length), taken, self.costs.of(one, prompt.length))
            for one in scalings
        )

    def measure_control(self, unit: Unit, into: Measured) -> None:
        """Measure the control of a unit."""
        if unit.window is None:
            return
        sweep = self._control_sweep()
        (cell,) = sweep.cells([self._unscaled()], [unit.window])
        self._check(cell, self.costs.of_control(self.control, self.target))
        means = sweep.measure([self._unscaled()], [unit.window])[0, 0]
        self._note(cell, None, self.target, "control")
        into.nats.append(means)
        into.windows.append(unit.window)

    def _timed(self, sweep: Sweep, scaling: RopeScaling, window: ScoredWindow, length: int) -> Row:
        (cell,) = sweep.cells([scaling], [window])
        self._check(cell, self.costs.of(scaling, length))
        sweep.measure([scaling], [window])
        return self._note(cell, scaling, length, scaling.label)

    def _check(self, cell: Row, seconds: float) -> None:
        """Raise `OutOfTime` for a pass that is not known and would not fit."""
        if self.store.find(cell) is None and seconds > self.store.budget.left:
            raise OutOfTime

    def _note(self, cell: Row, scaling: RopeScaling | None, length: int, title: str) -> Row:
        row = self.store.find(cell)
        assert row is not None  # just measured
        if "seconds" in row:
            self.costs.add(scaling, length, row["seconds"])
        self.advance(title)
        return row

    def _unscaled(self) -> RopeScaling:
        return self.passes.at(self.own, self.ends[0])

    def _sweep(self, length: int) -> Sweep:
        return Sweep(self.store, [], self.segment, self.identity, self._score_timed, length)

    def _score_timed(self, scaling: RopeScaling, tokens: Tokens) -> Any:
        score = self.score_under(scaling)
        return self.store.timed_pass(lambda: score(tokens))

    def _control_sweep(self) -> Sweep:
        protocol = {"name": CONTROL, **self.control.fields()}
        score: Score = lambda scaling, tokens: self.control_score(tokens)  # noqa: E731
        return Sweep(self.store, [], self.segment, self.identity, score, self.target, protocol)

    @property
    def answers(self) -> Answers:
        """The measurer that asks prompts."""
        return Answers(self.store, self.identity, self.ask)


def refused(error: Exception) -> str | None:
    """Why a candidate is left out after an error, in a line; None for an error that is not the candidate's."""
    if isinstance(error, ConfigError):
        return str(error)
    if is_out_of_memory(error):
        release_memory()
        return "out of memory"
    return None


def model_control(load: ModelLoader, job: ModelJob, control: Control, bos: int | None) -> ControlScore:
    """A `ControlScore` by forward passes of a model as it is, in windows of the control."""

    def score(tokens: Tokens) -> Any:
        body = tokens if bos is None else tokens[1:]
        texts = Texts([Document("", body)], bos)
        windows = recent(texts, len(tokens), control.window, control.stride)
        size = max(1, len(tokens) // control.window)  # as much at once as one pass over the whole
        model, found, limit = load(job), [], size
        for batch in batches(windows, lambda window: size):
            limit, scored = score_windows(model, texts, batch, limit)
            found += scored
        return np.concatenate(found)

    return score
