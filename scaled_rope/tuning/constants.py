"""Fit YaRN's constants together: beta_fast, beta_slow and the attention factor, by loss beyond L and by retrieval.

    scaled-rope tune --constants -m MODEL --dataset FOLDER --factors 8 --output out/constants

The candidates are every pair of betas with every attention factor, far too many to read all of the text with each. So
the search goes in rounds, of which the first three read one window in four and one prompt in four:

1. every ramp, at the middle attention factor; ramps whose frequencies are the same are one candidate;
2. the best ramps, with every attention factor;
3. the values halfway to the neighbours of the best, twice;
4. the best of all rounds, and the paper's constants, on the windows and prompts that have chosen nothing yet.

Rounds 1 to 3 pass on those with the lowest loss and those with the best retrieval, in turn. The rule at the end: among
the candidates whose retrieval is not shown to be below the best one's, the lowest loss beyond L. If the paper's
constants are among these candidates and their loss is not shown to be higher, they are kept. "Shown" means that the
paired 95 % interval, over windows or over prompts, leaves out 0.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol, TypeVar

import numpy as np

from scaled_rope.evaluation.passkey_prompts import PasskeyPrompt
from scaled_rope.evaluation.statistics import Difference, paired_difference
from scaled_rope.results import Row
from scaled_rope.scaling.constants import PAPER_BETAS, beta_grids, interpolated_pairs, kept_pairs
from scaled_rope.scaling.frequencies import rope_values
from scaled_rope.scaling.record import RopeScaling
from scaled_rope.tuning.curves import Floats, segment_bounds
from scaled_rope.tuning.measurement import Answer, Answers, ScoredWindow, Sweep

RAMPS, FINALISTS, REFINED = 5, 4, 2
"""Ramps that get every attention factor; candidates compared at the end; candidates whose neighbours are tried."""
REFINEMENTS = 2
SCREENED = 4
"""One in so many windows and prompts is read in the first rounds, the others at the end."""
_HIGHEST = 1.25
_STEPS = 5

Axes = tuple[tuple[float, ...], tuple[float, ...], tuple[float, ...]]
"""Values of beta_fast, beta_slow and attention factor, each ascending."""


# ---------------------------------------------------------------------------------------------------------- candidates


def factor_grid(start: RopeScaling) -> tuple[float, ...]:
    """Attention factors to try: from 0.9 to that of the paper in five equal steps, and three steps beyond.

    Beyond, since retrieval far away may want more contrast than the loss does (docs/tuning.md).
    """
    paper = start.static_attention_factor
    step = (paper - 0.9) / _STEPS
    return tuple(round(0.9 + index * step, 4) for index in range(_STEPS + 4))


def default_axes(start: RopeScaling) -> Axes:
    """The grids for a model: see `beta_grids` and `factor_grid`."""
    return (*beta_grids(start), factor_grid(start))


def make_candidate(start: RopeScaling, fast: float, slow: float, factor: float) -> RopeScaling:
    """A candidate; values that are the paper's are left to the method, so that equal candidates are equal records."""
    near_paper = abs(factor - start.static_attention_factor) < 5e-5  # grids are rounded to four decimals
    return replace(
        start,
        beta_fast=None if fast == PAPER_BETAS[0] else fast,
        beta_slow=None if slow == PAPER_BETAS[1] else slow,
        attention_factor=None if near_paper else factor,
    )


def point_of(scaling: RopeScaling) -> tuple[float, float, float]:
    """(beta_fast, beta_slow, attention factor) of a candidate."""
    return (*scaling.ramp_bounds, scaling.static_attention_factor)


def distinct(candidates: Sequence[RopeScaling], head_dim: int) -> list[RopeScaling]:
    """The candidates without those that compute the same as an earlier one."""
    found: dict[tuple[Any, ...], RopeScaling] = {}
    for one in candidates:
        inv_freq, factor = rope_values(one, head_dim)
        found.setdefault((*inv_freq, round(factor, 6)), one)
    return list(found.values())


