"""How likely each hypothesis makes what was observed, and what follows from it.

Differences of log-probabilities are taken as normal around 0, with the noise of the length at hand. The positions of a
prompt are not independent, so of four one is counted. Noise that turns out larger than the yardsticks say is taken from
the residuals of the best hypothesis.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from scaled_rope.certificate.observed import Numbers

APART = 8.0
"""Log-likelihood ratio beyond which one hypothesis excludes another: e^8 is 3,000 to 1."""
INDEPENDENT = 4.0
"""Positions of a prompt that count as one observation; prompts are independent of each other."""
DROPPED = 100.0
"""Beyond it, a hypothesis is not tried at further lengths."""
FITS = 2.5
"""Most root mean square of residuals, in units of the noise, of a claim that is called right."""
STILL_FITS = 5.0
"""The same for another hypothesis that is named."""
STRANGE = 0.5
"""Nats by which prompts of one token may differ; beyond it, other weights or another vocabulary are served."""
SAME = 1e-5
"""Nats below which two predictions count as the same: float32 passes of the same model differ by about 1e-6."""


@dataclass
class Ledger:
    """The evidence on one hypothesis, by length."""

    minor: bool = False
    """Whether the claim is right as well where both are within the noise of each other."""
    squares: dict[int, float] = field(default_factory=dict)
    """Mean square of the differences from what was observed, nats²."""
    worst: dict[int, float] = field(default_factory=dict)
    """Largest difference, nats."""
    weight: dict[int, float] = field(default_factory=dict)
    """Independent observations in it."""
    from_claim: dict[int, float] = field(default_factory=dict)
    """Root mean square of the differences from what the claim predicts, nats."""

    def same_as_claim(self, lengths: Sequence[int]) -> bool:
        return all(self.from_claim.get(length, math.inf) < SAME for length in lengths)


def mean_square(one: Sequence[Numbers], other: Sequence[Numbers]) -> tuple[float, float]:
    """Mean over positions of the mean square difference over tokens, and the largest difference."""
    squares = [float(np.mean((a - b) ** 2)) for a, b in zip(one, other, strict=True)]
    worst = max(float(np.abs(a - b).max()) for a, b in zip(one, other, strict=True))
    return float(np.mean(squares)), worst


def ratio(one: Ledger, best: Ledger, noise: dict[int, float]) -> float:
    """ln of how much likelier `best` makes the observations than `one`, at the lengths where both were tried."""
    shared = one.squares.keys() & best.squares.keys() & noise.keys()
    inflation = max(1.0, residual(best, noise) ** 2)
    gains = {n: one.weight[n] * (one.squares[n] - best.squares[n]) / (2 * noise[n] ** 2) for n in shared}
    return sum(gains.values()) / inflation


def residual(one: Ledger, noise: dict[int, float]) -> float:
    """Root mean square of the differences in units of the noise."""
    known = one.squares.keys() & noise.keys()
    return math.sqrt(sum(one.squares[n] / noise[n] ** 2 for n in known) / max(1, len(known)))


def best_of(ledgers: Sequence[Ledger], noise: dict[int, float]) -> int:
    """The likeliest of those that were tried at every length so far; the first of equals."""
    most = max(len(ledger.squares) for ledger in ledgers)
    whole = [at for at, ledger in enumerate(ledgers) if len(ledger.squares) == most]
    return min(whole, key=lambda at: residual(ledgers[at], noise))


def _unseen(one: Ledger, claim: Ledger, noise: dict[int, float]) -> bool:
    """Whether a minor hypothesis cannot be told from the claim."""
    near = all(one.from_claim.get(n, math.inf) < 2 * size for n, size in noise.items())
    return one.minor and near and abs(ratio(one, claim, noise)) <= APART


@dataclass(frozen=True)
class Judgement:
    """The verdict on the claim, which is hypothesis 0."""

    verdict: str
    """"right", "other" or "unclear"."""
    why: str
    """"" or, where it is unclear, the reason: "strange", "none fits", "not told apart"."""
    best: int
    named: tuple[int, ...]
    """The hypotheses that are not excluded, the likeliest first."""
    same: tuple[int, ...]
    """Hypotheses that compute the same as the claim at these lengths."""
    unseen: tuple[int, ...] = ()
    """Minor ones that are not excluded, because they differ from the claim by less than the noise."""


def judge(ledgers: Sequence[Ledger], noise: dict[int, float], single: float) -> Judgement:
    """Say which hypothesis holds.

    Args:
        ledgers: of the claim, and of each other hypothesis.
        noise: length -> standard deviation of differences in nats.
        single: root mean square difference at prompts of one token, nats.
    """
    lengths = sorted(noise)
    same = tuple(at for at in range(1, len(ledgers)) if ledgers[at].same_as_claim(lengths))
    best = best_of(ledgers, noise)
    if best in same:
        best = 0
    unseen = tuple(at for at in range(1, len(ledgers)) if at not in same and _unseen(ledgers[at], ledgers[0], noise))
    if best in unseen:
        best = 0
    left = [
        at
        for at in range(len(ledgers))
        if at != best and at not in same + unseen and ratio(ledgers[at], ledgers[best], noise) <= APART
    ]
    named = (best, *sorted(left, key=lambda at: ratio(ledgers[at], ledgers[best], noise)))
    off = residual(ledgers[best], noise)
    if single > STRANGE:
        return Judgement("unclear", "strange", best, named, same, unseen)
    if 0 in named:
        if len(named) > 1:
            return Judgement(
                "unclear", "not told apart" if off <= STILL_FITS else "none fits", best, named, same, unseen
            )
        return Judgement(*(("right", "") if off <= FITS else ("unclear", "none fits")), best, named, same, unseen)
    if off > STILL_FITS:
        return Judgement("unclear", "none fits", best, named, same, unseen)
    return Judgement("other", "", best, named, same, unseen)
