"""The fitness of a candidate of `scaled-rope search`, and the trace: a row per evaluation, which a rerun reads back."""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from scaled_rope.errors import ConfigError
from scaled_rope.evaluation.passkey_prompts import PasskeyPrompt
from scaled_rope.results import Row, append_row, rows_so_far
from scaled_rope.scaling.record import RopeScaling
from scaled_rope.tuning.measurement import Ask, Score, ScoredWindow
from scaled_rope.tuning.strategies import Proposal, Strategy

METRIC, SETTINGS = "search_evaluation", "search_settings"


@dataclass(frozen=True)
class Material:
    """Text and prompts that candidates are judged by."""

    windows: Sequence[ScoredWindow]
    prompts: Mapping[int, Sequence[PasskeyPrompt]]
    """By length in tokens."""

    @property
    def passes(self) -> int:
        """Forward passes of one candidate."""
        return len(self.windows) + sum(len(some) for some in self.prompts.values())

    @property
    def tokens(self) -> int:
        """Tokens that one candidate reads."""
        return sum(len(one.tokens) for one in self.windows) + sum(n * len(some) for n, some in self.prompts.items())

    def fingerprint(self) -> str:
        """A short hash of everything that is read."""
        digest = hashlib.sha256()
        for window in self.windows:
            digest.update(window.tokens.astype(np.int64).tobytes())
        for some in self.prompts.values():
            for one in some:
                digest.update(np.asarray(one.input_ids + one.answer_ids, dtype=np.int64).tobytes())
        return digest.hexdigest()[:16]


def choose_windows(windows: Sequence[ScoredWindow], count: int, seed: int) -> list[ScoredWindow]:
    """So many of the windows, drawn by seed; each document's in turn, so that few windows have many documents."""
    rng = np.random.default_rng(seed)
    by_document: dict[int, list[ScoredWindow]] = {}
    for index in rng.permutation(len(windows)):
        by_document.setdefault(windows[index].document, []).append(windows[index])
    turns, found = list(by_document.values()), list[ScoredWindow]()
    while turns and len(found) < count:
        found += [some.pop() for some in turns]
        turns = [some for some in turns if some]
    return found[:count]


@dataclass(frozen=True)
class Measured:
    """A candidate on some material.

    Attributes:
        beyond: nats per token of each window at positions L … target.
        answers: by length in tokens, nats per token of the right answer of each prompt.
        right: by length, how many answers greedy decoding would give.
    """

    beyond: Sequence[float]
    answers: Mapping[int, Sequence[float]]
    right: Mapping[int, int]

    @property
    def loss(self) -> float | None:
        """Mean nats per token beyond L; None without windows."""
        return float(np.mean(self.beyond)) if self.beyond else None

    @property
    def needles(self) -> float | None:
        """Mean nats per answer token: the mean over lengths of the mean over prompts; None without prompts."""
        return float(np.mean([np.mean(some) for some in self.answers.values()])) if self.answers else None

    @property
    def fitness(self) -> float:
        """The objective to minimise: the loss, the needles, or the sum of both where both are measured."""
        return sum(value for value in (self.loss, self.needles) if value is not None)

    def fields(self) -> Row:
        """The fields of a row."""
        return {
            "fitness": self.fitness,
            "loss": self.loss,
            "needles": self.needles,
            "beyond": list(self.beyond),
            "answers": {str(length): list(some) for length, some in self.answers.items()},
            "right": {str(length): count for length, count in self.right.items()},
        }

    @classmethod
    def of_row(cls, row: Row) -> Measured:
        """The inverse of `fields`."""
        answers = {int(length): some for length, some in row["answers"].items()}
        return cls(row["beyond"], answers, {int(length): count for length, count in row["right"].items()})


Measure = Callable[[RopeScaling], Measured]


def measure_on(material: Material, original: int, score: Score, ask: Ask) -> Measure:
    """A `Measure`: one forward pass per window and prompt, the model's frequencies exchanged in place.

    original: L in tokens.
    """

    def measure(scaling: RopeScaling) -> Measured:
        beyond = [float(np.mean(score(scaling, one.tokens)[original - 1 :])) for one in material.windows]
        answers: dict[int, list[float]] = {}
        right: dict[int, int] = {}
        for length, some in material.prompts.items():
            asked = [(*ask(scaling, one), len(one.answer_ids)) for one in some]
            answers[length] = [nats / count for nats, _, count in asked]
            right[length] = sum(found for _, found, _ in asked)
        found = Measured(beyond, answers, right)
        if not math.isfinite(found.fitness):
            raise ConfigError(f"{scaling.label} gives losses that are not finite; another --dtype may")
        return found

    return measure


