"""Claims of the paper, by the rows of the study of SmolLM2 at 16k: estimates with intervals, and verdicts.

A claim holds if the whole 95 % interval is on its side and the estimate is above the noise of training seeds; it does
not if both are so on the other side. Anything else cannot be told, and the verdict says why.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from benchmarks.smollm2_16k import BEYOND, KEY_LENGTHS, LONG, QUESTIONS, SHORT_TASKS
from benchmarks.smollm2_16k_rows import (
    BASE_LINE,
    LINES,
    SEED_PAIRS,
    TRAINED_LENGTH,
    UNTRAINED_YARN,
    Study,
)
from scaled_rope.evaluation.statistics import PASSED, T95, mean_interval, paired_difference, wilson_interval

HOLDS, FAILS, UNKNOWN = "holds", "does not hold", "can't be told"
NOT_MEASURED = "not measured"
BEYOND_TRAINED = tuple(length for length in KEY_LENGTHS if length > TRAINED_LENGTH)
SHORT_MARGIN, LOSS_MARGIN = 0.02, 0.01
"""The loss that counts as none: 2 points of right answers, 1 % of perplexity."""


@dataclass(frozen=True)
class Estimate:
    """A number with its 95 % interval (None where there is only one unit), and the units that it stands on."""

    value: float
    interval: tuple[float, float] | None
    units: str

    def percent(self) -> str:
        """Of a log ratio: "−3.1 % [−4.0, −2.2], 4 texts"."""
        return self._shown(lambda value: 100 * math.expm1(value), " %")

    def points(self) -> str:
        """Of a share: "+4.0 points [+1.0, +7.0], 200 questions"."""
        return self._shown(lambda value: 100 * value, " points")

    def _shown(self, scaled: Callable[[float], float], unit: str) -> str:
        ends = "" if self.interval is None else f" [{', '.join(signed(scaled(end)) for end in self.interval)}]"
        return f"{signed(scaled(self.value))}{unit}{ends}, {self.units}"


@dataclass(frozen=True)
class Finding:
    """A claim, the numbers about it, the verdict (HOLDS, FAILS or UNKNOWN) and what decided."""

    claim: str
    evidence: str
    verdict: str
    why: str


def signed(value: float) -> str:
    text = f"{value:+.1f}".replace("-", "−")
    return "0.0" if text in ("+0.0", "−0.0") else text


def judge(found: Estimate | None, noise: float | None, needs_noise: bool, least: float = 0.0) -> tuple[str, str]:
    """The verdict on the claim that a number is above `least`, and what decided.

    Args:
        noise: what two trainings that differ in the seed alone may differ by, see `noise_bound`.
        needs_noise: whether the plan has second seeds for this number.
        least: 0; below 0 the claim is that nothing more than that is lost, and then any loss that stays above it counts
            as none.
    """
    if found is None:
        return UNKNOWN, NOT_MEASURED
    if found.interval is None:
        return UNKNOWN, f"no interval from {found.units}"
    if needs_noise and noise is None:
        return UNKNOWN, "the noise of seeds is not measured"
    low, high = found.interval
    bound = noise or 0.0
    outside = abs(found.value - least) > bound
    if low > least or high < least:
        if not outside:
            return UNKNOWN, "within the noise of seeds"
        return (HOLDS if low > least else FAILS), "interval and seeds" if needs_noise else "interval"
    return UNKNOWN, "the interval does not exclude it" if least == 0 else "the interval reaches beyond the margin"


# --------------------------------------------------------------------------------------------------- noise of the seeds


def noise_bound(differences: Sequence[float], runs: int) -> float | None:
    """The 95 % bound of what seeds do to a number about one run, or to the difference of two.

    Two runs that differ in the seed alone are apart by d, whose variance is twice that of a run; t·√(mean d²/2), with a
    degree of freedom per pair, and √2 times that for a difference.
    """
    if len(differences) not in T95:
        return None
    variance = statistics.fmean(one * one / 2 for one in differences)
    return T95[len(differences)] * math.sqrt(variance * runs)


def over_all_texts(differences: Iterable[float]) -> float:
    """How far two runs are apart on a text, by the root mean square over texts.

    For a number that is a mean over texts this is the most that seeds may do, as if they did the same on every text.
    The difference of the means can be nothing by accident, as where seed 1 is ahead on one of two texts.
    """
    return math.sqrt(statistics.fmean(one * one for one in differences))


def seed_differences(value: Callable[[str], Mapping[str, float]]) -> dict[str, float]:
    """A run -> how far a number about it is from that of its second seed, over the texts that both have."""
    found = {}
    for first, second in SEED_PAIRS:
        mine, others = value(first), value(second)
        shared = [mine[unit] - others[unit] for unit in mine if unit in others]
        if shared:
            found[first] = over_all_texts(shared)
    return found


def perplexity_noise(study: Study) -> dict[str, float]:
    """A run -> the log ratio of its perplexity beyond the trained length to that of its second seed, over the texts."""
    pairs = {first: study.log_ratios(first, second) for first, second in SEED_PAIRS}
    return {name: over_all_texts(found.values()) for name, found in pairs.items() if found}


def key_noise(study: Study) -> dict[str, float]:
    """A run -> the share of keys beyond the trained length that it finds, less that of its second seed."""
    found = {}
    for first, second in SEED_PAIRS:
        mine, others = study.answers(first, BEYOND_TRAINED), study.answers(second, BEYOND_TRAINED)
        if mine is not None and others is not None:
            found[first] = paired_difference(mine, others).value
    return found


# ------------------------------------------------------------------------------------------------------------ estimates


def over_texts(found: Mapping[str, float]) -> Estimate | None:
    """The mean of log ratios over texts, each with the same weight."""
    if not found:
        return None
    values = list(found.values())
    of = f"{len(values)} texts" if len(values) > 1 else next(iter(found))
    return Estimate(statistics.fmean(values), mean_interval(values), of)


def paired_answers(study: Study, mine: str, others: str, lengths: Sequence[int]) -> Estimate | None:
    left, right = study.answers(mine, lengths), study.answers(others, lengths)
    if left is None or right is None:
        return None
    found = paired_difference(left, right)
    return Estimate(found.value, found.interval, f"{found.questions} prompts")


def paired_questions(study: Study, mine: str, others: str = BASE_LINE, task: str | None = None) -> Estimate | None:
    """The difference on the short tasks, or on one of them."""
    left, right = study.outcomes(mine), study.outcomes(others)
    if left is None or right is None:
        return None
    chosen = [name for name in left if task in (None, name)]
    found = paired_difference({name: left[name] for name in chosen}, {name: right[name] for name in chosen})
    return Estimate(found.value, found.interval, f"{found.questions} questions")


def negative(found: Estimate | None) -> Estimate | None:
    """The same about the opposite sign, for claims that a number is low."""
    if found is None:
        return None
    ends = None if found.interval is None else (-found.interval[1], -found.interval[0])
    return Estimate(-found.value, ends, found.units)


# --------------------------------------------------------------------------------------------------------------- claims


def findings(study: Study) -> list[Finding]:
    """All claims, in the order of the page."""
    return list(_findings(study))


def _findings(study: Study) -> Iterator[Finding]:
    own = over_texts(study.log_ratios("yarn", "yarn", control=True))
    apart = seed_differences(lambda run: study.log_ratios(run, run, control=True))
    yield _lower(
        "Trained with YaRN, the model uses a context beyond its trained length (section 4.3): it predicts better than"
        " the same weights that read the last 8k tokens",
        own, noise_bound(list(apart.values()), 1),
    )  # fmt: skip
    seeds = list(perplexity_noise(study).values())
    yield _lower(
        "… and better than the base that reads the last 8k tokens",
        over_texts(study.log_ratios("yarn", BASE_LINE, control=True)), noise_bound(seeds, 1),
    )  # fmt: skip
    two = noise_bound(seeds, 2)
    yield _lower("After equal training YaRN is ahead of PI (table 1)", over_texts(study.log_ratios("yarn", "pi")), two)
    yield _lower("… and of training without scaling", over_texts(study.log_ratios("yarn", "none")), two)
    yield _lower(
        "… also where that reads the last 8k tokens only, so that what any training teaches doesn't count",
        over_texts(study.log_ratios("yarn", "none", control=True)), two,
    )  # fmt: skip
    yield _half_the_steps(study)
    yield _keys_found(study)
    more = paired_answers(study, "yarn", "pi", BEYOND_TRAINED)
    yield Finding(
        "… and more of them beyond the trained length than after PI", NOT_MEASURED if more is None else more.points(),
        *judge(more, noise_bound(list(key_noise(study).values()), 2), needs_noise=True),
    )  # fmt: skip
    short = paired_questions(study, "yarn")
    yield Finding(
        f"Short tasks keep their quality (table 3): {' and '.join(SHORT_TASKS)}, {QUESTIONS} questions each, lose at"
        f" most {100 * SHORT_MARGIN:g} points against the base",
        NOT_MEASURED if short is None else short.points(),
        *judge(short, None, needs_noise=False, least=-SHORT_MARGIN),
    )
    untrained = over_texts(study.log_ratios(UNTRAINED_YARN, BASE_LINE, control=True))
    yield _lower(
        "YaRN extends without training (section 3.4 and figure 5): better than the base that reads the last 8k tokens",
        untrained, None, needs_noise=False,
    )  # fmt: skip
    yield _twice(study)
    pose = over_texts(study.log_ratios("pose", "yarn"))
    yield Finding(
        f"Windows of 8k with jumping positions (PoSE) do as well as rows of 16k, to {100 * LOSS_MARGIN:g} %",
        NOT_MEASURED if pose is None else pose.percent(),
        *judge(negative(pose), two, needs_noise=True, least=-LOSS_MARGIN),
    )


def _lower(claim: str, found: Estimate | None, noise: float | None, needs_noise: bool = True) -> Finding:
    """The finding on a claim that a perplexity is lower."""
    evidence = NOT_MEASURED
    if found is not None:
        evidence = found.percent() + (f"; seeds: ±{100 * math.expm1(noise):.1f} %" if noise is not None else "")
    return Finding(claim, evidence, *judge(negative(found), noise, needs_noise))


def heldout(study: Study, run: str, part: float) -> float | None:
    """The held-out perplexity at the extended length after a part of a run's steps, if it was measured there."""
    row = study.runs.get(run)
    if row is None:
        return None
    found = row["heldout"].get(str(round(part * row["max_train_steps"])))
    return None if found is None else found.get(str(LONG))


