"""The verdict on the demo's claim, that fine-tuning with YaRN extended the context, from result rows."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from scaled_rope.checkpoint import display_name
from scaled_rope.errors import ConfigError
from scaled_rope.evaluation.controls import uses_context, worth_extending
from scaled_rope.report.context_use import ContextUse, context_use
from scaled_rope.report.summary import FOUND, retrieval
from scaled_rope.report.tables import ReportRows, Section, Series
from scaled_rope.results import portable_model


@dataclass(frozen=True)
class Verdict:
    holds: bool
    line: str


def _only(what: str, candidates: Sequence[Series]) -> Series:
    if len(candidates) != 1:
        names = ", ".join(f"{display_name(one.model)} {one.label}" for one in candidates) or "none"
        raise ConfigError(f"verdict: exactly one series must be {what}; found: {names} (see --base, --finetuned)")
    return candidates[0]


def demo_verdict(results: ReportRows, base: str | None = None, finetuned: str | None = None) -> Verdict:
    """Whether fine-tuning with YaRN extended the context.

    1. Control: the fine-tuned model uses its context. Beyond the trained length and up to the extended one its
       perplexity is below that of the same weights reading the last tokens only, with the whole 95 % interval, and in
       no position bucket there above it.
    2. Retrieval: it finds at least 90 % of the passkeys at the extended length.
    3. Methods: its perplexity is below position interpolation and NTK-aware scaling without fine-tuning in every bucket
       beyond the trained length.

    All three must hold. One that fails decides; if none fails and one was not measured, nothing is decided, and the
    claim does not hold. Whether the base cut to its last tokens would have done as well is said beside it. Of several
    texts, the one that was measured last counts.

    Args:
        base: the model that is read without fine-tuning; default: the one with unscaled rows.
        finetuned: the model that carries its scaling; default: the only one that does.

    Raises:
        ConfigError: a row that the comparison of methods needs is missing, or its buckets begin at different positions.
    """
    base, finetuned = (None if name is None else portable_model(name) for name in (base, finetuned))
    sections = [one for one in results.of("perplexity") if one.topic.setting("name") != "sliding"]
    if not sections:
        raise ConfigError("verdict: there are no perplexities")
    order = {id(row): index for index, row in enumerate(results.rows)}
    section = max(sections, key=lambda one: max(order[id(r)] for cells in one.rows.values() for r in cells.values()))
    scored = list(section.rows)
    unscaled = [one for one in scored if one.scaling.method == "default" and base in (None, one.model)]
    reference = _only("the unscaled base", unscaled)
    carried = [one for one in scored if one.carried and one.scaling.method != "default"]
    tuned = _only("the fine-tuned model under its own scaling", [o for o in carried if finetuned in (None, o.model)])
    rivals = [
        _only(f"the base under static {method}", [o for o in scored if o.model == reference.model and _is(o, method)])
        for method in ("linear", "ntk")
    ]
    target = tuned.scaling.max_position_embeddings
    parts = [
        _control(section, tuned, reference, target),
        _retrieval(results, tuned, target),
        _methods(section, tuned, rivals, reference.scaling.original_max_position_embeddings),
    ]
    failed = [part for part in parts if part.holds is False]
    unknown = [part for part in parts if part.holds is None]
    held = [part for part in parts if part.holds]
    word = "FAIL" if failed else "UNDECIDED" if unknown else "PASS"
    said = [f"{part.name} did not hold ({part.why})" for part in failed]
    said += [f"{part.name}: not measured ({part.why})" for part in unknown]
    said += [f"{part.name} held ({part.why})" for part in held]
    return Verdict(word == "PASS", f"{word}: {tuned.label} to {target} tokens: {'; '.join(said)}")


@dataclass(frozen=True)
class _Part:
    """One part of the claim. holds: None where it was not measured."""

    name: str
    holds: bool | None
    why: str


def _control(section: Section, tuned: Series, reference: Series, target: int | None) -> _Part:
    use = context_use(section, tuned, reference.model)
    if use is None or use.total is None:
        return _Part("control", None, "python eval/perplexity.py --control measures it")
    window = use.control.window
    if (target or 0) > use.measured_to:
        return _Part("control", None, f"it ends at {use.measured_to} tokens")
    why = f"{uses_context(use.total, window)}; below itself cut to the last {window} tokens up to {use.works_to}"
    if use.works_to <= window:
        why = f"{uses_context(use.total, window)}; not below itself cut to the last {window} tokens in the first bucket"
    return _Part("control", use.total.lower and use.works_to >= (target or 0), f"{why}; {_worth(use)}")


def _worth(use: ContextUse) -> str:
    return worth_extending(use.against_base, use.control.window)


def _retrieval(results: ReportRows, tuned: Series, target: int | None) -> _Part:
    found = retrieval(results, tuned)
    row = None if found is None else found.rows.get(target or 0)
    if row is None:
        return _Part("retrieval", None, f"no passkeys at {target} tokens")
    share = f"{row['right']} of {row['n']} passkeys at {target} tokens, {100 * FOUND:.0f} % needed"
    return _Part("retrieval", row["accuracy"] >= FOUND, share)


def _methods(section: Section, tuned: Series, rivals: Sequence[Series], trained: int | None) -> _Part:
    beyond = [length for length in section.lengths(tuned) if length > (trained or 0)]
    if not beyond:
        raise ConfigError(f"verdict: {tuned.name} has no perplexity beyond {trained} tokens; evaluate it there")
    for length in beyond:
        spans = {_span(section, one, length) for one in (tuned, *rivals)}
        if len(spans) > 1:
            raise ConfigError(f"verdict: buckets {' and '.join(sorted(spans))} differ; evaluate all with one --lengths")
    margins = [(_bucket(section, rival, n) / _bucket(section, tuned, n), rival, n) for n in beyond for rival in rivals]
    worst, rival, length = min(margins, key=lambda margin: margin[0])
    why = (
        f"{'below' if worst > 1 else 'NOT below'} PI and NTK-aware in {'all' if worst > 1 else 'some of the'} "
        f"{len(beyond)} buckets beyond {trained} tokens, closest: {_bucket(section, tuned, length):.2f} against "
        f"{_bucket(section, rival, length):.2f} of {rival.label}, {_span(section, rival, length)}"
    )
    return _Part("comparison with other methods", worst > 1, why)


def _is(series: Series, method: str) -> bool:
    return series.scaling.method == method and not series.scaling.dynamic


def _bucket(section: Section, series: Series, length: int | None) -> float:
    """Perplexity in the position bucket that ends at `length`; infinite when it overflowed."""
    row = section.lengths(series).get(length or 0)
    if row is None:
        raise ConfigError(f"verdict: {series.name} has no perplexity at length {length}; evaluate it there")
    return math.inf if row["perplexity_bucket"] is None else float(row["perplexity_bucket"])


def _span(section: Section, series: Series, length: int | None) -> str:
    low, high = section.lengths(series)[length or 0]["bucket"]
    return f"{low}-{high}"
