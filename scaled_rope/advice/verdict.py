"""Which scaling to use, decided from what was measured, and said in words."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from scaled_rope.advice.trials import Measured
from scaled_rope.evaluation.controls import NEGLIGIBLE, Change, Control, compare
from scaled_rope.evaluation.perplexity_rows import Sums, truncated_row
from scaled_rope.evaluation.statistics import PASSED, Difference, tally
from scaled_rope.evaluation.windows import perplexity
from scaled_rope.results import Row
from scaled_rope.tuning.constants import loss_difference, retrieval_difference

AS_IT_IS = ("default", "checkpoint")
"""Specs of the model as it is."""
SERVERS = ("transformers", "vllm", "sglang", "llama.cpp")
"""The programs that the advice names, of those that `scaled-rope export` knows."""


# ------------------------------------------------------------------------------------------------------- one candidate


@dataclass(frozen=True)
class Judged:
    """A candidate of the last round with its comparisons.

    Attributes:
        measured: what was measured.
        buckets: end of a position bucket beyond L -> change against the control over the same tokens.
        total: the change over all of them together.
        short: the change within L against the model as it is.
        found: by length of the prompts: right answers, all, share and interval.
        level_to: the end of the last bucket up to which the perplexity is not shown to be above the control's; L for
            none.
        retrieves_to: the longest length beyond L up to which `PASSED` of the answers are right; L for none; None where
            retrieval is left out.
        cost: seconds of a pass over the target's tokens, over that of the model as it is.
        per_token: seconds per token of such a pass.
        servers: name of a program -> whether it computes the same, or why not.
    """

    measured: Measured
    buckets: Mapping[int, Change]
    total: Change
    short: Change
    found: Mapping[int, Row]
    level_to: int
    retrieves_to: int | None
    cost: float | None
    per_token: float | None
    servers: Mapping[str, str]

    @property
    def spec(self) -> str:
        return self.measured.candidate.spec

    @property
    def works_to(self) -> int:
        """The longest length to which it works, by perplexity and by retrieval."""
        return self.level_to if self.retrieves_to is None else min(self.level_to, self.retrieves_to)

    @property
    def served_by(self) -> list[str]:
        """The programs that compute it exactly."""
        return [name for name, status in self.servers.items() if status == "exact"]

    def right(self, original: int) -> tuple[int, int]:
        """Right answers and all answers beyond L."""
        some = [row for length, row in self.found.items() if length > original]
        return sum(row["right"] for row in some), sum(row["n"] for row in some)


def holds(change: Change) -> bool:
    """Whether a perplexity is not shown to be above that of the control."""
    return change.at_or_below or (change.interval is not None and not change.higher)


def position_rows(measured: Measured, ends: Sequence[int], segment: int) -> dict[int, Row]:
    """Length -> the measured fields of a row of perplexity of the position bucket that ends there."""
    sums: dict[int, Sums] = {}
    edges = np.cumsum([0, *measured.weights])
    for window, means in zip(measured.windows, measured.nats, strict=True):
        totals = np.concatenate([[0.0], np.cumsum(means * measured.weights)])
        into = sums.setdefault(window.document, {str(end): [] for end in ends})
        for end in ends:
            into[str(end)].append(float(totals[-(-end // segment)]))
    assert edges[-1] == ends[-1] - 1
    starts = dict(zip(ends, [0, *ends], strict=False))
    ordered = dict(sorted(sums.items()))
    return {end: truncated_row(ordered, end, starts[end], "token") for end in ends}


def judge(
    measured: Measured,
    baseline: Measured,
    control: Measured,
    ends: Sequence[int],
    segment: int,
    servers: Mapping[str, str],
) -> Judged:
    """Compare a candidate of the last round with the control and with the model as it is."""
    mine, plain, cut = (position_rows(one, ends, segment) for one in (measured, baseline, control))
    original, target = ends[0], ends[-1]

    def against(others: Mapping[int, Row], some: Sequence[int]) -> Change:
        change = compare([(mine[end], others[end]) for end in some])
        return change if change is not None else Change(math.inf, None, 0, "documents")

    buckets = {end: against(cut, [end]) for end in ends[1:]}
    level_to = original
    for end, change in buckets.items():
        if not holds(change):
            break
        level_to = end
    found = {n: tally([one.right for one in some]) for n, some in sorted(measured.answers.items())}
    retrieves_to = original if found else None
    for length, row in found.items():
        if length > original:
            if row["accuracy"] < PASSED:
                break
            retrieves_to = length
    pairs = [(one, other) for one, other in zip(measured.seconds, baseline.seconds, strict=False) if one and other]
    return Judged(
        measured,
        buckets,
        against(cut, list(ends[1:])),
        against(plain, [original]),
        found,
        level_to,
        retrieves_to,
        float(np.median([one / other for one, other in pairs])) if pairs else None,
        float(np.median([one for one, _ in pairs])) / target if pairs else None,
        servers,
    )


# -------------------------------------------------------------------------------------------------------------- choice


def _retrieval_beyond(one: Measured, other: Measured) -> Difference | None:
    """How far one candidate's probability of answers beyond L is above another's; None where nothing was asked."""
    return retrieval_difference(one, other, sorted(one.answers)[1:])


def _falls_behind(one: Measured, other: Measured) -> bool:
    gain = _retrieval_beyond(one, other)
    return gain is not None and gain.shown and gain.value < 0


def choose(judged: Sequence[Judged]) -> tuple[Judged, list[Judged]]:
    """The candidate to use, and all that are as good.

    First come those that work furthest, so that what is said of the best holds for all. Among these, those whose
    retrieval is not shown to be below the best one's; of them, those whose loss beyond L is not shown to be above the
    lowest. Of these the one that most programs serve, then the lowest loss.
    """

    def retrieval(one: Judged) -> float:
        lengths = sorted(one.measured.answers)[1:]
        means = [np.mean([answer.probability for answer in one.measured.answers[n]]) for n in lengths]
        return float(np.mean(means)) if means else 0.0

    furthest = max(one.works_to for one in judged)
    reaching = [one for one in judged if one.works_to == furthest]
    best = max(reaching, key=retrieval)
    able = [one for one in reaching if one is best or not _falls_behind(one.measured, best.measured)]
    lowest = min(able, key=lambda one: one.measured.loss)

    def as_low(one: Judged) -> bool:
        gain = loss_difference(one.measured, lowest.measured)
        return not (gain.shown and gain.value > NEGLIGIBLE)

    equal = [one for one in able if one is lowest or as_low(one)]
    first = min(equal, key=lambda one: (-len(one.served_by), one.measured.loss))
    return first, equal


# --------------------------------------------------------------------------------------------------------------- words


@dataclass(frozen=True)
class Advice:
    """The answer.

    Attributes:
        use: the candidate to use, or, where none works, the best to train with.
        equal: all candidates that are as good, itself included.
        judged: the candidates of the last round.
        original, target: L and the length that was asked for, in tokens.
        control: the control's windows.
        training: the scaling to train with: a static one of frequencies, which servers know.
    """

    use: Judged
    equal: Sequence[Judged]
    judged: Sequence[Judged]
    original: int
    target: int
    control: Control
    training: Judged | None = None
    notes: list[str] = field(default_factory=list)

    @property
    def works(self) -> bool:
        """Whether something works to the target untrained."""
        return self.use.works_to >= self.target

    @property
    def partly(self) -> bool:
        """Whether something works beyond L at least."""
        return self.use.works_to > self.original

    @property
    def verdict(self) -> str:
        """ "WORD: sentence", the word for what was found: USE, PARTLY or NONE."""
        if self.works:
            return f"USE: {quoted(self.use.spec)}: {self.facts(self.use)}"
        if self.partly:
            return (
                f"PARTLY: nothing untrained works to {self.target} tokens; use {quoted(self.use.spec)} up to "
                f"{self.use.works_to}: {self.facts(self.use)}"
            )
        return (
            f"NONE: none of these works beyond {self.original} tokens untrained. The best is "
            f"{quoted(self.use.spec)}: {self.facts(self.use)}"
        )

    def facts(self, one: Judged) -> str:
        """The measurements of a candidate, in a line."""
        said = [_level(one, self.original, self.target)]
        right, n = one.right(self.original)
        if n:
            said.append(f"retrieval {right}/{n}")
        said.append(_short(one))
        return ", ".join(said)

    def others(self) -> list[str]:
        """A sentence on each other candidate of the last round."""
        return [self._beside(one) for one in self.judged if one is not self.use]

    def _beside(self, one: Judged) -> str:
        mine = self.use.measured
        gain, loss = _retrieval_beyond(one.measured, mine), loss_difference(one.measured, mine)
        said = []
        if one.works_to < self.use.works_to:
            said.append(
                f"works to {one.works_to} tokens only"
                if one.works_to > self.original
                else f"does not work beyond {self.original} tokens"
            )
        right, n = one.right(self.original)
        if gain is not None:
            how = "as well" if not gain.shown else "better" if gain.value > 0 else "worse"
            said.append(f"retrieves {how} ({right}/{n})")
        percent = 100 * math.expm1(loss.value)
        if loss.shown and abs(percent) >= 0.1:
            side = "above" if percent > 0 else "below"
            said.append(f"its perplexity beyond {self.original} tokens is {abs(percent):.1f} % {side}")
        else:
            said.append(f"its perplexity beyond {self.original} tokens is the same within noise")
        said.append(_short(one))
        sentence = f"{quoted(one.spec)}: {', '.join(said)}"
        missing = [name for name in self.use.served_by if name not in one.served_by]
        if missing:
            sentence += f"; not served by {', '.join(missing)}"
        return sentence

    @property
    def served(self) -> Judged | None:
        """The best candidate that a program serves, where none serves the one to use; None without any."""
        able = [one for one in self.judged if one.served_by and one.measured.candidate.spec not in AS_IT_IS]
        return choose(able)[0] if able and not self.use.served_by else None

    @property
    def serving(self) -> str:
        """The programs that serve the scaling to use, in a sentence."""
        served, refused = self.use.served_by, [n for n, status in self.use.servers.items() if status != "exact"]
        if not served:
            reason = next(iter(self.use.servers.values()), "")
            said = f"served by none of {', '.join(self.use.servers)}: {reason}"
            if self.served is None:
                return said
            one = self.served
            return f"{said}. To be served by {', '.join(one.served_by)}: {quoted(one.spec)}: {self.facts(one)}"
        return f"served by {', '.join(served)}" + (f"; not by {', '.join(refused)}" if refused else "")

    @property
    def running(self) -> str:
        """The cost of the scaling to use at run time, in a sentence."""
        if self.use.cost is None or self.use.per_token is None:
            return "time at run time not measured"
        return (
            f"a pass over {self.target} tokens takes {self.use.cost:.2f} times as long as unscaled, "
            f"{1000 * self.use.per_token:.3g} ms per token here"
        )

    @property
    def tuning(self) -> str:
        """Whether fine-tuning is needed, in a sentence."""
        if self.training is None:
            return "no static scaling of frequencies is among the best, so there is none to train with"
        spec = quoted(self.training.spec)
        if self.works:
            return f"needs no fine-tuning; to lower its perplexity further, train with {spec}"
        reach = self.use.works_to if self.partly else self.original
        return f"beyond {reach} tokens nothing untrained works: fine-tune with {spec}"

    def sentences(self) -> list[str]:
        """The whole answer."""
        return [
            self.verdict.partition(": ")[2],
            *self.others(),
            self.serving,
            self.running,
            self.tuning,
        ]


def quoted(spec: str) -> str:
    """A spec in a sentence."""
    return f"`{spec}`"


def _level(one: Judged, original: int, target: int) -> str:
    change = one.buckets[target] if one.level_to >= target else None
    if change is not None:
        return f"level to {target} ({one.total} against the last {original} tokens only)"
    if one.level_to > original:
        return f"level to {one.level_to} ({one.total} against the last {original} tokens only, over all)"
    if holds(one.total):  # over all it is no worse: what comes after makes up for the bucket that fails
        end, failed = next((end, change) for end, change in one.buckets.items() if not holds(change))
        return f"worse than the last {original} tokens only up to {end} ({failed}; {one.total} over all)"
    return f"worse than the last {original} tokens only ({one.total})"


def _short(one: Judged) -> str:
    share = one.short.share
    if not math.isfinite(share):
        return "overflows at short length"
    if one.short.none or abs(share) < 0.0005:
        return "the same at short length"
    shown = one.short.lower or one.short.higher
    return f"{abs(100 * share):.1f} % {'worse' if share > 0 else 'better'} at short length" + (
        "" if shown else " (within noise)"
    )


def as_json(one: Judged, original: int) -> Row:
    """A candidate of the last round as plain data."""

    def change(found: Change) -> Row:
        return {
            "share": found.share if math.isfinite(found.share) else None,
            "interval": None if found.interval is None else list(found.interval),
        }

    right, n = one.right(original)
    return {
        "spec": one.spec,
        "scaling": one.measured.candidate.scaling.to_dict(),
        "works_to": one.works_to,
        "level_to": one.level_to,
        "retrieves_to": one.retrieves_to,
        "windows": len(one.measured.nats),
        "perplexity_beyond": perplexity(one.measured.loss, 1),
        "against_control": change(one.total),
        "by_position": {str(end): change(found) for end, found in one.buckets.items()},
        "short_length": change(one.short),
        "retrieval": {"right": right, "n": n} if n else None,
        "found": {str(length): row for length, row in one.found.items()},
        "time": None if one.cost is None else {"times_unscaled": one.cost, "seconds_per_token": one.per_token},
        "servers": dict(one.servers),
    }


def screened_as_json(one: Measured) -> Row:
    """A candidate that the last round left out, as plain data."""
    answers: list[Any] = [answer.right for some in one.answers.values() for answer in some]
    return {
        "spec": one.candidate.spec,
        "windows": len(one.nats),
        "perplexity_beyond": perplexity(one.loss, 1),
        "retrieval": {"right": sum(answers), "n": len(answers)} if answers else None,
    }
