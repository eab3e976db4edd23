"""The verdict on the demo's claim, that fine-tuning with YaRN extended the context, from result rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime

from scaled_rope.checkpoint import display_name
from scaled_rope.errors import ConfigError
from scaled_rope.evaluation.controls import NEGLIGIBLE
from scaled_rope.provenance import portable_model
from scaled_rope.report.context_use import ContextUse, context_use
from scaled_rope.report.row_files import row_date
from scaled_rope.report.summary import FOUND, retrieval
from scaled_rope.report.tables import ReportRows, Section, Series
from scaled_rope.texts.corpora import STANDIN


@dataclass(frozen=True)
class TextControl:
    """The control of the fine-tuned model on one text.

    Attributes:
        text: its name.
        use: the comparison; None where none was measured.
        holds: whether the model's perplexity is below both controls (its own weights and the base's, reading the last
            tokens only) in every position bucket that reaches beyond twice the control's window, up to the extended
            length, each with the whole 95 % interval; None where that was not measured. Before that the last tokens
            are most of the text.
        why: the reason, with the bucket that decides.
    """

    text: str
    use: ContextUse | None
    holds: bool | None
    why: str


@dataclass(frozen=True)
class Verdict:
    """Whether the claim holds, with the models and numbers that it is about.

    Attributes:
        holds: whether both parts hold.
        line: "PASS: why", "FAIL: which part did not hold and why" or "UNDECIDED: what was not measured".
        tuned, base: the fine-tuned model, and the model that it was before.
        trained, target: tokens that the base was trained on, and that the fine-tuned model is for.
        texts: its control on each text.
        control, retrieval: whether each part holds; None where it was not measured.
    """

    holds: bool
    line: str
    tuned: Series
    base: Series
    trained: int
    target: int
    texts: list[TextControl]
    control: bool | None
    retrieval: bool | None


def demo_verdict(results: ReportRows, base: str | None = None, finetuned: str | None = None) -> Verdict:
    """Whether fine-tuning with YaRN extended the context.

    1. Control: on at least one text the fine-tuned model predicts better with the whole text than from the last tokens
       alone, and better than its base would; see `TextControl.holds`.
    2. Retrieval: it finds at least 90 % of the passkeys at the extended length.

    Both must hold. One that fails decides; if none fails and one was not measured, nothing is decided, and the claim
    does not hold.

    Args:
        base: the model that is read without fine-tuning; default: the one with unscaled rows.
        finetuned: the model that carries its scaling; default: the only one that does.

    Raises:
        ConfigError: no perplexities, or the two models cannot be told from the rows.
    """
    base, finetuned = (None if name is None else portable_model(name) for name in (base, finetuned))
    sections = [one for one in results.of("perplexity") if one.topic.setting("name") != "sliding"]
    if not sections:
        raise ConfigError("verdict: there are no perplexities")
    scored = [series for series in results.series if any(series in section.rows for section in sections)]
    unscaled = [one for one in scored if one.scaling.method == "default" and base in (None, one.model)]
    reference = _only("the unscaled base", unscaled, sections)
    carried = [one for one in scored if one.tuned and finetuned in (None, one.model)]
    tuned = _only("the fine-tuned model under its own scaling", carried, sections)
    trained, target = tuned.scaling.original_max_position_embeddings, tuned.scaling.max_position_embeddings
    if trained is None or target is None or target <= trained:
        raise ConfigError(f"verdict: {tuned.name} does not say to which length it was extended")
    texts = [_on_text(one, tuned, reference, target) for one in sections if tuned in one.rows]
    parts = [_retrieval(results, tuned, target), _control(texts, trained)]
    failed = [part for part in parts if part.holds is False]
    unknown = [part for part in parts if part.holds is None]
    held = [part for part in parts if part.holds]
    word = "FAIL" if failed else "UNDECIDED" if unknown else "PASS"
    said = [f"{part.name} did not hold ({part.why})" for part in failed]
    said += [f"{part.name}: not measured ({part.why})" for part in unknown]
    said += [f"{part.name} held ({part.why})" for part in held]
    line = f"{word}: {tuned.name} to {target} tokens: {'; '.join(said)}"
    return Verdict(word == "PASS", line, tuned, reference, trained, target, texts, parts[1].holds, parts[0].holds)


def _only(what: str, candidates: Sequence[Series], sections: Sequence[Section]) -> Series:
    """The only candidate; of several, the only one that was loaded plainly, and of precisions the one measured last."""
    candidates = [one for one in candidates if not one.loading] or candidates
    if candidates and all(one.dtype for one in candidates) and len({one.model for one in candidates}) == 1:
        if len({one.dtype for one in candidates}) == len(candidates):
            candidates = [max(candidates, key=lambda one: _measured_last(one, sections))]
    if len(candidates) != 1:
        names = ", ".join(f"{display_name(one.model)} {one.label}" for one in candidates) or "none"
        raise ConfigError(f"verdict: exactly one series must be {what}; found: {names} (see --base, --finetuned)")
    return candidates[0]


def _measured_last(series: Series, sections: Sequence[Section]) -> datetime:
    return max(row_date(row) for section in sections for row in section.rows.get(series, {}).values())


@dataclass(frozen=True)
class _Part:
    """One part of the claim. holds: None where it was not measured."""

    name: str
    holds: bool | None
    why: str


def _on_text(section: Section, tuned: Series, reference: Series, target: int) -> TextControl:
    name = section.topic.data.removeprefix(STANDIN) or "text"
    use = context_use(section, tuned, reference.model)
    if use is None:
        return TextControl(name, None, None, "python eval/perplexity.py --control measures it")
    window = use.control.window
    wanted = [column for column in use.buckets if 2 * window < column[0] <= target]
    if not wanted or wanted[-1][0] != target:
        return TextControl(name, use, None, f"no position bucket ends at {target} tokens")
    if any(column not in use.base_buckets for column in wanted):
        return TextControl(name, use, None, "that of the base was not measured")
    compared = [
        (column, whose, changes[column])
        for column in wanted
        for whose, changes in (("its own", use.buckets), ("the base's", use.base_buckets))
    ]
    above = [one for one in compared if one[2] is None or not one[2].lower]
    # The one that decides: the worst of those that fail, or else the closest.
    column, whose, change = max(above or compared, key=lambda one: float("inf") if one[2] is None else one[2].share)
    place = f"{change if change is not None else 'no value'} at positions {column[1]} against {whose}"
    if above and all(one is not None and one.interval is None and one.share < -NEGLIGIBLE for _, _, one in above):
        return TextControl(name, use, None, f"no interval: {place}, from one window or rows without sums of each")
    if above:
        return TextControl(name, use, False, f"not below both in every bucket: {place}")
    return TextControl(name, use, True, f"closest: {place}")


def _control(texts: Sequence[TextControl], trained: int) -> _Part:
    outcomes = [text.holds for text in texts]
    holds = True if True in outcomes else False if False in outcomes else None
    told = {True: "on {} yes, {}", False: "on {} no, {}", None: "on {} not measured, {}"}
    said = [told[text.holds].format(text.text, text.why) for text in texts]
    if holds is None:
        return _Part("control", None, "; ".join(dict.fromkeys(text.why for text in texts)))
    return _Part("control", holds, f"below the last {trained} tokens alone, itself and the base: {'; '.join(said)}")


def _retrieval(results: ReportRows, tuned: Series, target: int) -> _Part:
    found = retrieval(results, tuned)
    row = None if found is None else found.rows.get(target)
    if row is None:
        return _Part("retrieval", None, f"no passkeys at {target} tokens")
    share = f"{row['right']} of {row['n']} passkeys at {target} tokens, {100 * FOUND:.0f} % needed"
    return _Part("retrieval", row["accuracy"] >= FOUND, share)
