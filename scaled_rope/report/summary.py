"""The first thing on a report: one sentence and one small table that say to which length a model works."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from scaled_rope.evaluation.controls import Change
from scaled_rope.evaluation.formatting import format_table
from scaled_rope.evaluation.passkey_prompts import RELEASED
from scaled_rope.provenance import portable_model
from scaled_rope.report.context_use import ContextUse, context_use, short_loss
from scaled_rope.report.paired import short_costs
from scaled_rope.report.ruler import ruler_scores
from scaled_rope.report.tables import ReportRows, Section, Series, within_reach
from scaled_rope.results import Row

FOUND = 0.9
"""The least share of keys that must be found at a length for a model to work there by retrieval."""
_MOST = 3  # models in the table
NOT_MEASURED = "not measured"
_NOT_EVEN = "not even at "


@dataclass(frozen=True)
class Said:
    """One entry of the summary's table, in words."""

    text: str
    tone: str = ""
    """"good", "bad", "unsure", or "" for a plain fact."""
    more: str = ""
    """Smaller print below."""


@dataclass(frozen=True)
class Summary:
    """One sentence and one table: a column per model, a line per question.

    Attributes:
        sentence: about the first of the models.
        models: their names.
        lines: question -> an answer per model.
        note: how to read it, and which models are in the tables below only.
        corner: the heading above the questions, where columns are no models.
    """

    sentence: str
    models: list[str]
    lines: dict[str, list[Said]]
    note: str
    corner: str = ""

    def text(self) -> str:
        """The summary for a terminal."""
        lines = [
            [question, *(f"{said.text} ({said.more})" if said.more else said.text for said in answers)]
            for question, answers in self.lines.items()
        ]
        return f"{self.sentence}\n\n{format_table([self.corner, *self.models], lines)}\n{self.note}"


@dataclass(frozen=True)
class Retrieval:
    """Keys found by one series.

    Attributes:
        works_to: the longest length up to which, at every measured length, at least 90 % were found; None for none.
        measured_to: the longest measured length.
        rows: length in tokens -> row.
    """

    works_to: int | None
    measured_to: int
    rows: dict[int, Row]


def retrieval(results: ReportRows, series: Series, wording: str | None = None) -> Retrieval | None:
    """The passkeys that a series finds; None without any.

    Of several sets of prompts, the one with most prompts counts; of those, the one that was measured last.

    wording: of the prompts; None: the released one, another where there is none, or numbered keys where there are no
        plain ones.
    """
    sections = results.of("passkey") or results.of("passkey_hard")
    wanted = [one for one in sections if one.topic.setting("wording", RELEASED) == (wording or RELEASED)]
    sections = [one for one in wanted or (sections if wording is None else []) if series in one.rows]
    if not sections:
        return None
    sets = [
        {length: row for length, row in one.lengths(series).items() if not row.get("error")}
        for one in reversed(sections)
    ]
    rows = max(sets, key=lambda some: sum(row["n"] for row in some.values()))
    if not rows:
        return None
    works_to = None
    for length, row in rows.items():
        if row["right"] / row["n"] < FOUND:
            break
        works_to = length
    return Retrieval(works_to, max(rows), rows)


def _chosen(results: ReportRows, base: str | None) -> list[Series]:
    """The models of the table: trained ones, otherwise the best against the base cut short; then the base."""
    measured = [one for one in results.series if any(one in section.rows for section in results.sections)]
    tuned = [one for one in measured if one.tuned]
    unscaled = [one for one in measured if one.scaling.method == "default" and base in (None, one.model)]
    others = [one for one in measured if one.scaling.method != "default"]
    others.sort(key=lambda one: _rank(results, one, base))
    first = (tuned or others)[: _MOST - 1 if unscaled else _MOST]
    return [*first, *unscaled[: _MOST - len(first)]]


def _rank(results: ReportRows, series: Series, base: str | None) -> float:
    """The change against the base cut short, on the worst text; infinite where that was not measured."""
    found = context_use_of(results, series, base) or []
    return max((use.against_base.share if use.against_base else math.inf for _, use in found), default=math.inf)


def context_use_of(results: ReportRows, series: Series, base: str | None) -> list[tuple[Section, ContextUse]] | None:
    """The comparison with the control on each text; None where none was measured.

    Sliding windows count only where no text was cut at each length.
    """
    found = [(section, use) for section in results.of("perplexity") if (use := context_use(section, series, base))]
    cut = [one for one in found if one[0].topic.setting("name") != "sliding"]
    return cut or found or None