def _half_the_steps(study: Study) -> Finding:
    """Each seed is a unit: YaRN after half the steps beside PI after all of them, on the same rows."""
    logs = {}
    for seed, ending in (("1", ""), ("2", "-2")):
        half, whole = heldout(study, f"yarn{ending}", 0.5), heldout(study, f"pi{ending}", 1.0)
        if half is not None and whole is not None:
            logs[f"seed {seed}"] = math.log(half / whole)
    found = None
    if logs:
        of = f"{len(logs)} seeds" if len(logs) > 1 else "seed 1 alone"
        found = Estimate(statistics.fmean(logs.values()), mean_interval(list(logs.values())), of)
    return Finding(
        "YaRN needs fewer steps than PI (abstract): lower after half of them than PI after all, on the held-out novel",
        NOT_MEASURED if found is None else found.percent(),
        *judge(negative(found), None, needs_noise=False),
    )


def _keys_found(study: Study) -> Finding:
    claim = f"Keys are found to the extended length (table 5): at least {100 * PASSED:g} % beyond the trained one"
    answers = study.answers("yarn", BEYOND_TRAINED)
    if answers is None:
        return Finding(claim, NOT_MEASURED, *judge(None, None, needs_noise=True))
    outcomes = [value for values in answers.values() for value in values]
    low, high = wilson_interval(int(sum(outcomes)), len(outcomes))
    share = sum(outcomes) / len(outcomes)
    found = Estimate(share, (low, high), f"{len(outcomes)} prompts")
    said = f"{sum(outcomes):.0f} of {len(outcomes)}, {100 * low:.0f} to {100 * high:.0f} %"
    noise = noise_bound(list(key_noise(study).values()), 1)
    return Finding(claim, said, *judge(found, noise, needs_noise=True, least=PASSED))