@dataclass(frozen=True)
class Evaluated:
    """An evaluation: its number from 0, the generation, the candidate and what was measured."""

    number: int
    generation: int
    scaling: RopeScaling
    origin: Row
    measured: Measured

    @property
    def fitness(self) -> float:
        return self.measured.fitness


class Trace:
    """The file of evaluations, in the order in which they were made. Its first row says what is searched, and how.

    Attributes:
        notes: warnings about the search, which belong to its result whenever that is shown: those of the first row, or
            what the caller sets before the first evaluation, which writes that row. None: not known.
    """

    def __init__(self, path: Path, settings: Row, record: Row) -> None:
        """settings: everything that the course of the search follows from, fit for JSON; record: the provenance.

        Raises:
            ConfigError: the file has the trace of another search, or something else.
        """
        self.path, self._record = path, record
        self._settings: Row = json.loads(json.dumps(settings))
        rows = rows_so_far(path)
        self._rows = rows[1:]
        self.notes: list[str] | None = None
        if rows:
            self._check(rows[0])
            self.notes = rows[0].get("notes")
        self._is_new = not rows

    def _check(self, head: Row) -> None:
        there = head.get("settings")
        if head.get("metric") != SETTINGS or not isinstance(there, dict):
            raise ConfigError(f"file {str(self.path)!r} is no trace of a search; name another --output")
        for name, value in self._settings.items():
            if there.get(name) != value:
                raise ConfigError(
                    f"--output {self.path.parent} holds another search, with {name} {_short(there.get(name))} and not "
                    f"{_short(value)}; name another folder"
                )

    @property
    def kept(self) -> int:
        """Evaluations that earlier runs have left."""
        return len(self._rows)

    def others(self, first: int) -> list[Evaluated]:
        """The evaluations that are kept from this number on, as they were measured.

        Raises:
            ConfigError: the file has something else there.
        """
        found = []
        for number, row in enumerate(self._rows[first:], first):
            if row.get("metric") != METRIC or row.get("evaluation") != number:
                raise self._changed(number)
            scaling = RopeScaling.from_dict(row["scaling"])
            found.append(Evaluated(number, row["generation"], scaling, row["origin"], Measured.of_row(row)))
        return found

    def _changed(self, number: int) -> ConfigError:
        return ConfigError(
            f"file {str(self.path)!r}: its evaluation {number} is not the one that this search makes; the file "
            "was changed, or is another version's: name another --output"
        )

    def evaluate(
        self, number: int, generation: int, proposal: Proposal, scaling: RopeScaling, measure: Measure
    ) -> Evaluated:
        """The evaluation with this number, from the file where it is there.

        Raises:
            ConfigError: the file has another candidate in this place.
        """
        said = json.loads(json.dumps(scaling.to_dict()))
        if number < len(self._rows):
            row = self._rows[number]
            if row.get("metric") != METRIC or row.get("evaluation") != number or row.get("scaling") != said:
                raise self._changed(number)
        else:
            begin = time.monotonic()
            found = measure(scaling).fields()
            if self._is_new:  # only now is it known that the model can be read under such a scaling
                head = {"metric": SETTINGS, "settings": self._settings, "notes": self.notes or []}
                append_row(self.path, {**head, "provenance": self._record})
                self._is_new = False
            row = {
                "metric": METRIC,
                "evaluation": number,
                "generation": generation,
                "origin": proposal.origin,
                "scaling": said,
                **found,
                "seconds": round(time.monotonic() - begin, 4),
            }
            append_row(self.path, {**row, "provenance": self._record})
        return Evaluated(number, generation, scaling, row["origin"], Measured.of_row(row))


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."


def drive(
    strategy: Strategy,
    record: Callable[[Proposal], RopeScaling],
    trace: Trace,
    measure: Measure,
    budget: int,
    advance: Callable[[Evaluated], None] = lambda one: None,
) -> list[Evaluated]:
    """Carry a strategy out until it ends or has made `budget` evaluations.

    record: the scaling of a proposal; advance: is told each evaluation.
    """
    made: list[Evaluated] = []
    batch, generation = next(strategy), 0
    while True:
        found = []
        for proposal in batch[: budget - len(made)]:
            one = trace.evaluate(len(made), generation, proposal, record(proposal), measure)
            made.append(one)
            found.append(one.fitness)
            advance(one)
        if len(made) >= budget:
            return made
        try:
            batch, generation = strategy.send(found), generation + 1
        except StopIteration:
            return made
