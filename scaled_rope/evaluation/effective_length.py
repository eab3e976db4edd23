"""The length to which a model keeps its own score on a set of tasks, such as RULER's, and its uncertainty.

Hsieh et al. 2024 (arXiv 2404.06654) call the longest length at which the mean over RULER's 13 tasks exceeds the score
of Llama-2-7B at 4096 tokens a model's effective length. That threshold (`THRESHOLDS`) asks whether a model is good.
Here a model is compared with itself at the length that it was trained on, which asks what a longer text costs it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from scaled_rope.errors import ConfigError

KEPT = 0.9
"""The least share of its score at the trained length that a model must keep."""
THRESHOLDS = {"chat": 85.6, "base": 79.4}
"""RULER's own thresholds in %: the mean of Llama-2-7B-chat (table 3 of the paper and its repository's README) and of
Llama-2-7B (table 12) over the 13 tasks at 4096 tokens, by the authors' prompts."""

Outcomes = Mapping[int, Mapping[str, Sequence[float]]]
"""Length in tokens -> task -> score of each sample, 0 to 1."""

_RESAMPLES = 2000
_SEED = 42


@dataclass(frozen=True)
class EffectiveLength:
    """To which length a model keeps `KEPT` of its score at the trained length.

    Attributes:
        trained: the length in tokens that it is compared with.
        tasks: those measured there, on which all of this stands.
        scores: length -> mean over these tasks of each task's mean, 0 to 1, at every length that is compared.
        kept: length -> score over that at the trained length; empty where that is 0.
        intervals: length -> 95 % interval of `kept`; empty where a task has one sample only.
        length: the longest length up to which every compared length keeps `KEPT`; None where the score at the trained
            length is 0, so that there is nothing to keep.
        interval: the 95 % interval of `length`; None where `intervals` is empty.
        incomplete: length -> tasks without a result there; such a length is not compared.
    """

    trained: int
    tasks: tuple[str, ...]
    scores: dict[int, float]
    kept: dict[int, float]
    intervals: dict[int, tuple[float, float]]
    length: int | None
    interval: tuple[int, int] | None
    incomplete: dict[int, tuple[str, ...]]

    @property
    def measured_to(self) -> int:
        """The longest length that is compared."""
        return max(self.scores)

    def above(self, threshold: float) -> int | None:
        """The longest length up to which the score at every compared length, shorter ones than the trained included,
        exceeds a threshold in %; None if it does not at the shortest."""
        return _last(sorted(self.scores), [100 * self.scores[length] > threshold for length in sorted(self.scores)])


def effective_length(outcomes: Outcomes, trained: int) -> EffectiveLength | None:
    """The effective length against the score at `trained` tokens; None where nothing was measured there.

    Lengths below the trained one are scored but do not count. The intervals are percentiles over resamples of the
    samples, which are drawn anew within each task at each length; they say nothing about other tasks.

    Raises:
        ConfigError: a task without samples.
    """
    if not outcomes.get(trained):
        return None
    tasks = tuple(outcomes[trained])
    for length, found in outcomes.items():
        for task, samples in found.items():
            if not len(samples):
                raise ConfigError(f"task {task!r} at {length} tokens: there are no samples")
    incomplete = {
        length: missing
        for length, found in sorted(outcomes.items())
        if (missing := tuple(task for task in tasks if task not in found))
    }
    compared = [length for length in sorted(outcomes) if length not in incomplete]
    scores = {length: float(np.mean([np.mean(outcomes[length][task]) for task in tasks])) for length in compared}
    counted = [length for length in compared if length >= trained]
    if scores[trained] == 0:
        return EffectiveLength(trained, tasks, scores, {}, {}, None, None, incomplete)
    kept = {length: scores[length] / scores[trained] for length in counted}
    reached = _last(counted, [kept[one] >= KEPT - 1e-9 for one in counted])
    intervals: dict[int, tuple[float, float]] = {}
    interval = None
    if all(len(outcomes[one][task]) > 1 for one in counted for task in tasks):
        rng = np.random.default_rng(_SEED)
        drawn = {one: _resampled(outcomes[one], tasks, rng) for one in counted}
        # A resample that scores 0 at the trained length has nothing to keep and counts as keeping it there only.
        base = drawn[trained]
        shares = {one: np.divide(drawn[one], base, out=np.zeros_like(base), where=base > 0) for one in counted[1:]}
        for one, values in shares.items():
            low, high = np.percentile(values, [2.5, 97.5])
            intervals[one] = float(low), float(high)
        intervals = {trained: (1.0, 1.0), **intervals}
        holds = np.array([shares[one] >= KEPT - 1e-9 for one in counted[1:]]).reshape(len(counted) - 1, _RESAMPLES)
        beyond = np.cumprod(holds, axis=0).sum(axis=0)  # the number of lengths beyond the trained one that hold
        low, high = np.percentile(beyond, [2.5, 97.5], method="nearest")
        interval = counted[int(low)], counted[int(high)]
    return EffectiveLength(trained, tasks, scores, kept, intervals, reached, interval, incomplete)


def _last(lengths: Sequence[int], holds: Sequence[bool]) -> int | None:
    """The last of the lengths before the first that does not hold."""
    found = None
    for length, one in zip(lengths, holds, strict=True):
        if not one:
            break
        found = length
    return found


def _resampled(
    found: Mapping[str, Sequence[float]], tasks: Sequence[str], rng: np.random.Generator
) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
    """The mean over tasks of resampled means, `_RESAMPLES` times."""
    total = np.zeros(_RESAMPLES)
    for task in tasks:
        samples = np.asarray(found[task], dtype=np.float64)
        total += (
            rng.multinomial(len(samples), [1 / len(samples)] * len(samples), size=_RESAMPLES) @ samples / len(samples)
        )
    return total / len(tasks)
