"""The verdict on the demo's claim, that fine-tuning with YaRN extended the context, from result rows."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from scaled_rope.checkpoint import display_name
from scaled_rope.errors import ConfigError
from scaled_rope.report.tables import ReportRows, Section, Series
from scaled_rope.results import portable_model

TOLERANCE = 1.10
"""The largest ratio allowed, of the perplexity at the extended context to the base's within its trained context."""


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

    1. The fine-tuned model's perplexity in the position bucket that ends at its extended context is at most 1.10 times
       the unscaled base's in its own trained context.
    2. It is below position interpolation and NTK-aware scaling without fine-tuning in every bucket beyond that.

    Of several texts, the one that was measured last counts.

    Args:
        base: the model that is read without fine-tuning; default: the one with unscaled rows.
        finetuned: the model that carries its scaling; default: the only one that does.

    Raises:
        ConfigError: a row that the claim needs is missing, or buckets that are compared begin at different positions.
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
    trained, target = reference.scaling.original_max_position_embeddings, tuned.scaling.max_position_embeddings
    first, last = _bucket(section, reference, trained), _bucket(section, tuned, target)
    share = last / first
    line = (
        f"{tuned.label} at {target} tokens (bucket {_span(section, tuned, target)}): {last:.2f}, "
        f"{share:.2f}x the unscaled base within its {trained} tokens ({first:.2f}; allowed {TOLERANCE:.2f}x)"
    )
    beyond = [length for length in section.lengths(tuned) if length > (trained or 0)]
    if not beyond:
        raise ConfigError(f"verdict: {tuned.name} has no perplexity beyond {trained} tokens; evaluate it there")
    for length in beyond:
        spans = {_span(section, one, length) for one in (tuned, *rivals)}
        if len(spans) > 1:
            raise ConfigError(f"verdict: buckets {' and '.join(sorted(spans))} differ; evaluate all with one --lengths")
    margins = [(_bucket(section, rival, n) / _bucket(section, tuned, n), rival, n) for n in beyond for rival in rivals]
    worst, rival, length = min(margins, key=lambda margin: margin[0])
    line += (
        f"; {'below' if worst > 1 else 'NOT below'} PI and NTK-aware in {'all' if worst > 1 else 'some of the'} "
        f"{len(beyond)} buckets beyond (closest: {_bucket(section, tuned, length):.2f} against "
        f"{_bucket(section, rival, length):.2f} of {rival.label}, {_span(section, rival, length)})"
    )
    holds = share <= TOLERANCE and worst > 1
    return Verdict(holds, f"{'PASS' if holds else 'FAIL'}: {line}")


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