def _twice(study: Study) -> Finding:
    """One window of one text, without a control: there is nothing to compare, and so no interval."""
    rows = [study.row("yarn", "twice", "novel", length) for length in BEYOND]
    values = [None if row is None else row["perplexity_bucket"] for row in rows]
    found = None
    said = NOT_MEASURED
    if all(value is not None for value in values):
        logs = [math.log(value) for value in values if value is not None]
        found = Estimate(logs[-1] - logs[0], None, "1 window")
        ranges = [
            f"{start // 1024}k–{end // 1024}k: {value:.2f}"
            for start, end, value in zip([0, *BEYOND], BEYOND, values, strict=False)
        ]
        said = "perplexity " + ", ".join(ranges)
    return Finding(
        "Read with twice its factor it works at twice the length that it was trained on (table 2): to 32k",
        said,
        *judge(found, None, needs_noise=False),
    )


def noise_lines(study: Study) -> list[list[str]]:
    """The change that a second seed makes: a line per run that has one."""
    keys, lines = key_noise(study), []
    for first, second in SEED_PAIRS:
        texts = study.log_ratios(first, second)
        per = [f"{text} {signed(100 * math.expm1(value))} %" for text, value in texts.items()]
        lines.append([
            LINES[first],
            ", ".join(per) or NOT_MEASURED,
            f"{signed(100 * keys[first])} points" if first in keys else NOT_MEASURED,
        ])  # fmt: skip
    return lines