def summarize(results: ReportRows, base: str | None = None) -> Summary | None:
    """The summary of a set of rows; None when they hold neither perplexities, passkeys nor benchmarks.

    base: the model without fine-tuning, as for `base_of`.
    """
    if not results.of("perplexity", "passkey", "passkey_hard", "benchmark"):
        return None
    base = None if base is None else portable_model(base)
    models = _chosen(results, base)
    if not models:
        return None
    lines: dict[str, list[Said]] = {
        "trained on": [Said(_tokens(one.scaling.original_max_position_embeddings)) for one in models],
        "made for": [Said("no fixed length" if _follows(one) else _tokens(_claimed(one))) for one in models],
        "works to, by perplexity": [_by_perplexity(results, one, base) for one in models],
        "works to, by retrieval": [_by_retrieval(results, one) for one in models],
        "works to, by RULER": [_by_ruler(results, one) for one in models],
        "uses what stands further back": [_of_texts(results, one, base, _use) for one in models],
        "better than its base cut short": [_of_texts(results, one, base, _worth) for one in models],
        "price within the trained length": [_price(results, one, base) for one in models],
    }
    left = sum(any(one in section.rows for section in results.sections) for one in results.series) - len(models)
    more = f" {left} more {'are' if left > 1 else 'is'} in the tables below." if left > 0 else ""
    note = (
        "By perplexity: up to there it predicts at least as well with the whole text as when it reads the last tokens "
        "of the trained length only. By retrieval: up to there it finds at least 9 of 10 hidden keys. By RULER: up to "
        "there it keeps at least 90 % of its own score at the trained length, on the tasks that are named. Answers, "
        f"reasoning, and anything else that a text is read for are not in this summary.{more}"
    )
    return Summary(
        _sentence(models[0], {question: said[0] for question, said in lines.items()}), _names(models), lines, note
    )


def _names(models: Sequence[Series]) -> list[str]:
    return [one.name for one in models]


def _tokens(length: int | None) -> str:
    return "unknown" if length is None else f"{length} tokens"


def _claimed(series: Series) -> int | None:
    """The length in tokens that a scaling is for; None for one that follows the length of the text, or not known."""
    return None if _follows(series) else series.made_for


def _follows(series: Series) -> bool:
    """Whether a scaling has no fixed length, but follows that of the text."""
    return series.scaling.dynamic or series.scaling.method.startswith("dynamic-")


def _sentence(series: Series, said: dict[str, Said]) -> str:
    trained, claimed = series.scaling.original_max_position_embeddings, _claimed(series)
    start = f"{series.name} was trained on {_tokens(trained)}"
    if claimed not in (None, trained):
        start += f" and made for {claimed}" if not series.tuned else f" and extended to {claimed}"
    parts = []
    for how in ("perplexity", "retrieval"):
        answer = said[f"works to, by {how}"]
        if answer.text == NOT_MEASURED:
            what = "its control" if how == "perplexity" else "finding keys"
            parts.append(f"by {how} nothing is known, since {what} was not measured")
        elif answer.text.startswith(_NOT_EVEN):
            parts.append(f"by {how} it does {answer.text.replace('not', 'not work', 1)}")
        elif answer.text.startswith("no "):
            parts.append(f"by {how} it works {answer.text}")
        else:
            parts.append(f"by {how} it works to {answer.text}")
    ruler = said["works to, by RULER"]
    if ruler.text.endswith("tokens"):
        parts.append(f"by RULER it works {'' if ruler.text.startswith('no ') else 'to '}{ruler.text}")
    elif ruler.text != NOT_MEASURED:
        parts.append("by RULER there is nothing to keep, since it scores 0")
    use = said["uses what stands further back"]
    if use.text != NOT_MEASURED:
        parts.append(f"what stands further back {_VERBS[use.text.partition(',')[0]]}")
    worth = said["better than its base cut short"]
    if worth.text in _WORTH:
        parts.append(f"it is {_WORTH[worth.text]} its base cut short")
    price = said["price within the trained length"]
    if price.text.endswith("%"):
        parts.append(f"within the trained length its perplexity changes by {price.text}")
    return f"{start}: {'; '.join(parts)}."


_VERBS = {
    "yes": "helps it",
    "no": "makes no difference to it",
    "harms": "harms it",
    "not shown": "is not shown to help it",
    "fails": "makes it fail",
    "mixed": "helps it on some texts",
}


_WORTH = {
    "yes": "better than",
    "no, worse": "worse than",
    "no": "no better than",
    "not shown": "not shown to be better than",
    "mixed": "on some texts better than",
}


def _by_perplexity(results: ReportRows, series: Series, base: str | None) -> Said:
    found = context_use_of(results, series, base)
    if found is None:
        return Said(NOT_MEASURED, "unsure", "its control was not measured")
    section, use = min(found, key=lambda one: one[1].works_to)
    claimed = _claimed(series) or 0
    where = f"of {len(found)} texts, on {section.topic.data}" if len(found) > 1 else f"measured to {use.measured_to}"
    if use.works_to <= use.control.window:
        tone = "bad" if claimed > use.control.window else ""
        return Said(f"no further than {use.control.window} tokens", tone, where)
    tone = "good" if use.works_to >= claimed else "bad"
    return Said(_tokens(use.works_to), tone, where)