def ramps(start: RopeScaling, axes: Axes, head_dim: int) -> list[RopeScaling]:
    """Every ramp at the middle attention factor, the paper's first; ends that cross are left out."""
    middle = axes[2][(len(axes[2]) - 1) // 2]
    pairs = [(fast, slow) for fast in axes[0] for slow in axes[1] if fast >= slow]
    # Of ramps that are the same, the one nearest to the paper's constants stays.
    pairs.sort(key=lambda pair: sum(abs(math.log(beta / own)) for beta, own in zip(pair, PAPER_BETAS, strict=True)))
    candidates = [make_candidate(start, fast, slow, middle) for fast, slow in [PAPER_BETAS, *pairs]]
    return distinct(candidates, head_dim)


def _halfway(axis: Sequence[float], value: float, ratio: bool) -> list[float]:
    """The values halfway from `value` to the next ones on its axis; along ratios, to two digits."""
    lower = [other for other in axis if other < value - 1e-9]
    upper = [other for other in axis if other > value + 1e-9]
    ends = [*lower[-1:], *upper[:1]]
    return [float(f"{math.sqrt(value * end):.2g}") if ratio else round((value + end) / 2, 4) for end in ends]


def neighbours(start: RopeScaling, axes: Axes, one: RopeScaling) -> list[RopeScaling]:
    """The candidates that differ from one in one constant, which goes halfway to the next values of its grid."""
    point, found = point_of(one), []
    for index, axis in enumerate(axes):
        for value in _halfway(axis, point[index], ratio=index < 2):
            fast, slow, factor = (value if place == index else own for place, own in enumerate(point))
            if fast >= slow:
                found.append(make_candidate(start, fast, slow, factor))
    return found


# --------------------------------------------------------------------------------------------------------- measurement


@dataclass(frozen=True, eq=False)
class Result:
    """A candidate on some windows and prompts."""

    scaling: RopeScaling
    beyond: Floats
    """Nats per token at positions L … s·L of each window."""
    within: Floats
    """The same at the positions before."""
    answers: Mapping[int, Sequence[Answer]]
    """By length of the prompts; empty where retrieval is left out."""

    @property
    def loss(self) -> float:
        """Nats per token beyond L."""
        return float(self.beyond.mean())

    @property
    def retrieval(self) -> float:
        """The mean over lengths of the mean probability of an answer's tokens; 0 where retrieval is left out."""
        means = [np.mean([one.probability for one in some]) for some in self.answers.values()]
        return float(np.mean(means)) if means else 0.0

    def found(self) -> dict[int, tuple[int, int]]:
        """By length, the right answers and all."""
        return {length: (sum(one.right for one in some), len(some)) for length, some in self.answers.items()}


Prompts = Mapping[int, Sequence[PasskeyPrompt]]


def split(items: Sequence[Any]) -> tuple[list[Any], list[Any]]:
    """One in `SCREENED` of the items, at least one, for the first rounds, and the others for the end."""
    return list(items[::SCREENED]), [one for index, one in enumerate(items) if index % SCREENED]


class Trials:
    """Measures candidates on the part of windows and prompts that a round reads."""

    def __init__(self, sweep: Sweep, answers: Answers, prompts: Prompts) -> None:
        """prompts: by length; empty to leave retrieval out."""
        self.sweep, self.answers, self.prompts = sweep, answers, prompts

    def _material(self, final: bool) -> tuple[list[ScoredWindow], Prompts]:
        windows = split(self.sweep.windows)[final]
        return windows, {length: split(some)[final] for length, some in self.prompts.items()}

    def measure(self, candidates: Sequence[RopeScaling], final: bool = False) -> list[Result]:
        """Measure candidates of one factor; `final` for the windows and prompts of the last round."""
        windows, prompts = self._material(final)
        store, asked = self.sweep.store, list(itertools.chain.from_iterable(prompts.values()))
        cells = self.sweep.cells(candidates, windows) + self.answers.cells(candidates, asked)
        store.bar.total = store.bar.n + store.missing(cells)
        return [self._one(one, windows, prompts) for one in candidates]

    def _one(self, scaling: RopeScaling, windows: Sequence[ScoredWindow], prompts: Prompts) -> Result:
        length = scaling.max_position_embeddings
        assert length is not None  # "yarn" needs the original length
        (means,) = self.sweep.measure([scaling], windows)
        bounds = segment_bounds(length, self.sweep.segment)[1:]
        share = np.asarray([end - first for first, end in bounds]) / (length - self.sweep.segment)
        answers = {length: self.answers.measure(scaling, some) for length, some in prompts.items()}
        return Result(scaling, means[:, 1:] @ share, means[:, 0], answers)


# -------------------------------------------------------------------------------------------------------------- search


class Comparable(Protocol):
    """A candidate with what was measured of it."""

    @property
    def beyond(self) -> Floats: ...

    @property
    def loss(self) -> float: ...

    @property
    def retrieval(self) -> float: ...

    @property
    def answers(self) -> Mapping[int, Sequence[Answer]]: ...


Compared = TypeVar("Compared", bound=Comparable)


def best_of(results: Sequence[Compared], count: int) -> list[Compared]:
    """The candidates with the lowest loss and those with the best retrieval, in turn, until there are `count`."""
    orders = [sorted(results, key=lambda one: one.loss)]
    if any(one.answers for one in results):
        orders.append(sorted(results, key=lambda one: (-one.retrieval, one.loss)))
    turns = itertools.chain.from_iterable(zip(*orders, strict=True))
    return list({id(one): one for one in turns}.values())[:count]


def loss_difference(one: Comparable, other: Comparable) -> Difference:
    """Nats per token beyond L that one candidate is above another, paired over windows."""
    return paired_difference({"": list(one.beyond)}, {"": list(other.beyond)}, shares=False)


def retrieval_difference(one: Comparable, other: Comparable, lengths: Sequence[int] | None = None) -> Difference | None:
    """How far one candidate's retrieval is above another's, paired over prompts; None where nothing was asked.

    lengths: of the prompts that count; None: all of them.
    """
    lengths = list(one.answers) if lengths is None else lengths
    if not lengths:
        return None
    mine, others = (
        {str(length): [answer.probability for answer in each.answers[length]] for length in lengths}
        for each in (one, other)
    )
    return paired_difference(mine, others)


def retrieves(results: Sequence[Result]) -> list[Result]:
    """The candidates whose retrieval is not shown to be below the best one's; all where it is left out."""
    best = max(results, key=lambda one: one.retrieval)

    def falls_behind(one: Result) -> bool:
        gain = retrieval_difference(one, best)
        return gain is not None and gain.shown and gain.value < 0

    return [one for one in results if not falls_behind(one)]


@dataclass(frozen=True)
class Fitted:
    """The result of the search for one factor."""

    start: RopeScaling
    """YaRN with the paper's constants."""
    axes: Axes
    head_dim: int
    screened: Sequence[Result]
    """Every candidate of rounds 1 to 3, with the paper's constants, on the windows and prompts of these rounds."""
    finalists: Sequence[Result]
    """The paper's constants first; on the windows and prompts of the last round."""

    @property
    def best(self) -> Result:
        """The finalist with the lowest loss among those that retrieve."""
        return min(retrieves(self.finalists), key=lambda one: one.loss)

    @property
    def paper(self) -> Result:
        """The paper's constants, in the last round."""
        return self.finalists[0]

    @property
    def paper_is_as_good(self) -> bool:
        """Whether the paper's constants retrieve, and their loss is not shown to be above that of the best."""
        gain = loss_difference(self.best, self.paper)
        return self.paper in retrieves(self.finalists) and not gain.shown

    @property
    def scaling(self) -> RopeScaling:
        """The scaling to use: the best, or the paper's constants where they are as good."""
        return self.paper.scaling if self.paper_is_as_good else self.best.scaling


def fit_constants(trials: Trials, start: RopeScaling, axes: Axes, head_dim: int) -> Fitted:
    """Search the constants for one factor.

    Args:
        start: "yarn" with the factor, above 1, and the paper's constants.
        axes: the values to try; the paper's are tried in any case.

    Raises:
        ConfigError: losses that are not finite.
    """
    screened: dict[RopeScaling, Result] = {}

    def screen(candidates: Sequence[RopeScaling]) -> None:
        known = list(screened)
        new = distinct([*known, *candidates], head_dim)[len(known) :]
        screened.update(zip(new, trials.measure(new), strict=True))

    screen([start])
    first = ramps(start, axes, head_dim)
    screen(first)
    kept = best_of([screened[one] for one in first if one in screened], RAMPS)
    betas = [one.scaling.ramp_bounds for one in kept]
    screen([make_candidate(start, fast, slow, factor) for fast, slow in betas for factor in axes[2]])
    for _ in range(REFINEMENTS):  # the second time, from where the first has led, by smaller steps
        top = best_of(list(screened.values()), REFINED)
        screen([other for one in top for other in neighbours(start, axes, one.scaling)])
    final = [one.scaling for one in best_of(list(screened.values()), FINALISTS) if one.scaling != start]
    finalists = trials.measure([start, *final], final=True)
    return Fitted(start, axes, head_dim, list(screened.values()), finalists)


# -------------------------------------------------------------------------------------------------------------- report


def _interval(gain: Difference | None) -> Row | None:
    if gain is None:
        return None
    return {"value": gain.value, "interval": None if gain.interval is None else list(gain.interval)}


def _described(one: Result, head_dim: int, model: RopeScaling | None) -> Row:
    """A candidate's constants and measurements."""
    fast, slow, factor = point_of(one.scaling)
    kept, pairs = kept_pairs(one.scaling, head_dim)
    answers: Row = {}
    if one.answers:
        found = {str(length): list(counts) for length, counts in one.found().items()}
        answers = {"retrieval": one.retrieval, "found": found}
    return {
        "spec": one.scaling.to_spec(model),
        "beta_fast": fast,
        "beta_slow": slow,
        "attention_factor": factor,
        "pairs": pairs,
        "unscaled_pairs": kept,
        "interpolated_pairs": interpolated_pairs(one.scaling, head_dim),
        "perplexity_within": math.exp(one.within.mean()),
        "perplexity_beyond": math.exp(one.loss),
        **answers,
    }


def summarise_constants(
    fitted: Sequence[Fitted], seed: int, reference: Row | None, model: RopeScaling | None = None
) -> Row:
    """The results of the search as plain data: the content of best.json except for the provenance.

    reference: the answers of the unscaled model within L; None if none was asked for.
    model: what the checkpoint carries, see `RopeScaling.to_spec`.
    """
    factors = []
    for one in fitted:
        finalists = [
            {
                **_described(each, one.head_dim, model),
                "loss_above_paper": _interval(loss_difference(each, one.paper)),
                "retrieval_above_paper": _interval(retrieval_difference(each, one.paper)),
            }
            for each in one.finalists
        ]
        at = one.finalists.index(one.best)
        factors.append(
            {
                "factor": one.start.factor,
                "spec": one.scaling.to_spec(model),
                "scaling": one.scaling.to_dict(),
                "rope_parameters": one.scaling.to_config(),
                "paper_is_as_good": one.paper_is_as_good,
                "best": finalists[at],
                "paper": finalists[0],
                "finalists": finalists,
                "screened": [_described(each, one.head_dim, model) for each in one.screened],
                "grids": dict(zip(("beta_fast", "beta_slow", "attention_factor"), map(list, one.axes), strict=True)),
            }
        )
    last = fitted[0].paper
    prompts = {str(length): len(some) for length, some in last.answers.items()}
    return {
        "search": "constants",
        "final_windows": len(last.beyond),
        "final_prompts": prompts,
        "level": 0.95,
        "seed": seed,
        "unscaled_within": reference,
        "factors": factors,
    }


def _said(gain: Row, digits: int) -> str:
    """A difference with its interval: "−0.053 [−0.061, −0.045]"."""

    def number(value: float) -> str:
        return f"{value:+.{digits}f}".replace("-", "−")

    return number(gain["value"]) + (f" [{', '.join(map(number, gain['interval']))}]" if gain["interval"] else "")


def verdict(one: Row) -> str:
    """One factor's outcome in a sentence."""
    loss, retrieval = one["best"]["loss_above_paper"], one["best"]["retrieval_above_paper"]
    gains = f"loss beyond L {_said(loss, 3)} nats" + (f", retrieval {_said(retrieval, 2)}" if retrieval else "")
    if one["best"]["spec"] == one["paper"]["spec"]:
        return f"x{one['factor']:g}: nothing that was tried is better than the paper's constants; use {one['spec']}"
    if one["paper_is_as_good"]:
        return (
            f"x{one['factor']:g}: the paper's constants are within noise of the best, {one['best']['spec']} ({gains}); "
            f"keep {one['spec']}"
        )
    return f"x{one['factor']:g}: use {one['spec']}; against the paper's constants: {gains}"


def _table(one: Row) -> Iterator[list[str]]:
    ordered = [one["paper"], *sorted(one["finalists"][1:], key=lambda each: float(each["perplexity_beyond"]))]
    for each in ordered:
        mark = "*" if each["spec"] == one["spec"] else ""
        line = [
            each["spec"] + mark,
            f"{each['unscaled_pairs']}/{each['pairs']}",
            f"{each['interpolated_pairs']}/{each['pairs']}",
            f"{each['perplexity_within']:.2f}",
            f"{each['perplexity_beyond']:.2f}",
        ]
        if "retrieval" in each:
            line += [f"{each['retrieval']:.2f}", *(f"{right}/{n}" for right, n in each["found"].values())]
        yield line


def constants_tables(summary: Row) -> list[tuple[list[str], list[list[str]]]]:
    """Per factor the header and the lines of its table: the finalists, the paper's constants first."""
    tables = []
    for one in summary["factors"]:
        found = [f"at {length}" for length in one["paper"].get("found", {})]
        header = [f"s = {one['factor']:g}", "unscaled", "÷ s", "ppl ≤ L", "ppl > L"]
        tables.append((header + (["retrieval", *found] if found else []), list(_table(one))))
    return tables


def constants_remarks(summary: Row) -> list[str]:
    """Warnings that a reader of the results needs."""
    notes = []
    reference = summary["unscaled_within"]
    if reference is not None and not reference["used"]:
        notes.append(
            f"retrieval is left out: unscaled and within L the model gives answers a probability of "
            f"{reference['retrieval']:.2f} ({reference['right']} of {reference['prompts']} right), so it does not find "
            "what it is asked for under any scaling. Loss alone has chosen"
        )
    if summary["final_windows"] < 5:
        notes.append(f"{summary['final_windows']} windows in the last round: intervals are rough; see --windows")
    for one in summary["factors"]:
        if one["spec"] == one["paper"]["spec"]:
            continue
        for name, flag in (("beta_fast", "beta-fast"), ("beta_slow", "beta-slow"), ("attention_factor", "grid")):
            tried = one["grids"][name]
            value = one["best"][name]
            if len(tried) > 1 and value in (tried[0], tried[-1]):
                notes.append(f"x{one['factor']:g}: {name} {value:g} is at the edge of what was tried. Widen --{flag}")
    return notes