def _by_retrieval(results: ReportRows, series: Series) -> Said:
    found = retrieval(results, series)
    if found is None:
        return Said(NOT_MEASURED, "unsure")
    claimed, trained = _claimed(series) or 0, series.scaling.original_max_position_embeddings
    length = found.works_to if found.works_to is not None else min(found.rows)
    at = claimed if claimed in found.rows else found.measured_to
    row = found.rows[at]
    more = f"finds {row['right']} of {row['n']} at {at}"
    cut = within_reach(row, trained) if trained is not None else None
    if cut is not None and trained is not None and at > trained:
        more += f"; {cut} stand in the last {trained} tokens"
    if found.works_to is None:
        return Said(f"{_NOT_EVEN}{length} tokens, the shortest measured", "bad", more)
    return Said(_tokens(length), "good" if length >= claimed else "bad", more)


def _by_ruler(results: ReportRows, series: Series) -> Said:
    scores = ruler_scores(results, series)
    if scores is None:
        return Said(NOT_MEASURED, "unsure")
    found = scores.effective
    if found is None:
        return Said(
            NOT_MEASURED, "unsure", f"no RULER task was measured at its trained length, {_tokens(scores.trained)}"
        )
    at = f"{100 * found.scores[found.trained]:.1f} % at {found.trained}; {scores.standing}"
    if found.length is None:
        return Said("nothing to keep", "bad", at)
    claimed = _claimed(series) or 0
    if found.measured_to == found.trained:
        tone = "bad" if claimed > found.trained else ""
        return Said(f"no further than {found.trained} tokens", "unsure" if tone else "", f"not measured further; {at}")
    interval = "" if found.interval is None else "[{}, {}]; ".format(*found.interval)
    more = f"{interval}measured to {found.measured_to}; {at}"
    return Said(_tokens(found.length), "good" if found.length >= claimed else "bad", more)


def _of_texts(results: ReportRows, series: Series, base: str | None, say: Callable[[ContextUse, Series], Said]) -> Said:
    """One answer for all texts."""
    found = context_use_of(results, series, base)
    if found is None:
        return Said(NOT_MEASURED, "unsure", "its control was not measured")
    answers = [(section.topic.data, say(use, series)) for section, use in found]
    if len(answers) == 1:
        return answers[0][1]
    more = "; ".join(f"{name}: {said.more or said.text}" for name, said in answers)
    words = {said.text for _, said in answers}
    if len(words) == 1:
        return replace(answers[0][1], more=more)
    return Said("mixed" if "yes" in words else "not shown", "unsure", more)


def _use(use: ContextUse, series: Series) -> Said:
    return _judged(use.total, "harms")


def _worth(use: ContextUse, series: Series) -> Said:
    if series.scaling.method == "default":
        return Said("–")
    return _judged(use.against_base, "no, worse")


def _judged(change: Change | None, worse: str) -> Said:
    if change is None:
        return Said(NOT_MEASURED, "unsure")
    if not math.isfinite(change.share):
        return Said("fails", "bad", "its perplexity overflows")
    if change.interval is None:
        return Said("not shown", "unsure", f"{change}, no interval")
    if change.lower:
        return Said("yes", "good", f"{change}")
    if change.higher:
        return Said(worse, "bad", f"{change}")
    return Said("no" if change.none else "not shown", "bad" if change.none else "unsure", f"{change}")


def _price(results: ReportRows, series: Series, base: str | None) -> Said:
    if series.scaling.method == "default":
        return Said("–")
    said = _price_in_perplexity(results, series, base)
    costs = [f"{task} {change.points}" for task, change in short_costs(results, series, base)]
    if not costs:
        return said
    if said.text == NOT_MEASURED:
        return Said(f"{costs[0]}", "", "; ".join([*costs[1:], "perplexity not measured"]))
    return replace(said, more="; ".join(filter(None, [said.more, *costs])))


def _price_in_perplexity(results: ReportRows, series: Series, base: str | None) -> Said:
    for section in results.of("perplexity"):
        trained = series.scaling.original_max_position_embeddings
        if series not in section.rows or trained is None or section.topic.setting("name") == "sliding":
            continue
        change = short_loss(section, series, trained, base)
        if change is not None:
            tone = "bad" if change.higher and change.share > 0.01 else "good" if change.at_or_below else ""
            interval = str(change).removeprefix(change.short).strip()
            return Said(change.short, tone, interval or "no interval")
    return Said(NOT_MEASURED, "unsure")
